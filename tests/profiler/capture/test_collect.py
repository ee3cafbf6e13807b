"""``collect``, ``load_model`` and ``load_tokenizer``: from text to a run, interrupted, resumed, and refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.testing import assert_array_equal
from polars.testing import assert_frame_equal

import profiler
import profiler.collect as collect_module
import store
from moescope.errors import CorpusError, InputError, ModelError, RunError, StoreError
from profiler.corpus import Corpus, open_corpus
from tests.profiler.capture.tiny import build, tokenizer

STATISTICS = (
    "layer",
    "sequence",
    "sequence_token",
    "vocabulary",
    "route_chunk",
    "expert_load",
    "router_load",
    "router_histogram",
    "expert_output",
    "neuron_activation",
    "residual",
)


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "code.txt").write_text("def f(x):\n    return x + 1\n\n" * 40)
    (folder / "english.txt").write_text("It was a bright cold day in April.\n\n" * 40)
    return folder


def corpus(texts: Path, **options: Any) -> Corpus:
    settings = {"sequence_length": 64, "batch_size": 4, "token_budget": 1200, **options}
    return open_corpus([texts / "code.txt", texts / "english.txt"], tokenizer=tokenizer(), **settings)


def collect(model: Any, texts: Path, folder: Path, name: str = "tiny", **options: Any) -> Path:
    given = options.pop("corpus", None) or corpus(texts)
    return collect_module.collect(
        model, corpus=given, store=folder, name=name, tokenizer=tokenizer(), headline=False, **options
    )


def interrupt_after(batches: int) -> Callable[[store.Progress], None]:
    seen: list[store.Progress] = []

    def progress(state: store.Progress) -> None:
        seen.append(state)
        if len(seen) == batches:
            raise KeyboardInterrupt

    return progress


def test_a_corpus_becomes_a_run(texts: Path, tmp_path: Path) -> None:
    model, told = build("olmoe"), []
    path = collect(model, texts, tmp_path, progress=told.append)
    run, fed = store.open_run(path), corpus(texts)
    assert run.badge.status == "valid", run.badge.reason
    assert run.info.origin == "collect"
    assert run.info.tokens == fed.num_tokens == 1200
    assert sorted(run.domains) == ["code", "english"]
    unchanged = run.table("check").filter(name="outputs unchanged").to_dicts()[0]
    assert (unchanged["status"], unchanged["value"]) == ("pass", 0.0)
    assert told[-1].tokens == told[-1].token_budget == 1200
    assert told[-1].seconds_left == 0
    assert run.info.settings["sequence_length"] == 64
    assert run.info.text_kept
    text = run.sequence_text(0)
    assert text is not None
    assert text.pieces[0] == b"<s>"
    assert text.special[0]
    first = next(iter(fed.batches(skip=set())))
    place = int(np.flatnonzero(first.sequences == 0)[0]) if 0 in first.sequences else None
    if place is not None:
        assert_array_equal(text.token_ids, first.input_ids[place][first.attention_mask[place] == 1])


def test_interrupted_and_resumed_equals_uninterrupted(texts: Path, tmp_path: Path) -> None:
    model = build("qwen2_moe")
    whole = store.open_run(collect(model, texts, tmp_path, "whole", level="activations"))
    with pytest.raises(RunError, match=r"'parts' was interrupted after [\d,]+ of 1,200 tokens; .* --resume"):
        collect(model, texts, tmp_path, "parts", level="activations", progress=interrupt_after(2), flush_seconds=0)
    live = store.open_run(tmp_path / "parts.live")
    assert live.progress is not None
    assert live.progress.state == "interrupted"
    assert 0 < live.table("sequence")["tokens"].sum() < 1200
    with pytest.raises(StoreError, match="--resume"):
        collect(model, texts, tmp_path, "parts", level="activations")
    with pytest.raises(RunError):
        collect(model, texts, tmp_path, "parts", level="activations", progress=interrupt_after(1), resume=True)
    parts = store.open_run(collect(model, texts, tmp_path, "parts", level="activations", resume=True))
    for table in STATISTICS:
        # Batches are summed in 32 bits before they are added in 64; sums that cancel show it.
        assert_frame_equal(parts.table(table), whole.table(table), check_row_order=False, rel_tol=1e-5, abs_tol=1e-4)
    assert parts.badge.status == "valid"
    assert parts.info.complete
    assert parts.info.seconds > 0


def test_resuming_with_something_else_is_refused(texts: Path, tmp_path: Path) -> None:
    model = build("olmoe")
    with pytest.raises(RunError):
        collect(model, texts, tmp_path, progress=interrupt_after(1))
    with pytest.raises(InputError, match="another corpus"):
        collect(model, texts, tmp_path, resume=True, corpus=corpus(texts, token_budget=600))
    with pytest.raises(InputError, match="begun with another model"):
        collect(build("mixtral"), texts, tmp_path, resume=True)
    with pytest.raises(InputError, match="begun with level 'routing'"):
        collect(model, texts, tmp_path, resume=True, level="activations")
    with pytest.raises(StoreError, match="nothing to resume"):
        collect(model, texts, tmp_path, "other", resume=True)


def test_a_model_that_fails_keeps_what_was_recorded(texts: Path, tmp_path: Path) -> None:
    model = build("olmoe")
    calls = []

    def fail(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 4:
            raise ValueError("cosmic ray")

    handle = model.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(RunError, match=r"failed \(ValueError: cosmic ray\)"):
        collect(model, texts, tmp_path)
    handle.remove()
    run = store.open_run(collect(model, texts, tmp_path, resume=True))
    assert run.info.tokens == 1200


def test_without_text_neither_text_nor_ids_are_stored(texts: Path, tmp_path: Path) -> None:
    run = store.open_run(collect(build("olmoe"), texts, tmp_path, keep_text=False))
    assert not run.info.text_kept
    assert run.table("sequence_token").is_empty()
    assert run.table("vocabulary").is_empty()
    assert run.sequence_text(0) is None


def test_without_a_trace_every_sum_is_the_same(texts: Path, tmp_path: Path) -> None:
    model, options = build("olmoe"), {"level": "routing,activations", "router_scores": 4}
    with_trace = store.open_run(collect(model, texts, tmp_path, "whole", **options))
    run = store.open_run(collect(model, texts, tmp_path, "sums", keep_trace=False, **options))
    assert with_trace.has_trace and not run.has_trace
    assert run.info.settings["recording"]["keep_trace"] is False
    assert run.badge.status == "valid", run.badge.reason
    for table in (*STATISTICS, "score_chunk", "expert_pair", "expert_part"):
        expected = with_trace.table(table) if table != "route_chunk" else with_trace.table(table).clear()
        assert_frame_equal(run.table(table), expected, rel_tol=1e-12)
    with pytest.raises(InputError, match="other options"):
        interrupted(model, texts, tmp_path, **options)


def interrupted(model: Any, texts: Path, folder: Path, **options: Any) -> None:
    """Begin without a trace, stop, and go on with one."""
    with pytest.raises(RunError, match="interrupted"):
        collect(model, texts, folder, "cut", keep_trace=False, progress=interrupt_after(2), **options)
    collect(model, texts, folder, "cut", resume=True, **options)


def test_overhead_is_measured_on_request(texts: Path, tmp_path: Path) -> None:
    run = store.open_run(collect(build("olmoe"), texts, tmp_path, measure_overhead=True))
    overhead = run.info.settings["overhead"]
    assert overhead["low"] <= overhead["value"] <= overhead["high"]
    assert overhead["level"] == "routing"
    assert run.info.tokens == 1200


def test_the_model_is_left_in_the_mode_it_was_in(texts: Path, tmp_path: Path) -> None:
    model = build("olmoe").train()
    collect(model, texts, tmp_path)
    assert model.training


def test_what_cannot_work_is_refused_before_anything_runs(texts: Path, tmp_path: Path) -> None:
    model = build("olmoe")
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    long = corpus(texts, sequence_length=1024, token_budget=2048)
    with pytest.raises(ModelError, match="sequence length 1024 is more than the 512 positions"):
        collect(model, texts, tmp_path, corpus=long)
    (tmp_path / "tiny.duckdb").touch()
    with pytest.raises(StoreError, match="already has a run"):
        collect(model, texts, tmp_path)

    class Empty:
        num_tokens = 0

    with pytest.raises(CorpusError, match="no tokens"):
        collect(model, texts, tmp_path, "empty", corpus=Empty())
    small = build("olmoe", vocab_size=16)
    with pytest.raises(ModelError, match="token id .* but the model knows 16 tokens"):
        collect(small, texts, tmp_path, "vocabulary")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    build("olmoe").save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def test_a_checkpoint_loads_and_keeps_its_fingerprint(checkpoint: Path) -> None:
    from profiler.capture.provenance import fingerprint

    model = profiler.load_model(checkpoint, device="cpu")
    assert not model.training
    assert len(profiler.load_tokenizer(checkpoint)) == len(tokenizer())
    assert fingerprint(model) == fingerprint(build("olmoe"))
    with torch.no_grad():
        model.model.layers[0].mlp.experts.down_proj += 1
    assert fingerprint(model) != fingerprint(build("olmoe"))


def test_checkpoints_that_do_not_load_are_one_line(checkpoint: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    with pytest.raises(ModelError, match="is no folder with a checkpoint"):
        profiler.load_model(tmp_path / "nothing")
    (tmp_path / "hollow").mkdir()
    with pytest.raises(ModelError, match="cannot be loaded") as caught:
        profiler.load_model(tmp_path / "hollow")
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="dtype 'int4' is not known"):
        profiler.load_model(checkpoint, dtype="int4")
    file = checkpoint / "model.safetensors"
    weights = load_file(file)
    weights.pop("model.norm.weight")
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 weights, such as model\.norm\.weight"):
        profiler.load_model(checkpoint)
    (checkpoint / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match="the tokenizer of .* cannot be loaded"):
        profiler.load_tokenizer(checkpoint)
    file.unlink()
    with pytest.raises(ModelError, match="cannot be loaded"):
        profiler.load_model(checkpoint)


def test_code_of_a_checkpoint_is_never_run(checkpoint: Path) -> None:
    import json

    config = json.loads((checkpoint / "config.json").read_text())
    config.update(model_type="unheard_of", auto_map={"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"})
    (checkpoint / "config.json").write_text(json.dumps(config))
    (checkpoint / "code.py").write_text("raise SystemExit('code of the checkpoint ran')")
    with pytest.raises(ModelError, match="never runs code that comes with a checkpoint"):
        profiler.load_model(checkpoint)


def test_a_trace_of_some_sequences_is_that_part_of_the_whole(texts: Path, tmp_path: Path) -> None:
    model = build("olmoe")
    whole = store.open_run(collect(model, texts, tmp_path, "whole", router_scores=4))
    part = store.open_run(collect(model, texts, tmp_path, "part", router_scores=4, trace_every=3, scores_every=6))
    kept = [number for number in whole.table("sequence")["sequence"] if bool(store.in_every(np.int64(number), 3))]
    assert part.traced_sequences["sequence"].to_list() == kept and 0 < len(kept) < whole.info.sequences
    assert part.table("route_chunk")["sequence"].unique().sort().to_list() == kept
    assert set(part.scored_sequences["sequence"]) <= set(kept)
    for table in STATISTICS:
        if table != "route_chunk":
            assert_frame_equal(part.table(table), whole.table(table), rel_tol=1e-12)
    assert_array_equal(part.selections().ids, whole.selections(sequences=kept).ids)
    one = part.layer_selections(layer=1, weights=True)
    assert_array_equal(one.ids, whole.layer_selections(layer=1, sequences=kept).ids)
    assert one.sequences.tolist() == kept
    left_out = next(number for number in whole.table("sequence")["sequence"] if number not in kept)
    assert part.stretch(left_out).num_tokens == 0
    with pytest.raises(InputError, match="--scores-every 3"):
        collect(model, texts, tmp_path, "vain", router_scores=4, trace_every=3)
