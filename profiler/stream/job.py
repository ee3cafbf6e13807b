"""``collect_streamed``: run a corpus through a checkpoint that is larger than memory, one decoder layer at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import store as run_store
from profiler.capture.discovery import inspect_model
from profiler.capture.levels import RecordingOptions
from profiler.capture.provenance import sample, sample_places
from profiler.collect import Job, ProgressCallback, compute_metrics, differences, require_fitting
from profiler.stream.checkpoint import Checkpoint
from profiler.stream.hidden import HiddenStates, InMemory, OnDisk
from profiler.stream.levels import require_levels
from profiler.stream.memory import StreamMemory, expected_memory, require_disk, require_memory
from profiler.stream.parts import Parts
from profiler.stream.relay import Relay
from profiler.stream.session import StreamSession
from profiler.stream.skeleton import build_skeleton

if TYPE_CHECKING:
    from profiler.corpus import Corpus, TokenBatch


def collect_streamed(
    path: str | Path,
    *,
    corpus: Corpus,
    name: str,
    tokenizer: Any,
    store: str | Path = "runs",
    level: str = "routing",
    resume: bool = False,
    keep_text: bool = True,
    keep_trace: bool = True,
    vectors_per_domain: bool = False,
    router_scores: int = 0,
    similarity_every: int = 16,
    errors_every: int = 16,
    scores_every: int = 1,
    trace_every: int = 1,
    dtype: str = "auto",
    device: str = "auto",
    memory_limit: int | str | None = None,
    scratch: str | Path | None = None,
    progress: ProgressCallback | None = None,
    model_name: str = "",
    revision: str = "",
    settings: Mapping[str, Any] | None = None,
    headline: bool = True,
) -> Path:
    """Run a corpus through a checkpoint of any size and write the run that :func:`profiler.collect.collect` would.

    The embeddings and what else stands around the decoder layers are loaded; of the layers, one at a time. All batches
    go through a layer before the next one is read, and what leaves it waits in memory or on disk. The first batch goes
    through each layer twice, without and with the profiler, and what comes out is compared. A run that was interrupted
    goes on with the layer that it had not finished; if the hidden states were kept in memory, the text first goes
    through the finished layers again, unwatched.

    Args:
        path: folder of a checkpoint in safetensors, not quantized.
        corpus: what :func:`profiler.corpus.open_corpus` gives.
        name: name of the run.
        tokenizer: the model's tokenizer.
        store: directory of runs.
        level: comma list of levels; all but those in :data:`profiler.stream.levels.REFUSED`.
        resume: go on with the interrupted run of that name; the corpus must be the same.
        keep_text: False stores no text and no token ids.
        keep_trace: False keeps the sums alone, which do not grow with the text: no selection token by token.
        vectors_per_domain: see :func:`profiler.collect.collect`.
        router_scores: see :func:`profiler.collect.collect`.
        similarity_every: see :func:`profiler.collect.collect`.
        errors_every: see :func:`profiler.collect.collect`.
        scores_every: see :func:`profiler.collect.collect`.
        trace_every: selections are kept of one of so many sequences, drawn by the same hash.
        dtype: type of the weights; ``auto`` as stored.
        device: where the layers run; ``auto`` is the GPU if there is one.
        memory_limit: what the process may take, as ``3GiB`` or in bytes; what is free now if None. It decides where
            hidden states wait.
        scratch: keep hidden states on disk, in this folder, whatever the limit.
        progress: called after every batch.
        model_name: what the run calls the model.
        revision: revision of the model, to be written into the run.
        settings: further options worth keeping in the run.
        headline: compute the headline metrics at the end.

    Returns:
        The file of the finished run.

    Raises:
        ModelError: no such checkpoint, a quantized one, a family whose layers cannot run alone, or one layer and one
            batch that do not fit into the memory limit, with numbers.
        InputError: a level that cannot be streamed.
        CorpusError: nothing to feed.
        StoreError: the name is taken, or there is nothing to resume.
        RunError: interrupted or failed half-way; finished layers are kept, and the message says how to go on.
    """
    options = RecordingOptions(
        require_levels(level),
        vectors_per_domain,
        router_scores,
        similarity_every,
        errors_every,
        scores_every,
        keep_trace,
        trace_every,
    )
    if not resume:
        run_store.Catalog(store).require_free(name)
    checkpoint, parts = _open_checkpoint(Path(path), dtype, device)
    expected = _expected(checkpoint, parts, corpus, options)
    on_disk = require_memory(expected, memory_limit, scratch is not None)
    peak = expected.peak(on_disk=on_disk)
    checkpoint.load(parts.outside)
    checkpoint.model.tie_weights()
    described = corpus.describe() if hasattr(corpus, "describe") else {}
    streaming = {"hidden_states": "disk" if on_disk else "memory", "expected_bytes": peak}
    session = StreamSession(
        checkpoint.model,
        name=name,
        directory=run_store.located(store),
        options=options,
        tokenizer=tokenizer if keep_text else None,
        resume=resume,
        model_name=model_name or Path(path).name,
        revision=revision,
        settings={**described, **(settings or {}), "layer_stream": streaming},
        expected_bytes=peak,
    )
    require_fitting(session, corpus, 0)
    finished = run_store.lacking_metrics(store, name) if resume and headline else None
    if finished is not None:
        compute_metrics(finished, session, progress)
        return finished
    job = StreamJob(session, corpus, progress)
    job.prepare(checkpoint, parts, expected, on_disk=on_disk, scratch=None if scratch is None else Path(scratch))
    run = job.run()
    if headline:
        compute_metrics(run, session, progress)
    return run


def _open_checkpoint(path: Path, dtype: str, device: str) -> tuple[Checkpoint, Parts]:
    """A checkpoint and its model, of which nothing is loaded yet."""
    automatic = "cuda" if torch.cuda.is_available() else "cpu"
    target = torch.device(automatic if device == "auto" else device)
    model = build_skeleton(path, dtype=dtype, device=target)
    checkpoint = Checkpoint(path, model, target)
    return checkpoint, Parts(model, checkpoint)


def _expected(checkpoint: Checkpoint, parts: Parts, corpus: Corpus, options: RecordingOptions) -> StreamMemory:
    found = inspect_model(checkpoint.model)
    return expected_memory(
        found,
        outside=checkpoint.size(parts.outside),
        layer=max(checkpoint.size(parts.layer(index)) for index in range(len(found.stack))),
        shapes=[batch.input_ids.shape for batch in corpus.batches()],
        options=options,
        domains=len(getattr(corpus, "domains", ["text"])),
        device=checkpoint.device.type,
    )


class StreamJob(Job):
    """One collection, layer by layer."""

    session: StreamSession

    def prepare(
        self, checkpoint: Checkpoint, parts: Parts, expected: StreamMemory, *, on_disk: bool, scratch: Path | None
    ) -> None:
        """Say what is streamed, and where hidden states wait."""
        self.device = checkpoint.device
        self.checkpoint, self.parts = checkpoint, parts
        self.relay = Relay(self.session.found.stack)
        self._expected, self._on_disk, self._scratch = expected, on_disk, scratch

    def _work(self) -> None:
        session, layers = self.session, range(len(self.session.found.stack))
        self.states = self._open_states()
        self._tell(detail=self._expected.sentence(on_disk=self._on_disk))
        self._sample_head()
        with session:
            done = session.layers_done
            if done and not self.states.holds(done):
                for index in range(done):
                    self._repeat(index)
            for index in layers[done:]:
                self._record(index)
        self.states.remove()

    def _open_states(self) -> HiddenStates:
        if not self._on_disk:
            return InMemory()
        folder = self.session.folder if self._scratch is None else self._scratch
        require_disk(folder, 2 * self._expected.hidden)  # of two layers
        return OnDisk(folder / f"{self.session.name}.hidden")

    def _record(self, index: int) -> None:
        """All batches through one layer, watched."""
        with self._loaded(index):
            bare = self._bare_output()
            with self.session.layer(index):
                for number, batch in enumerate(self.corpus.batches()):
                    self._label(batch)
                    self._through(index, number, batch)
                    if number == 0:
                        self._compare_layer(bare, self.relay.left)
                    self.session.end_batch()
                    self._tell()
            self.states.end()

    def _repeat(self, index: int) -> None:
        """All batches through a layer that has been recorded: what left it was lost with the memory it was in."""
        with self._loaded(index):
            for number, batch in enumerate(self.corpus.batches()):
                self._through(index, number, batch)
                self._tell(detail=f"repeating layer {index + 1}, whose output the interrupted run kept in memory")
            self.states.end()

    @contextmanager
    def _loaded(self, index: int) -> Iterator[None]:
        """While entered, the layer's weights are there, and it alone works."""
        names = self.parts.layer(index)
        self._tell(detail=f"reading layer {index + 1} of {len(self.session.found.stack)}")
        self.checkpoint.load(names)
        self.session.bytes_read = self.checkpoint.bytes_read
        model: Any = self.session.model
        self.session.samples |= {name: sample(model.get_parameter_or_buffer(name)) for name in names}
        self.checkpoint.expect(self.parts.layer(index + 1))
        self.states.begin(index)
        try:
            with self.relay.working(index):
                yield
        finally:
            self.checkpoint.unload(names)

    def _through(self, index: int, number: int, batch: TokenBatch) -> None:
        if index:
            self.relay.entering = self.states.get(number).to(self.device)
        self._forward(batch)
        if self.relay.passed_on is not None:
            self.states.put(number, self.relay.passed_on)

    def _bare_output(self) -> Tensor | None:
        """What leaves the layer for the first batch when nobody watches."""
        batch = next(iter(self.corpus.batches()), None)
        if batch is None:
            return None
        if self.relay.current:
            self.relay.entering = self.states.get(0).to(self.device, copy=True)  # a layer may write into it
        self._forward(batch)
        return self.relay.left

    def _compare_layer(self, bare: Tensor | None, watched: Tensor | None) -> None:
        checks = self.session.checks
        if bare is not None and watched is not None:
            checks.unchanged = (checks.unchanged or 0) + differences(bare, watched)

    def _sample_head(self) -> None:
        model: Any = self.session.model
        for name in self.parts.head:
            values = model.get_parameter_or_buffer(name).numel()
            self.session.samples[name] = self.checkpoint.sampled(name, sample_places(values))
