"""``routed_experts`` in the responses of SGLang and vLLM: full traces, of logical experts, request by request."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from moescope.errors import ImportFileError
from profiler.importers.format import Format
from profiler.importers.json_file import bytes_of, decoded, responses
from profiler.importers.model_config import model_shape
from profiler.importers.npy import Archive, read_header
from profiler.importers.recording import ImportOptions, Recording, SequenceLabel, TraceBlock
from profiler.importers.shape import Axis, layer_axis, require_dense_empty

MAX_TOKENS = 1 << 24
"""Tokens of one request."""

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Request:
    """One request: ids (tokens, layers, k), how many tokens are the prompt's, their token ids if known, a name, and how
    many tokens at its beginning are left out."""

    ids: Ids
    prompt: int
    token_ids: list[int] | None = None
    source: str = ""
    missing: int = 0


def read_sglang(path: Path, options: ImportOptions) -> Recording:
    """SGLang with ``--enable-return-routed-experts``: ``routed_experts`` of responses, .json or .jsonl.

    In ``meta_info`` of /generate; in ``sglext`` of the OpenAI endpoints, of the response or (older) of a choice. base64
    of (tokens - 1, all decoder layers, k), logical ids, int32 or what ``routed_experts_dtype`` says; the last token has
    no row, and ``routed_experts_start_len`` leaves out the first. The text does not say its shape, so the model's
    configuration is needed. Rows of dense layers stay zero.

    Source: python/sglang/srt/state_capturer/{base,routed_experts,routed_experts_wire}.py,
    srt/entrypoints/openai/serving_completions.py.

    Raises:
        ImportFileError: no configuration, no such field, or bytes that do not fill whole tokens.
    """
    if not options.config:
        raise ImportFileError(f"{path}: routed_experts do not say how many layers and experts they have: give --config")
    shape = model_shape(options.config)
    row = shape.num_layers * (options.top_k or shape.top_k)

    def requests() -> Iterator[Request]:
        for number, response in enumerate(responses(path)):
            where = f"{path}: routed_experts of response {number}"
            places = [place for place in _sglang_places(response) if place.get("routed_experts") is not None]
            if not places:
                raise ImportFileError(f"{path}: response {number} has no routed_experts in meta_info or sglext")
            for index, place in enumerate(places):
                dtype = str(place.get("routed_experts_dtype") or "int32")
                width = {"int32": 4, "uint16": 2, "uint8": 1}.get(dtype)
                if width is None:
                    raise ImportFileError(f"{where} are of {dtype}; SGLang sends int32, uint16 or uint8")
                data = bytes_of(place["routed_experts"], where)
                tokens, rest = divmod(len(data), width * max(row, 1))
                if rest or not row:
                    raise ImportFileError(
                        f"{where} do not fill whole tokens of {shape.num_layers} layers: another model's?"
                    )
                ids = np.frombuffer(data, np.dtype(dtype).newbyteorder("<")).astype(np.int64)
                name = str(place.get("id", response.get("id", number)))
                yield _request(
                    ids.reshape(tokens, shape.num_layers, -1), response, _choice(response, index), where,
                    f"{name}/{index}" if len(places) > 1 else name,
                )  # fmt: skip

    return _recording(path, options, requests, {"engine": "SGLang"})


def _sglang_places(response: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Where SGLang's servers put ``routed_experts``."""
    choices = response.get("choices")
    for holder in (response, *(choices if isinstance(choices, list) else ())):
        for name in ("meta_info", "sglext"):
            if isinstance(holder, dict) and isinstance(place := holder.get(name), dict):
                yield place


def read_vllm(path: Path, options: ImportOptions) -> Recording:
    """vLLM with ``--enable-return-routed-experts``, in the shapes that its versions give.

    .json or .jsonl responses with ``choices[i].routed_experts`` of the whole sequence but its last token, as base64 of
    an .npy file (tokens - 1, all decoder layers, k), zeros in dense layers; ``routed_experts_prompt_start`` leaves out
    the first tokens. In 0.21: nested lists, ``prompt_routed_experts`` (prompt, MoE layers, k) beside
    ``choices[i].routed_experts`` (generated, MoE layers, k), with -1 for tokens from the prefix cache. Also base64 in
    an object with dtype and shape, as servers around vLLM send it. .npy: one sequence; .npz: a sequence per array.
    Whether the layers are all or the MoE layers alone is told by the configuration.

    Source: vllm/entrypoints/openai/{completion,chat_completion}/protocol.py, vllm/model_executor/layers/fused_moe/
    routed_experts_capture, docs/training/routed_experts_replay.md of 0.21.

    Raises:
        ImportFileError: none of these, or not of the model's shape.
    """

    def requests() -> Iterator[Request]:
        if path.suffix in (".npy", ".npz"):
            yield from _arrays(path)
            return
        for number, response in enumerate(responses(path)):
            yield from _vllm_requests(response, f"{path}: response {number}", str(response.get("id", number)))

    return _recording(path, options, requests, {"engine": "vLLM"})


