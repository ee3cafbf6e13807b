"""``routed_experts`` in the responses of SGLang and vLLM: full traces, of logical experts, request by request."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.errors import ImportFileError
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
    """One request: ids (tokens, layers, k), how many tokens are the prompt's, their token ids if known, and a name."""

    ids: Ids
    prompt: int
    token_ids: list[int] | None = None
    source: str = ""


def read_sglang(path: Path, options: ImportOptions) -> Recording:
    """SGLang with ``--enable-return-routed-experts``: ``meta_info.routed_experts`` of responses, .json or .jsonl.

    base64 of int32 (tokens - 1, all decoder layers, k), logical ids; the last token has no row. The text does not say
    its shape, so the model's configuration is needed. Rows of dense layers are not looked at.

    Raises:
        ImportFileError: no configuration, no such field, or bytes that do not fill whole tokens.
    """
    if not options.config:
        raise ImportFileError(f"{path}: routed_experts do not say how many layers and experts they have: give --config")
    shape = model_shape(options.config)
    row = shape.num_layers * (options.top_k or shape.top_k)

    def requests() -> Iterator[Request]:
        for number, response in enumerate(responses(path)):
            meta = response.get("meta_info", response)
            text = meta.get("routed_experts") if isinstance(meta, dict) else None
            if text is None:
                raise ImportFileError(f"{path}: response {number} has no meta_info.routed_experts")
            where = f"{path}: routed_experts of response {number}"
            tokens, rest = divmod(bytes_of(text, where), 4 * max(row, 1))
            if rest or not row:
                raise ImportFileError(
                    f"{where} do not fill whole tokens of {shape.num_layers} layers: another model's?"
                )
            ids = decoded(text, where, shape=(tokens, shape.num_layers, row // shape.num_layers))
            prompt = meta.get("prompt_tokens")
            yield Request(ids, min(prompt, tokens) if isinstance(prompt, int) and prompt >= 0 else 0,
                          source=str(meta.get("id", number)))  # fmt: skip

    return _recording(path, options, requests, {"engine": "SGLang"}, dense_is_empty=False)


def read_vllm(path: Path, options: ImportOptions) -> Recording:
    """vLLM with ``--enable-return-routed-experts``, in the shapes that its versions are known to give.

    .json or .jsonl responses with ``prompt_routed_experts`` (prompt, layers, k) beside ``choices[i].routed_experts``
    (generated, layers, k), or ``routed_experts`` of the whole sequence; nested lists, or base64 with dtype and shape.
    .npy: one sequence; .npz: a sequence per array. Positions from the prefix cache are -1. Whether the layers are all
    or the MoE layers alone is told by the configuration.

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
        whole = own if before is None or index else (before if own is None else _joined(before, own, where))
        assert whole is not None
        of_prompt = len(before) if before is not None and not index else _prompt_tokens(response, len(whole), before)
        ids = None if index else _token_ids(response, choice, len(whole))
        yield Request(whole, of_prompt, ids, f"{name}/{index}" if len(parts) > 1 else name)


def _joined(before: Ids, own: Ids, where: str) -> Ids:
    if before.ndim != 3 or own.ndim != 3 or before.shape[1:] != own.shape[1:]:
        raise ImportFileError(
            f"{where}: the prompt has {before.shape}, the answer {own.shape}; their layers and k differ"
        )
    return np.concatenate([before, own])


def _prompt_tokens(response: dict[str, Any], tokens: int, before: Ids | None) -> int:
    """Tokens of the prompt where one array holds the whole sequence."""
    ids = response.get("prompt_token_ids")
    return min(len(ids), tokens) if before is None and isinstance(ids, list) else 0


def _token_ids(response: dict[str, Any], choice: Any, tokens: int) -> list[int] | None:
    """Token ids of prompt and answer, where both are there; the last token may have no row."""
    prompt, answer = response.get("prompt_token_ids"), choice.get("token_ids") if isinstance(choice, dict) else None
    if not isinstance(prompt, list) or not isinstance(answer, list):
        return None
    both = prompt + answer
    whole = all(isinstance(token, int) and not isinstance(token, bool) for token in both)
    return both[:tokens] if whole and 0 <= len(both) - tokens <= 1 else None


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
    *,
    dense_is_empty: bool = True,
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
    recording.blocks = _blocks(path, requests(), axis, (entries, k), options, recording, with_text, dense_is_empty)
    return recording


def _blocks(
    path: Path,
    requests: Iterator[Request],
    axis: Axis,
    shape: tuple[int, int],
    options: ImportOptions,
    recording: Recording,
    with_text: bool,
    dense_is_empty: bool,
) -> Iterator[TraceBlock]:
    number, empty = 0, 0
    for request in requests:
        if not request.ids.size:
            empty += 1
            continue
        if request.ids.ndim != 3 or request.ids.shape[1:] != shape or len(request.ids) > MAX_TOKENS:
            raise ImportFileError(f"{path}: a request has {request.ids.shape}, others (tokens, {shape[0]}, {shape[1]})")
        ids = request.ids.transpose(1, 0, 2)
        if dense_is_empty:
            require_dense_empty(ids, axis, path)
        tokens = len(request.ids)
        known = request.token_ids if with_text else None
        if with_text and known is None:
            raise ImportFileError(f"{path}: some responses hold token ids and others do not; import them apart")
        recording.labels[number] = SequenceLabel(options.domain, request.source)
        yield TraceBlock(
            ids[axis.kept], None, np.full(tokens, number), np.arange(tokens), np.arange(tokens) >= request.prompt,
            np.asarray(known, np.int64) if known is not None else None,
        )  # fmt: skip
        number += 1
    if empty:
        detail = f"{empty} requests came without routed experts (preempted, or nothing generated) and are left out"
        recording.notes.append(("requests without routing", "warning", detail))
