"""Collections that are killed: what shards held is kept, readers never see half a shard, and resuming ends equal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import profiler.collect as collect_module
import store
from moescope.errors import MoescopeError, StoreError
from profiler.capture import session
from profiler.corpus import open_corpus
from store import live
from tests.faults.equality import differences
from tests.faults.killing import Say
from tests.faults.subject import names
from tests.profiler.capture.tiny import build, tokenizer

NAME = "killed"


class Collecting:
    """``collect`` of a tiny model with a shard after every batch, its compaction, and its metrics."""

    name = "collect"

    def __init__(self, shared: Path) -> None:
        self._text, self._whole = shared / "text.txt", shared / "whole"
        shared.mkdir(parents=True, exist_ok=True)
        # A shard after every forward, always: forwards that share one are added up in 32 bits before they meet others.
        session.WRITING_SHARE, session.LOSS_SHARE = float("inf"), 0.0
        self._text.write_text("It was a bright cold day in April.\n\ndef f(x):\n    return x + 1\n\n" * 8)
        self._model = build("olmoe", num_hidden_layers=2)
        self._tokenizer = tokenizer()

    def prepare(self, folder: Path) -> None:
        self._collect(self._whole, resume=False)

    def begin(self, folder: Path) -> None:
        folder.mkdir()

    def work(self, folder: Path, say: Say) -> None:
        write = store.RunWriter.write_shard

        def reported(writer: store.RunWriter, frames: Any) -> Path | None:
            path = write(writer, frames)
            if path is not None and "sequence" in frames:
                say([int(number) for number in frames["sequence"]["sequence"]])
            return path

        store.RunWriter.write_shard = reported  # type: ignore[method-assign]
        self._collect(folder, resume=self._resumes(folder))

    def stage(self, folder: Path) -> str:
        found, shards = names(folder), live.shards(folder / f"{NAME}.live")
        if f"{NAME}.derived.duckdb" in found:
            return "metrics written"
        if f"{NAME}.duckdb" in found:
            return "run file there" + (", shards not yet gone" if f"{NAME}.live" in found else "")
        if any(name.endswith(".tmp") and ".duckdb" in name for name in found):
            return "compacting"
        return f"{min(len(shards), 5)}{'+' if len(shards) > 5 else ''} shards" if f"{NAME}.live" in found else "nothing"

    def look(self, folder: Path, said: Sequence[Any]) -> list[str]:
        committed = {number for numbers in said for number in numbers}
        try:
            entries = store.Catalog(folder).entries()
            runs = [store.open_run(entry.path) for entry in entries]
        except MoescopeError as error:
            return [f"lost: {len(committed)} committed sequences: {error}"] if committed else []
        told = []
        held = set(runs[0].table("sequence")["sequence"].to_list()) if runs else set()
        if committed - held:
            told.append(f"lost: {len(committed - held)} of {len(committed)} committed sequences")
        for run in runs:
            told += _half_shards(run)
            run.close()
        return told

    def again(self, folder: Path) -> list[str]:
        try:
            self._collect(folder, resume=self._resumes(folder))
        except StoreError as error:
            if "is finished" not in str(error):
                raise
        told = [f"left behind: {name}" for name in names(folder) if name not in names(self._whole)]
        return told + differences(folder / f"{NAME}.duckdb", self._whole / f"{NAME}.duckdb")

    def _resumes(self, folder: Path) -> bool:
        return any(name.startswith(NAME) for name in names(folder))

    def _collect(self, folder: Path, *, resume: bool) -> None:
        corpus = open_corpus([self._text], tokenizer=self._tokenizer, sequence_length=32, batch_size=3)
        collect_module.collect(
            self._model, corpus=corpus, store=folder, name=NAME, tokenizer=self._tokenizer, level="activations",
            resume=resume, flush_seconds=0.0,
        )  # fmt: skip


def _half_shards(run: store.Run) -> list[str]:
    """Tables of which a reader sees another part than of the others."""
    sequences = run.table("sequence")
    tokens, layers = int(sequences["tokens"].sum()), len(run.layers)
    if not tokens:
        return []
    top_k = run.layers[0].top_k
    seen = {
        "expert_load": (int(run.table("expert_load")["tokens"].sum()), tokens * layers * top_k),
        "router_load": (int(run.table("router_load")["tokens"].sum()), tokens * layers),
        "expert_output": (int(run.table("expert_output")["tokens"].sum()), tokens * layers * top_k),
        "route": (run.query("select count(*) from route").item(), tokens * layers * top_k),
        "sequence_token": (
            run.query("select coalesce(sum(len(token_ids)), 0)::bigint from sequence_token").item(), tokens,
        ),
    }  # fmt: skip
    return [f"half a shard: {name} has {one}, not {two}" for name, (one, two) in seen.items() if one != two]
