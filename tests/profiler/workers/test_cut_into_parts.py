"""The cut of a corpus into parts, a worker by itself, and what is refused: all without Ray."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import polars as pl
import pytest
import torch

import store
from moescope.errors import InputError, ModelError, RunError
from profiler.capture.levels import RecordingOptions, parse_levels
from profiler.corpus import Corpus, open_corpus
from profiler.workers.crew import Lost
from profiler.workers.entry import agreed_part_tokens, require_equal
from profiler.workers.job import WorkersJob
from profiler.workers.parts import FEWEST_TOKENS, MOST_TOKENS, cut, default_part_tokens
from profiler.workers.verdicts import merged
from profiler.workers.worker import CorpusFacts, Order, Report, Work, Worker
from tests.profiler.capture.tiny import build, tokenizer


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("def f(x):\n    return x + 1\n\nIt was a bright cold day in April.\n\n" * 30)
    return path


def corpus(text: Path, **options: Any) -> Corpus:
    return open_corpus([text], tokenizer=tokenizer(), **{"sequence_length": 32, "batch_size": 3, **options})


def order(text: Path, load: Any, level: str = "routing") -> Order:
    given = corpus(text)
    facts = CorpusFacts(given.num_tokens, given.num_sequences, given.domains, given.options)
    recording = RecordingOptions(levels=parse_levels(level))
    return Order(load, tokenizer(), recording, facts, 200, {"name": "tiny", "settings": given.describe()})


def test_parts_are_runs_of_whole_batches_and_depend_on_the_corpus_alone(text: Path) -> None:
    given = corpus(text)
    parts = cut(given, 200)
    fed = [batch.sequences.tolist() for batch in given.batches()]
    assert [list(batch) for part in parts for batch in part.batches] == fed
    assert [part.number for part in parts] == list(range(len(parts)))
    assert len(parts) > 3
    for part in parts:
        lengths = [int(given.batch(list(batch)).attention_mask.sum()) for batch in part.batches]
        assert sum(lengths) == part.tokens
        assert part is parts[-1] or sum(lengths) >= 200 > sum(lengths[:-1])
    assert cut(corpus(text), 200) == parts
    left = parts[1].without(parts[1].batches[0])
    assert left.batches == parts[1].batches[1:] and left.number == 1
    with pytest.raises(InputError, match="part-tokens is 0"):
        cut(given, 0)


def test_part_tokens_follow_the_corpus_or_the_run_that_goes_on() -> None:
    assert default_part_tokens(10_000) == FEWEST_TOKENS
    assert default_part_tokens(64 * 20_000) == 20_000
    assert default_part_tokens(10**11) == MOST_TOKENS
    assert agreed_part_tokens("run", None, {"part_tokens": 77}, 10**6) == 77
    assert agreed_part_tokens("run", 50, {}, 10**6) == 50
    with pytest.raises(InputError, match="begun with --part-tokens 77"):
        agreed_part_tokens("run", 50, {"part_tokens": 77}, 10**6)


def test_what_depends_on_several_parts_is_refused_by_name(text: Path) -> None:
    with pytest.raises(InputError, match="--generate and --tokens"):
        require_equal(corpus(text, token_budget=400), RecordingOptions(), 8)
    require_equal(corpus(text), RecordingOptions(), 8)
    many = SimpleNamespace(num_tokens=10**6, num_sequences=1000)
    with pytest.raises(InputError, match="--errors-every 136 or more"):
        require_equal(cast(Any, many), RecordingOptions(levels=("routing", "errors")), 0)
    require_equal(cast(Any, many), RecordingOptions(levels=("routing", "errors"), errors_every=136), 0)


def record(worker: Worker, number: int, text: Path, folder: Path, staging: str = "") -> list[Report]:
    given = corpus(text)
    part = cut(given, 200)[number]
    batches = [given.batch(list(batch)) for batch in part.batches]
    return list(worker.record(Work(number, number, batches, str(folder), staging)))


def test_a_part_recorded_twice_counts_once_and_is_the_same_whatever_came_before(text: Path, tmp_path: Path) -> None:
    first, second = (Worker(order(text, partial(build, "olmoe"), "activations,similarity")) for _ in range(2))
    one, other = first.load(), second.load()
    assert one.info["model_fingerprint"] == other.info["model_fingerprint"] != ""
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        folder.mkdir()
    for number in (0, 1, 2):
        reports = record(first, number, text, folders[0])
        assert reports[-1].done and reports[-1].tokens == cut(corpus(text), 200)[number].tokens
        assert {row["status"] for row in reports[-1].checks} <= {"pass", "skipped"}
    before = {file: file.read_bytes() for file in folders[0].rglob("*.parquet")}
    for number in (2, 0):
        record(second, number, text, folders[1])
        assert record(second, number, text, folders[0])[-1].done  # a worker that was lost, and was not
    assert {file: file.read_bytes() for file in folders[0].rglob("*.parquet")} == before
    assert store.shard_target(str(folders[0])).numbers() == {0, 1, 2}
    assert not list(folders[0].glob(".*"))
    for file in folders[1].rglob("*.parquet"):
        other = folders[0] / file.relative_to(folders[1])
        assert pl.read_parquet(file).equals(pl.read_parquet(other)), file
    of_model = {"expert_weight", "router_row", "expert_weight_similarity"}
    assert of_model <= {file.stem for file in (folders[1] / "shard-000000").iterdir()}
    assert not of_model & {file.stem for file in (folders[1] / "shard-000002").iterdir()}


def test_what_goes_wrong_in_a_worker_is_one_line_that_says_what_to_do(text: Path, tmp_path: Path) -> None:
    def exhausted() -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    def absent() -> Any:
        raise ModelError("no such folder: /models/x")

    with pytest.raises(ModelError, match="no such folder"):
        Worker(order(text, absent)).load()
    with pytest.raises(RunError, match="ran out of memory in loading the model: use a smaller --batch-size, or fewer"):
        Worker(order(text, exhausted)).load()
    worker = Worker(order(text, partial(build, "olmoe")))
    worker.load()
    with pytest.raises(RunError, match="does not see .*: give --store a folder that all nodes share"):
        record(worker, 0, text, tmp_path, str(tmp_path / "elsewhere"))
    with pytest.raises(RunError, match=r"the worker on .*, part 0: .* cannot be written"):
        record(worker, 0, text, text / "no-folder")
    assert worker._job is not None
    handle = worker._job.session.model.model.register_forward_pre_hook(lambda *_: exhausted())
    with pytest.raises(RunError, match=r"ran out of memory in part 1, a batch of 3x32: use a smaller --batch-size"):
        record(worker, 1, text, tmp_path)
    handle.remove()
    assert not list(tmp_path.glob("shard-*")) and not list(tmp_path.glob(".shard-*"))


def test_a_part_that_costs_three_workers_is_named(text: Path) -> None:
    given = corpus(text)
    parts = cut(given, 200)
    asked = order(text, None)
    job = WorkersJob(cast(Any, SimpleNamespace(workers=2)), asked, given, parts, Path(), None, 200, None)
    lost = Lost("The actor died: its process was killed by the node's OOM monitor")
    for _ in range(2):
        job._count_loss(parts[1], lost)
    job._count_loss(parts[0], lost)
    with pytest.raises(
        RunError, match=r"part 1 \(sequences \d+, .*\) has cost 3 workers .*short of memory.*--batch-size"
    ):
        job._count_loss(parts[1], lost)


def test_verdicts_of_workers_are_as_many_as_those_of_one() -> None:
    def row(name: str, status: str, value: float | None, detail: str, layer: int | None = 0) -> dict[str, Any]:
        return {"name": name, "layer": layer, "step": layer, "status": status, "value": value, "tolerance": 0.0,
                "detail": detail}  # fmt: skip

    one = [row("ids", "pass", 0, "0 of 10"), row("other experts", "skipped", None, "a", None),
           row("other experts", "skipped", None, "b", None)]  # fmt: skip
    two = [row("ids", "fail", 3, "3 of 20"), *one[1:]]
    three = [row("ids", "fail", np.nan, "nan"), *one[1:]]
    table = merged([one, two])
    assert len(table) == 3
    assert table.row(0, named=True)["status"] == "fail"
    assert table.row(0, named=True)["detail"] == "3 of 20 (one of 2 workers)"
    assert table["detail"].to_list()[1:] == ["a", "b"]
    assert merged([one, three, two]).row(0, named=True)["detail"].startswith("nan")
    assert merged([one]).to_dicts() == pl.DataFrame(one, schema=table.schema).to_dicts()
    assert merged([]).is_empty()
