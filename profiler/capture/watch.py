"""``profiler.watch``: record what a model does, in any loop or server, and write it as a run."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import polars as pl
import torch
from torch import Tensor, nn

import store as run_store
from compressor.families import find_router_outputs
from moescope.errors import CaptureError, InputError, ModelError, MoescopeError
from profiler.capture.batch import ExpertRows, LayerKey, ResidualBatch, Tokens
from profiler.capture.checks import Checks
from profiler.capture.discovery import MoELayer, inspect_model
from profiler.capture.hooks import Hooks
from profiler.capture.levels import parse_levels
from profiler.capture.provenance import describe_layer, describe_run
from profiler.capture.routing import LayerRouting, RoutingBuffer
from profiler.capture.sequences import BatchRows, ForwardInputs, Label, SequenceTracker
from profiler.capture.tap import ExpertsCall, TappedRows, run_with_rows, tapped
from profiler.recorders.load import LoadRecorder
from profiler.recorders.router import RouterRecorder
from profiler.recorders.text import TextRecorder
from profiler.recorders.trace import TraceRecorder

FLUSH_BYTES = 128 << 20
"""Trace held in memory before it is written, whatever the time."""


def watch(
    model: nn.Module,
    *,
    name: str,
    store: str | Path = "runs",
    level: str = "routing",
    tokenizer: Any = None,
    domain: str = "text",
    token_budget: int | None = None,
    keep_text: bool = True,
    flush_seconds: float = 15.0,
    resume: bool = False,
    model_name: str = "",
    revision: str = "",
    settings: Mapping[str, Any] | None = None,
) -> WatchSession:
    """Record what a model's MoE layers do while the context is entered, in any loop or server.

    ::

        with profiler.watch(model, store="runs", name="mine", level="activations") as session:
            for batch in batches:
                model(**batch)

    ``model(**batch)`` and ``model.generate(...)`` both work, with or without padding and cache. Real tokens are told by
    the 2-D attention mask; without mask, all are real. The model's outputs stay what they are, bit for bit. Several
    sequences packed into one row count as one sequence. Under gradient checkpointing the first pass alone is counted.

    Args:
        model: a model of transformers 5 with fused experts, or anything that contains one.
        name: name of the run; the file becomes ``store/name.duckdb``.
        store: directory of runs, made if it is not there.
        level: comma list of ``routing`` and ``activations``.
        tokenizer: with it the run keeps the text; without it neither text nor token ids.
        domain: label of the tokens, where :meth:`WatchSession.label` does not say otherwise.
        token_budget: stop recording (not the model) after the forward that reaches so many real tokens.
        keep_text: False keeps no token ids even if there is a tokenizer.
        flush_seconds: write a shard at the end of the first forward after so many seconds.
        resume: go on with an interrupted run of that name.
        model_name: what the run calls the model; its folder or hub id if empty.
        revision: hub revision of the model, if known.
        settings: anything worth keeping about this collection; becomes JSON in table ``run``.

    Raises:
        ModelError: the model has no MoE layer, or one that cannot be watched.
        InputError: an unknown level, or (from the store) a name that is taken.
    """
    return WatchSession(
        model,
        name=name,
        directory=Path(store),
        levels=parse_levels(level),
        tokenizer=tokenizer if keep_text else None,
        domain=domain,
        token_budget=token_budget,
        flush_seconds=flush_seconds,
        resume=resume,
        model_name=model_name,
        revision=revision,
        settings=settings or {},
    )


@dataclass
class _Forward:
    """A forward of the watched model that is running."""

    inputs: ForwardInputs
    tokens: Tokens
    rows: BatchRows
    sampled: bool
    began: float
    routing: dict[LayerKey, LayerRouting] = field(default_factory=dict)
    chosen: dict[LayerKey, tuple[Tensor | None, Tensor | None]] = field(default_factory=dict)


class WatchSession:
    """A running watch; made by :func:`watch`.

    Attributes:
        path: the finished run's file, once the context has been left.
        tokens: real tokens recorded so far in this session.
        tokens_before: real tokens that the interrupted run had, when it was resumed.
        planned_tokens: real tokens that are to come in all, 0 where nobody knows.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        name: str,
        directory: Path,
        levels: Sequence[str],
        tokenizer: Any,
        domain: str,
        token_budget: int | None,
        flush_seconds: float,
        resume: bool,
        model_name: str,
        revision: str,
        settings: Mapping[str, Any],
        origin: str = "watch",
    ) -> None:
        self.model: nn.Module = getattr(model, "_orig_mod", model)
        self.found = inspect_model(self.model)
        self.levels = levels
        self.path: Path | None = None
        self.tokens = 0
        self._domain, self._budget, self._flush_seconds = domain, token_budget, flush_seconds
        self._name, self._directory, self._resume = name, directory, resume
        self._require_rows()
        self._info = describe_run(
            self.model,
            self.found,
            name=model_name,
            revision=revision,
            origin=origin,
            levels=levels,
            settings=settings,
            text_kept=tokenizer is not None,
        )
        self._by_key = {layer.key: layer for layer in self.found.layers}
        self._top_k: dict[LayerKey, int] = {}
        self.checks = Checks(self.found.layers)
        self._text = TextRecorder(tokenizer) if tokenizer is not None else None
        self._trace = TraceRecorder(max(layer.num_experts for layer in self.found.layers))
        self._routing = [LoadRecorder(), RouterRecorder(), self._trace]
        self._inside = _inside_recorders() if "activations" in levels else []
        self._residual = _residual_recorders() if "activations" in levels else []
        self._buffer = RoutingBuffer([self.checks, *self._routing])
        self._forward: _Forward | None = None
        self._outer: dict[str, Any] = {}
        self.planned_tokens = 0
        self.tokens_before = 0
        self._seconds = self._seconds_before = 0.0
        self._recording = True
        self._writer: run_store.RunWriter | None = None

    @property
    def writer(self) -> run_store.RunWriter:
        """The run that is being written."""
        if self._writer is None:
            raise CaptureError(f"run {self._name!r} is not being watched: enter the context first")
        return self._writer

    @property
    def budget_reached(self) -> bool:
        """Whether the token budget is used up; nothing more is recorded then."""
        return self._budget is not None and self.tokens >= self._budget

    def label(
        self,
        *,
        domains: Iterable[str] | str | None = None,
        sequences: Iterable[int] | None = None,
        sources: Iterable[str] | None = None,
        mask: Tensor | None = None,
    ) -> None:
        """Say what the rows of the next batch are; it holds for the sequences that begin there.

        Args:
            domains: label of each row, or one for all.
            sequences: number of each row's sequence in the run; by default they are counted on.
            sources: document of each row.
            mask: (batch, length) 2-D attention mask, where the model is called with another.
        """
        if isinstance(domains, str):
            self._tracker.domain = domains
            domains = None
        self._tracker.label(
            Label(
                domains=None if domains is None else [str(domain) for domain in domains],
                sequences=None if sequences is None else [int(sequence) for sequence in sequences],
                sources=None if sources is None else [str(source) for source in sources],
                mask=mask,
            )
        )

    @property
    def name(self) -> str:
        """Name of the run."""
        return self._name

    @property
    def folder(self) -> Path:
        """Where the shards are while the run is collected."""
        return self.writer.folder

    @property
    def resuming(self) -> bool:
        """Whether this session goes on with an interrupted run."""
        return self._resume

    @property
    def is_open(self) -> bool:
        """Whether the run's folder is there."""
        return self._writer is not None

    def open(self) -> None:
        """Make the run's folder, or take up that of an interrupted run; entering the context does it too.

        Raises:
            StoreError: the name is taken, or there is nothing to resume.
            InputError: the interrupted run has another model or level.
        """
        if self._writer is not None:
            return
        if self._resume:
            writer = run_store.RunWriter.resume(self._directory, self._name)
            self._require_same_model(writer.info)
        else:
            writer = run_store.RunWriter.create(self._directory, self._name, self._info)
        done = writer.sequences_done if self._resume else set()
        self.tokens_before = int(run_store.open_run(writer.folder).table("sequence")["tokens"].sum()) if done else 0
        self._tracker = SequenceTracker(
            domain=self._domain, first_sequence=max(done, default=-1) + 1, **_end_tokens(self.model)
        )
        self._writer, self._seconds = writer, writer.info.seconds
        self._seconds_before = self._seconds
        self._flushed = time.monotonic()

    @contextmanager
    def attached(self) -> Iterator[None]:
        """While entered, the model is watched; hooks and taps are gone afterwards, also after an error."""
        self.open()
        stack, hooks = ExitStack(), Hooks()
        try:
            self._attach(stack, hooks)
            yield
        finally:
            hooks.remove()
            stack.close()
            self._forward = None
            self._outer = {}

    def __enter__(self) -> WatchSession:
        self.open()
        self._attachment = self.attached()
        try:
            self._attachment.__enter__()
        except BaseException:
            self._forget()
            raise
        self._progress("collecting")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._attachment.__exit__(None, None, None)
        if error is not None:
            self._interrupt(error)
            return
        if self.checks.forwards == 0 and not self._resume:
            self._forget()
            raise CaptureError(
                f"run {self._name!r}: no forward of the watched model ended inside the context: call the model that was"
                " passed to watch(), not a copy or a compiled one"
            )
        self.flush(final=True)
        self._progress("compacting")
        self.path = self.writer.finish(seconds=self._seconds)

    def _forget(self) -> None:
        """Leave no folder of a run that recorded nothing: it would only keep the name."""
        if not self._resume:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _attach(self, stack: ExitStack, hooks: Hooks) -> None:
        stack.enter_context(_uncompiled())
        watchers = [(layer.experts, self._watcher(layer)) for layer in self.found.layers]
        stack.enter_context(tapped(watchers))
        if self.found.owner is not self.model:
            for module in _modules_between(self.model, self.found.owner):
                hooks.before(module, self._saw_outer)
        hooks.before(self.found.owner, self._open)
        hooks.after(self.found.owner, self._close, always=True)
        for layer in self.found.layers:
            if layer.router is not None:
                hooks.after(layer.router, self._router_hook(layer), first=True)
        if self._residual:
            for index, module in enumerate(self.found.stack):
                hooks.after(module, self._residual_hook(index), first=True)
        if self._inside:
            from profiler.capture.shared import watch_shared

            for layer in self.found.layers:
                watch_shared(layer, hooks, self._take_shared)

    # What hooks see

    def _saw_outer(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for key in ("input_ids", "attention_mask"):
            value = _argument(module, key, args, kwargs)
            if value is not None:
                self._outer[key] = value

    @torch.no_grad()
    def _open(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._recording:
            return
        if self._forward is not None:
            raise CaptureError("two forwards of the watched model run at once: profile with one worker and one thread")
        inputs = _inputs(module, args, kwargs, self._outer)
        self._outer = {}
        tokens, rows = self._tracker.begin(inputs)
        self._forward = _Forward(inputs, tokens, rows, self.checks.wants_sample(), time.perf_counter())

    @torch.no_grad()
    def _close(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        forward, self._forward = self._forward, None
        if forward is None:
            return
        if output is None:  # the forward failed
            self._tracker.findings["failed forward"] += 1
            self._tracker.abort()
            for recorder in (*self._inside, *self._residual):
                recorder.discard()
            return
        self._seconds += time.perf_counter() - forward.began
        cache = getattr(output, "past_key_values", None)
        self._tracker.commit(forward.tokens, forward.rows, forward.inputs, [forward.inputs.cache, cache])
        self.checks.saw_layers(forward.routing)
        self._buffer.add(forward.tokens, forward.routing)
        for recorder in (*self._inside, *self._residual):
            recorder.commit()
        if self._text is not None and forward.inputs.input_ids is not None:
            self._text.update(forward.tokens, forward.inputs.input_ids)
        self.tokens += len(forward.tokens)
        self._recording = not self.budget_reached
        late = time.monotonic() - self._flushed >= self._flush_seconds
        if late or self._trace.bytes_held > FLUSH_BYTES:
            self.flush()

    def _router_hook(self, layer: MoELayer) -> Any:
        def see(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if self._forward is not None:
                self._forward.chosen[layer.key] = find_router_outputs(
                    output, logits_index=layer.logits_index, top_k=layer.top_k
                )

        return see

    def _residual_hook(self, index: int) -> Any:
        def see(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            forward = self._forward
            hidden = output[0] if isinstance(output, (tuple, list)) else output
            if forward is None or not isinstance(hidden, Tensor) or hidden.numel() % forward.tokens.rows:
                return
            with torch.no_grad():
                flat = hidden.detach().reshape(forward.tokens.rows, -1)
                for recorder in self._residual:
                    recorder.update(ResidualBatch(index, forward.tokens, flat, hidden.shape[-1]))

        return see

    def _watcher(self, layer: MoELayer) -> Any:
        def run(call: ExpertsCall) -> Tensor:
            forward = self._forward
            if forward is None:
                self._tracker.findings["outside a forward"] += int(self._recording)
                return call.run()
            output, rows = run_with_rows(call) if self._inside else (call.run(), None)
            with torch.no_grad():
                self._record(forward, layer, call, output, rows)
            return output

        return run

    def _record(
        self, forward: _Forward, layer: MoELayer, call: ExpertsCall, output: Tensor, rows: TappedRows | None
    ) -> None:
        if layer.key in forward.routing:
            raise CaptureError(f"{layer.name} was called twice in one forward: such a model needs an adapter")
        ids, weights = call.ids.detach(), call.weights.detach()
        if ids.shape[0] != forward.tokens.rows:
            self._tracker.findings["rows unlike tokens"] += 1
            return
        self._top_k[layer.key] = max(self._top_k.get(layer.key, 0), ids.shape[-1])
        logits, chosen = forward.chosen.get(layer.key, (None, None))
        if logits is not None:
            logits = logits.detach().reshape(-1, logits.shape[-1])
            if logits.shape[0] != ids.shape[0] or logits.shape[1] < layer.num_experts:
                logits = None
        forward.routing[layer.key] = LayerRouting(layer, ids, weights, logits)
        if forward.sampled:
            self.checks.compare(layer, call, output, rows)
            if chosen is not None and chosen.numel() == ids.numel():
                self.checks.compare_selection(layer, chosen, ids)
        if rows is not None:
            self._take_rows(forward, layer, rows)

    def _take_rows(self, forward: _Forward, layer: MoELayer, rows: TappedRows) -> None:
        tokens, real = forward.tokens, None
        expert, token, gate = rows.expert, rows.token, rows.gate.float()
        place = None
        if tokens.keep is not None:
            place = torch.full((tokens.rows,), -1, device=token.device)
            place[tokens.keep.to(token.device)] = torch.arange(len(tokens), device=token.device)
            token = place[token]
        wanted = token >= 0
        if layer.traits.zero_weight_is_none:
            wanted &= gate != 0
        if place is not None or layer.traits.zero_weight_is_none:
            real = wanted.nonzero()[:, 0]
            expert, token, gate = expert[real], token[real], gate[real]
        batch = ExpertRows(
            layer.key, "routed", layer.num_experts, tokens, expert, token, gate, rows.activation, rows.output, real
        )
        for recorder in self._inside:
            recorder.update(batch)

    def _take_shared(self, layer: MoELayer, gate: Tensor | None, activation: Tensor | None, output: Tensor) -> None:
        forward = self._forward
        if forward is None or output.shape[0] != forward.tokens.rows:
            return
        tokens = forward.tokens
        device = output.device
        keep = None if tokens.keep is None else tokens.keep.to(device)
        token = torch.arange(len(tokens), device=device)
        weight = torch.ones(output.shape[0], device=device) if gate is None else gate.reshape(-1).float()
        batch = ExpertRows(
            layer.key,
            "shared",
            1,
            tokens,
            torch.zeros_like(token),
            token,
            weight if keep is None else weight[keep],
            activation,
            output,
            keep,
        )
        for recorder in self._inside:
            recorder.update(batch)

    # What is written

    def flush(self, *, final: bool = False) -> None:
        """Write what was recorded since the last shard."""
        self._buffer.flush()
        frames = self._drain()
        sequences = self._tracker.drain()
        self.checks.empty_sequences += sum(row["tokens"] == 0 for row in sequences)
        if sequences:
            frames["sequence"] = [pl.DataFrame(sequences)]
        self.checks.findings = self._tracker.findings
        if final:
            frames["check"] = [self.checks.table()]
        if self._top_k:
            known = [describe_layer(self._by_key[key], k).__dict__ for key, k in self._top_k.items()]
            frames["layer"] = [pl.DataFrame(known)]
        self.writer.write_shard({table: pl.concat(parts, how="diagonal_relaxed") for table, parts in frames.items()})
        self._flushed = time.monotonic()
        self._progress("collecting")

    def _drain(self) -> dict[str, list[pl.DataFrame]]:
        frames: dict[str, list[pl.DataFrame]] = {}
        text = [self._text] if self._text is not None else []
        for recorder in (*self._routing, *self._inside, *self._residual, *text):
            for table, frame in recorder.drain().items():
                frames.setdefault(table, []).append(frame)
        return frames

    def _interrupt(self, error: BaseException) -> None:
        """Keep the shards, so that the run can be resumed; never hide the error that is under way."""
        try:
            self._forward = None
            self.flush(final=True)
            self.writer.info.seconds = self._seconds
            self.writer.write_info()
            self._progress("interrupted", f"{type(error).__name__}: {error}".splitlines()[0][:200])
        except MoescopeError as second:
            error.add_note(f"moescope could not write the last shard either: {second}")

    def state(self, token_budget: int = 0, detail: str = "", state: Any = "collecting") -> run_store.Progress:
        """How far the collection is; 0 tokens of budget = unknown."""
        spent = self._seconds - self._seconds_before
        speed = self.tokens / spent if spent else 0.0
        left = max(0, token_budget - self.tokens_before - self.tokens) / speed if token_budget and speed else None
        return run_store.Progress(
            tokens=self.tokens_before + self.tokens,
            token_budget=token_budget,
            tokens_per_second=speed,
            seconds_left=left,
            state=state,
            detail=detail,
        )

    def add_setting(self, name: str, value: Any) -> None:
        """Keep one more setting in the run."""
        self._info.settings[name] = value
        if self._writer is not None:
            self._writer.info.settings[name] = value
            self._writer.write_info()

    def _progress(self, state: Any, detail: str = "") -> None:
        self.writer.write_progress(self.state(self.planned_tokens or self._budget or 0, detail, state))

    def require_same_corpus(self) -> None:
        """Refuse to resume with another corpus, where the run says which one it was.

        Raises:
            InputError: the run was begun with another corpus.
        """
        before = self.writer.info.settings.get("corpus_sha256")
        now = self._info.settings.get("corpus_sha256")
        if self._resume and before and now and before != now:
            raise InputError(f"run {self._name!r} was begun with another corpus: resume it with the same --data and options")

    def _require_rows(self) -> None:
        if "activations" not in self.levels:
            return
        for layer in self.found.layers:
            if layer.layout is None:
                raise ModelError(
                    f"{layer.name} ({type(layer.experts).__name__}) keeps its weights packed, so that its experts'"
                    " outputs cannot be watched: use level routing, or load the model dequantized"
                )

    def _require_same_model(self, info: run_store.RunInfo) -> None:
        if info.model_fingerprint and info.model_fingerprint != self._info.model_fingerprint:
            raise InputError(f"run {self._name!r} was begun with another model ({info.model}): resume it with that one")
        if info.levels != self._info.levels:
            raise InputError(f"run {self._name!r} was begun with level {info.levels!r}: resume it with that level")


def _inside_recorders() -> list[Any]:
    from profiler.recorders.expert_output import ExpertOutputRecorder
    from profiler.recorders.neurons import NeuronRecorder

    return [ExpertOutputRecorder(), NeuronRecorder()]


def _residual_recorders() -> list[Any]:
    from profiler.recorders.residual import ResidualRecorder

    return [ResidualRecorder()]


def _uncompiled() -> Any:
    """While entered, compiled models run as they are written: hooks on a compiled model are ignored without a word."""
    return torch.compiler.set_stance("force_eager")


def _modules_between(outer: nn.Module, inner: nn.Module) -> list[nn.Module]:
    """The modules around ``inner``, from ``outer`` on."""
    name = next(name for name, module in outer.named_modules() if module is inner)
    parts = name.split(".")
    return [outer.get_submodule(".".join(parts[:count])) for count in range(len(parts))]


def _argument(module: nn.Module, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if name in kwargs or not args:
        return kwargs.get(name)
    import inspect

    names = list(inspect.signature(module.forward).parameters)
    place = names.index(name) if name in names else len(args)
    return args[place] if place < len(args) else None


def _inputs(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], outer: Mapping[str, Any]
) -> ForwardInputs:
    ids, embeddings, mask, cache = (
        _argument(module, name, args, kwargs)
        for name in ("input_ids", "inputs_embeds", "attention_mask", "past_key_values")
    )
    if cache is None:
        cache = _argument(module, "cache_params", args, kwargs)
    source = ids if ids is not None else embeddings
    if source is None:
        raise CaptureError(f"{type(module).__name__} was called without input_ids and without inputs_embeds")
    shape = (int(source.shape[0]), int(source.shape[1]))
    if ids is None and outer.get("input_ids") is not None and tuple(outer["input_ids"].shape) == shape:
        ids = outer["input_ids"]
    # The outermost mask is the caller's own; wrappers may have turned it into a 4-D one on the way in.
    caller = outer.get("attention_mask")
    if getattr(caller, "ndim", 0) == 2:
        mask = caller
    return ForwardInputs(ids, shape, mask, cache, source.device)


def _end_tokens(model: nn.Module) -> dict[str, list[int]]:
    """Ids of end and padding tokens: by the generation settings where the model has them, else by its configuration."""
    source = getattr(model, "generation_config", None) or getattr(model, "config", None)

    def ids(name: str) -> list[int]:
        value = getattr(source, name, None)
        return [] if value is None else [int(entry) for entry in (value if isinstance(value, (list, tuple)) else [value])]

    return {"end_ids": ids("eos_token_id"), "pad_ids": ids("pad_token_id")}
