"""``collect(generate=N)``: prompts answered by the model itself, with prompt and decode in one run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from numpy.testing import assert_array_equal
from polars.testing import assert_frame_equal

import profiler
import profiler.collect as collect_module
import store
from app.cli import main
from moescope.errors import InputError, ModelError, RunError
from profiler.corpus import Corpus, open_corpus
from profiler.generation import Sampling, left_padded
from tests.profiler.capture.tiny import build, tokenizer

TABLES = (
    "sequence",
    "sequence_token",
    "vocabulary",
    "route_chunk",
    "expert_load",
    "router_load",
    "router_histogram",
    "expert_output",
    "residual",
)
NEW = 6


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    for name, line in (("code", "def f(x):\n    return x + 1\n"), ("english", "It was a bright cold day in April.\n")):
        rows = [{"text": line[start:] * 2} for start in range(0, 24, 4)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def prompts(texts: Path, **options: Any) -> Corpus:
    return open_corpus([texts], tokenizer=tokenizer(), **{"sequence_length": 48, "batch_size": 4, **options})


def speaking(family: str, *, end: int | None = None, **changes: Any) -> Any:
    """A model that speaks until it has said ``end``."""
    model = build(family, **changes)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = end, 0
    return model


def collect(model: Any, texts: Path, folder: Path, name: str = "tiny", **options: Any) -> store.Run:
    given = options.pop("corpus", None) or prompts(texts)
    options = {"tokenizer": tokenizer(), "headline": False, "generate": NEW, **options}
    return store.open_run(collect_module.collect(model, corpus=given, store=folder, name=name, **options))


@pytest.mark.parametrize(
    ("family", "level"),
    [("olmoe", "routing"), ("deepseek_v3", "routing"), ("gpt_oss", "routing"), ("qwen2_moe", "activations")],
)
def test_the_run_is_that_of_a_watch_around_generate(family: str, level: str, texts: Path, tmp_path: Path) -> None:
    model = speaking(family)
    run = collect(model, texts, tmp_path, level=level)
    with (
        torch.no_grad(),
        profiler.watch(model, store=tmp_path, name="hand", level=level, tokenizer=tokenizer()) as hand,
    ):
        for batch in prompts(texts).batches():
            width = batch.input_ids.shape[1]
            rows = [row[mask == 1] for row, mask in zip(batch.input_ids, batch.attention_mask, strict=True)]
            ids = np.stack([np.concatenate([np.zeros(width - len(row), dtype=np.int64), row]) for row in rows])
            mask = np.stack([np.arange(width) >= width - len(row) for row in rows]).astype(np.int64)
            hand.label(domains=batch.domains, sequences=batch.sequences.tolist(), sources=batch.sources)
            given = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
            model.generate(**given, max_new_tokens=NEW, do_sample=False)
            hand.end_batch()  # what a batch sums up in 32 bits does not reach over its end
    assert hand.path is not None
    expected = store.open_run(hand.path)
    for table in TABLES:
        assert_frame_equal(run.table(table), expected.table(table), check_row_order=False)
    assert run.badge.status == "valid", run.badge.reason
    unchanged = run.table("check").filter(name="outputs unchanged").to_dicts()[0]
    assert (unchanged["status"], unchanged["value"]) == ("pass", 0.0)


@pytest.mark.parametrize("family", ["olmoe", "qwen2_moe", "deepseek_v3", "gpt_oss"])
def test_answers_route_as_if_prompt_and_answer_were_one_text(family: str, texts: Path, tmp_path: Path) -> None:
    model = speaking(family, dtype=torch.float64)
    model.set_experts_implementation("eager")  # the others know no float64
    run, fed = collect(model, texts, tmp_path), prompts(texts)
    lengths = {int(s): int(m.sum()) for b in fed.batches() for s, m in zip(b.sequences, b.attention_mask, strict=True)}
    table = run.table("sequence")
    assert dict(table.select("sequence", "prompt_tokens").iter_rows()) == lengths
    # The last new token of an answer is fed to nothing, so it is never routed.
    assert (table["tokens"] - table["prompt_tokens"]).to_list() == [NEW - 1] * len(lengths)
    assert set(table["domain"]) == {"code", "english"}
    trace = run.selections()
    with torch.no_grad(), profiler.watch(model, store=tmp_path, name="texts") as session:
        for sequence in trace.sequences.tolist():
            text = run.sequence_text(sequence)
            assert text is not None
            session.label(sequences=[sequence])
            logits = model(input_ids=torch.from_numpy(text.token_ids)[None]).logits
            prompt = lengths[sequence]
            assert_array_equal(logits[0, prompt - 1 : -1].argmax(-1), text.token_ids[prompt:])
    assert session.path is not None
    whole = store.open_run(session.path).selections()
    assert_array_equal(trace.ids, whole.ids)


def test_decode_is_counted_apart_from_the_prompt(texts: Path, tmp_path: Path) -> None:
    run, fed = collect(speaking("olmoe"), texts, tmp_path), prompts(texts)
    counted = run.table("router_load").filter(layer=0).group_by("domain", "phase").agg(pl.col("tokens").sum())
    for domain in ("code", "english"):
        rows = [(b, r) for b in fed.batches() for r, name in enumerate(b.domains) if name == domain]
        tokens = {row["phase"]: row["tokens"] for row in counted.filter(domain=domain).to_dicts()}
        assert tokens == {
            "prompt": sum(int(b.attention_mask[r].sum()) for b, r in rows),
            "decode": len(rows) * (NEW - 1),
        }


def test_rows_that_finish_early_are_not_counted_on(texts: Path, tmp_path: Path) -> None:
    free = collect(speaking("olmoe"), texts, tmp_path, "free")
    first = free.sequence_text(0)
    assert first is not None
    prompt = free.table("sequence").filter(sequence=0)["prompt_tokens"][0]
    end = int(first.token_ids[prompt + 2])
    run = collect(speaking("olmoe", end=end), texts, tmp_path, "ended")
    early = 0
    for row in free.table("sequence").iter_rows(named=True):
        text, ended = free.sequence_text(row["sequence"]), run.sequence_text(row["sequence"])
        assert text is not None and ended is not None
        answer = text.token_ids[row["prompt_tokens"] :].tolist()
        expected = answer.index(end) if end in answer else len(answer)
        early += expected < len(answer)
        assert_array_equal(ended.token_ids, text.token_ids[: row["prompt_tokens"] + expected])
    assert early


@pytest.mark.parametrize(("forward", "level"), [(3, "routing"), (NEW + 1, "routing"), (2 * NEW + 4, "activations")])
def test_an_answer_that_was_interrupted_is_given_again(
    forward: int, level: str, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("profiler.capture.session.WRITING_SHARE", float("inf"))  # a shard after every batch
    model, sampling = speaking("qwen2_moe"), Sampling(temperature=1.5, top_p=0.9, seed=7)
    options: dict[str, Any] = {"sampling": sampling, "level": level, "flush_seconds": 0.0}
    whole = collect(model, texts, tmp_path, "whole", **options)
    calls = []

    def interrupt(*_: Any) -> None:
        calls.append(1)
        if len(calls) == NEW + forward:  # the first batch runs once more, without the profiler
            raise KeyboardInterrupt

    handle = model.model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(RunError, match="was interrupted after"):
        collect(model, texts, tmp_path, "parts", **options)
    handle.remove()
    live = store.open_run(tmp_path / "parts.live")
    assert live.progress is not None
    done = live.table("sequence")
    assert len(done) == (forward - 1) // NEW * 4  # whole batches of 4, or nothing
    assert live.progress.tokens == done["tokens"].sum()
    with pytest.raises(InputError, match="begun with generation"):
        collect(model, texts, tmp_path, "parts", **{**options, "sampling": Sampling()}, resume=True)
    with pytest.raises(InputError, match="begun with generation"):
        collect(model, texts, tmp_path, "parts", **options, generate=0, resume=True)
    parts = collect(model, texts, tmp_path, "parts", **options, resume=True)
    for table in TABLES:
        assert_frame_equal(parts.table(table), whole.table(table), check_row_order=False)


def test_draws_follow_the_seed_and_leave_the_global_one_alone(texts: Path, tmp_path: Path) -> None:
    def answers(name: str, **changes: Any) -> list[list[int]]:
        run = collect(model, texts, tmp_path, name, sampling=Sampling(**changes))
        return run.table("sequence_token").sort("sequence", "start")["token_ids"].to_list()

    model = speaking("olmoe")
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    drawn = answers("drawn", temperature=1.0, seed=1)
    assert torch.equal(torch.rand(3), expected)
    assert answers("again", temperature=1.0, seed=1) == drawn
    assert answers("other", temperature=1.0, seed=2) != drawn
    greedy = answers("greedy")
    assert greedy != drawn
    # So little probability that only the likeliest token is left to draw.
    assert answers("narrow", temperature=1.0, top_p=1e-9) == greedy


def test_what_the_checkpoint_suggests_is_overruled(texts: Path, tmp_path: Path) -> None:
    plain = collect(speaking("olmoe"), texts, tmp_path, "plain")
    model = speaking("olmoe")
    model.generation_config.update(do_sample=True, temperature=5.0, top_k=3, num_beams=2)
    run = collect(model, texts, tmp_path, "suggested")
    assert_frame_equal(run.table("sequence_token"), plain.table("sequence_token"))
    assert run.info.settings["generation"] == {"new_tokens": NEW, "temperature": 0.0, "top_p": 1.0, "seed": 0}


def test_the_budget_counts_both_and_progress_reaches_it(texts: Path, tmp_path: Path) -> None:
    told: list[store.Progress] = []
    fed = prompts(texts, token_budget=300, batch_size=1)
    run = collect(speaking("olmoe"), texts, tmp_path, corpus=fed, progress=told.append)
    sizes = [int(batch.attention_mask.sum()) + len(batch.sequences) * (NEW - 1) for batch in fed.batches()]
    assert sum(sizes) > 300
    enough = next(total for total in np.cumsum(sizes) if total >= 300)
    assert run.info.tokens == enough < sum(sizes)
    assert run.info.complete
    assert all(state.token_budget == 300 for state in told)
    unbounded: list[store.Progress] = []
    collect(speaking("olmoe"), texts, tmp_path, "all", progress=unbounded.append)
    assert unbounded[-1].tokens == unbounded[-1].token_budget


def test_padding_moves_to_the_left_and_rows_stay_whole() -> None:
    ids, mask = np.array([[5, 6, 7, 0], [8, 0, 0, 0], [1, 2, 3, 4]]), np.array([[1, 1, 1, 0], [1, 0, 0, 0], [1] * 4])
    moved, where = left_padded(ids, mask)
    assert moved.tolist() == [[0, 5, 6, 7], [0, 0, 0, 8], [1, 2, 3, 4]]
    assert where.tolist() == [[0, 1, 1, 1], [0, 0, 0, 1], [1] * 4]


def test_chats_that_end_with_the_user_are_asked_for_an_answer(tmp_path: Path) -> None:
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    words = tokenizer()
    words.chat_template = template + "{% if add_generation_prompt %}[assistant]{% endif %}"
    asked = [{"role": "user", "content": "why?"}]
    chats = [asked, [*asked, {"role": "assistant", "content": "so"}]]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    for prompt, expected in ((True, "[user]why?[assistant]"), (False, "[user]why?")):
        corpus = open_corpus([path], tokenizer=words, generation_prompt=prompt)
        rows = (row for b in corpus.batches() for row in zip(b.input_ids, b.attention_mask, strict=True))
        fed = {words.decode(ids[mask == 1][1:]) for ids, mask in rows}
        assert fed == {expected, "[user]why?[assistant]so"}


def test_what_cannot_work_is_refused_before_anything_runs(texts: Path, tmp_path: Path) -> None:
    model = speaking("olmoe")
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    with pytest.raises(ModelError, match="sequence length 48 with 500 generated tokens is more than the 512 positions"):
        collect(model, texts, tmp_path, generate=500)
    with pytest.raises(InputError, match="1 generated token leaves nothing to decode"):
        collect(model, texts, tmp_path, generate=1)
    with pytest.raises(ModelError, match="OlmoeModel has no language-model head to generate with"):
        collect(model.model, texts, tmp_path)
    for options, message in (
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": 1.0, "top_p": 0.0}, "top-p is 0.0"),
        ({"top_p": 0.9}, "draws nothing at temperature 0"),
    ):
        with pytest.raises(InputError, match=message):
            Sampling(**options)
    assert not list(tmp_path.glob("*.live"))


def test_the_command_generates(texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    speaking("olmoe").save_pretrained(tmp_path / "checkpoint")
    tokenizer().save_pretrained(tmp_path / "checkpoint")
    words = ["collect", str(tmp_path / "checkpoint"), "--data", str(texts), "--sequence-length", "48", "--name", "told"]
    words += ["--store", str(tmp_path), "--device", "cpu", "--generate", "3", "--temperature", "0.8", "--top-p", "0.9"]
    assert main([*words, "--level", "routing", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["capture"] == "valid"
    run = store.open_run(tmp_path / "told.duckdb")
    assert run.info.settings["generation"] == {"new_tokens": 3, "temperature": 0.8, "top_p": 0.9, "seed": 0}
    assert set(run.table("router_load")["phase"]) == {"prompt", "decode"}