def _vllm_requests(response: dict[str, Any], where: str, name: str) -> Iterator[Request]:
    choices = response.get("choices", response.get("outputs"))
    prompt = response.get("prompt_routed_experts")
    before = decoded(prompt, f"{where}, prompt_routed_experts") if prompt is not None else None
    parts = choices if isinstance(choices, list) else [response]
    known = any(isinstance(one, dict) and "routed_experts" in one for one in parts)
    if before is None and not known:
        raise ImportFileError(f"{where} has neither prompt_routed_experts nor routed_experts")
    for index, choice in enumerate(parts):
        value = choice.get("routed_experts") if isinstance(choice, dict) else None
        if value is None and (before is None or index):
            yield Request(np.zeros((0, 0, 0), np.int64), 0)  # preempted: counted, not read
            continue
        own = decoded(value, f"{where}, routed_experts") if value is not None else None
        title = f"{name}/{index}" if len(parts) > 1 else name
        if before is None and own is not None:
            yield _request(own, response, _choice(response, index), where, title)
        elif index and own is not None:  # the prompt went to the first choice
            yield Request(own, 0, source=title)
        elif before is not None:
            whole = before if own is None else _joined(before, own, where)
            ids = _tokens(response, _choice(response, index))
            fits = ids is not None and 0 <= len(ids[0] + ids[1]) - len(whole) <= 1
            yield Request(whole, len(before), (ids[0] + ids[1])[: len(whole)] if ids and fits else None, title)


def _joined(before: Ids, own: Ids, where: str) -> Ids:
    if before.ndim != 3 or own.ndim != 3 or before.shape[1:] != own.shape[1:]:
        raise ImportFileError(
            f"{where}: the prompt has {before.shape}, the answer {own.shape}; their layers and k differ"
        )
    return np.concatenate([before, own])


def _request(ids: Ids, response: dict[str, Any], choice: dict[str, Any], where: str, source: str) -> Request:
    """A request whose rows are those of its whole sequence up to the last token, perhaps without the first tokens."""
    prompt, answer = _lengths(response, choice)
    missing = 0
    if prompt is not None and answer is not None:
        missing = prompt + answer - 1 - len(ids)
        if not -1 <= missing <= prompt:  # one row too many: of the last token
            raise ImportFileError(
                f"{where} has {len(ids)} rows for {prompt} tokens of a prompt and {answer} of an answer"
            )
        missing = max(missing, 0)
    tokens = _tokens(response, choice)
    known = (tokens[0] + tokens[1])[missing : missing + len(ids)] if tokens else []
    of_prompt = min(max((prompt or 0) - missing, 0), len(ids))
    return Request(ids, of_prompt, known if len(known) == len(ids) else None, source, missing)


def _choice(response: dict[str, Any], index: int) -> dict[str, Any]:
    """The choice of that number; a response without choices is its own."""
    choices = response.get("choices", response.get("outputs"))
    one = choices[index] if isinstance(choices, list) and index < len(choices) else response
    return one if isinstance(one, dict) else {}


def _lengths(response: dict[str, Any], choice: dict[str, Any]) -> tuple[int | None, int | None]:
    """Tokens of prompt and answer: by their ids, else by what the engine counted for this one request."""
    ids = _tokens(response, choice)
    if ids is not None:
        return len(ids[0]), len(ids[1])
    choices, counted = response.get("choices"), {}
    if not isinstance(choices, list) or len(choices) == 1:  # usage adds up choices
        places = (choice.get("meta_info"), response.get("meta_info"), response.get("usage"))
        counted = next((place for place in places if isinstance(place, dict)), {})
    prompt = _first(response, choice, "prompt_token_ids")
    before = len(prompt) if isinstance(prompt, list) else counted.get("prompt_tokens")
    after = counted.get("completion_tokens")
    return before if _is_number(before) else None, after if _is_number(after) else None


def _is_number(value: Any) -> TypeGuard[int]:
    return type(value) is int and value >= 0


def _tokens(response: dict[str, Any], choice: dict[str, Any]) -> tuple[list[int], list[int]] | None:
    """Token ids of prompt and answer, where both are there."""
    prompt, answer = _first(response, choice, "prompt_token_ids"), _first(response, choice, "token_ids", "output_ids")
    if not isinstance(prompt, list) or not isinstance(answer, list):
        return None
    return (prompt, answer) if all(map(_is_number, prompt + answer)) else None


def _first(response: dict[str, Any], choice: dict[str, Any], *names: str) -> Any:
    """The first of these fields that is there, the choice's before the response's."""
    return next((one[name] for one in (choice, response) for name in names if one.get(name) is not None), None)


def _arrays(path: Path) -> Iterator[Request]:
    if not path.is_file():
        raise ImportFileError(f"{path} is no file")
    if path.suffix == ".npz":
        archive = Archive(path)
        for name in archive.names:
            yield Request(_ids(archive.whole(name), f"{path}: {name}"), 0, source=name)
        return
    with path.open("rb") as stream:
        header, length = read_header(stream, str(path))
        if length + header.bytes != path.stat().st_size:
            raise ImportFileError(f"{path} declares {header.dtype} {header.shape}, but has {path.stat().st_size} bytes")
        values = np.frombuffer(stream.read(), header.dtype).reshape(header.shape)
    yield Request(_ids(values, str(path)), 0)


def _ids(values: NDArray[Any], where: str) -> Ids:
    if values.dtype.kind not in "iu" or values.ndim != 3:
        raise ImportFileError(f"{where} is {values.dtype} {values.shape}, not integers (tokens, layers, k)")
    return values.astype(np.int64)


def _recording(
    path: Path,
    options: ImportOptions,
    requests: Callable[[], Iterator[Request]],
    settings: dict[str, Any],
) -> Recording:
    """A recording of requests, the first of which is read now for its shape."""
    first = next((request for request in requests() if request.ids.size), None)
    if first is None:
        raise ImportFileError(f"{path} holds no routed experts of any request")
    if first.ids.ndim != 3:
        raise ImportFileError(f"{path}: routed experts have shape {first.ids.shape}, not (tokens, layers, k)")
    _, entries, k = first.ids.shape
    axis = layer_axis(options=options, path=path, entries=entries, top_k=k)
    omissions = {"weights": "the engine returns ids without gate weights"}
    if first.token_ids is None:
        omissions["text"] = "the responses hold no token ids of both prompt and answer"
    recording = Recording(layers=axis.layers, blocks=iter(()), omissions=omissions, settings=settings)
    with_text = first.token_ids is not None
    recording.blocks = _blocks(path, requests(), axis, (entries, k), options, recording, with_text)
    return recording


def _blocks(
    path: Path,
    requests: Iterator[Request],
    axis: Axis,
    shape: tuple[int, int],
    options: ImportOptions,
    recording: Recording,
    with_text: bool,
) -> Iterator[TraceBlock]:
    number, empty, cut = 0, 0, 0
    for request in requests:
        if not request.ids.size:
            empty += 1
            continue
        if request.ids.ndim != 3 or request.ids.shape[1:] != shape or len(request.ids) > MAX_TOKENS:
            raise ImportFileError(f"{path}: a request has {request.ids.shape}, others (tokens, {shape[0]}, {shape[1]})")
        ids = request.ids.transpose(1, 0, 2)
        require_dense_empty(ids, axis, path, empty=0)  # both engines' buffers begin as zeros
        tokens = len(request.ids)
        known = request.token_ids if with_text else None
        if with_text and known is None:
            raise ImportFileError(f"{path}: some responses hold token ids and others do not; import them apart")
        recording.labels[number] = SequenceLabel(options.domain, request.source)
        yield TraceBlock(
            ids[axis.kept], None, np.full(tokens, number), np.arange(tokens), np.arange(tokens) >= request.prompt,
            np.asarray(known, np.int64) if known is not None else None,
        )  # fmt: skip
        number, cut = number + 1, cut + (request.missing > 0)
    if empty:
        detail = f"{empty} requests came without routed experts (preempted, or nothing generated) and are left out"
        recording.notes.append(("requests without routing", "warning", detail))
    if cut:
        detail = f"{cut} requests asked for the routing of their later tokens only: their sequences begin in the middle"
        recording.notes.append(("requests without beginning", "warning", detail))


FORMATS = (
    Format("sglang-responses", "SGLang", "FILE.jsonl of responses", "trace", read_sglang),
    Format("vllm", "vLLM", "FILE.jsonl of responses, .npy, .npz", "trace, token ids where given", read_vllm),
)
