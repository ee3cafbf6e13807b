"""``moescope recommend`` on the sample model: what is priced, measured, kept and refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

import planner.candidates
import store
from app.cli import main
from app.commands.plan import ENGINES
from app.measuring import measuring, seen_before
from app.telling import Telling
from app.whole_model import whole_model
from compressor.memory import edited
from compressor.plan import Plan
from moescope.errors import ModelError
from planner import engines
from planner.recommendation import Recommendation
from profiler import load_model, load_tokenizer
from profiler.corpus import open_corpus
from profiler.evaluation import divergence

SAMPLE = Path(__file__).parents[2] / "sample_data"
MODEL = SAMPLE / "model"
TEXT = SAMPLE / "texts" / "german.jsonl"
TRIED = ("error_bits", "camera_bits", "frequency_bits", "camera_p", "budgeted_reap")


@pytest.fixture(autouse=True)
def few_presets(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few methods and one mixture: all of them take seconds each time."""
    few = [one for one in planner.candidates.PRESETS if one.name in TRIED]
    monkeypatch.setattr(planner.candidates, "PRESETS", tuple(few))
    monkeypatch.setattr(planner.candidates, "MIXTURES", (("camera_p", "uniform"),))
    monkeypatch.setattr("planner.probing.LAYERS", 1)
    monkeypatch.setattr("planner.probing.WHOLE", 3)
    monkeypatch.setattr(import_module("planner.advice"), "PRICED_ELSEWHERE", 1)
    monkeypatch.setattr("planner.search.CHILDREN", 4)
    monkeypatch.setattr("planner.search.MEASURED", 1)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    shutil.copy(SAMPLE / "runs" / "sample.duckdb", tmp_path)
    return tmp_path


def ask(place: Path, *more: str, model: bool = True) -> list[str]:
    """The command, over two domains unless it says otherwise."""
    return [
        "recommend",
        "sample",
        *([str(MODEL)] if model else []),
        "--store",
        str(place),
        "--domains",
        "german,c",
        *more,
    ]


def answer(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    return dict(json.loads(capsys.readouterr().out))


def kept(place: Path, kind: str = "plan") -> list[Path]:
    return store.list_plans(place / "sample.duckdb", kind)


def bytes_on_disk() -> tuple[int, int]:
    """(all, those of experts) of the sample checkpoint, by the library's own reader."""
    whole = experts = 0
    for file in MODEL.glob("*.safetensors"):
        with safe_open(file, "np") as opened:
            for name in opened.keys():  # noqa: SIM118
                part = opened.get_slice(name)
                size = int(np.prod(part.get_shape())) * {"BF16": 2, "F32": 4}[part.get_dtype()]
                whole += size
                experts += size if "expert" in name else 0
    return whole, experts


def test_the_answer_is_a_recommendation_and_its_best_plan_is_kept(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = place / "best.json"
    assert main(ask(place, "--memory", "6MiB", "-o", str(out), "--json")) == 0
    content = answer(capsys)
    found = Recommendation.of(content)
    assert found.content() == {name: content[name] for name in found.content()}
    whole, experts = bytes_on_disk()
    assert found.bytes_before == whole
    assert found.verdict == "apply" and len(found) > 4
    assert all(whole - experts < one.bytes <= 6 << 20 for one in found.candidates)
    assert [one.score for one in found.candidates] == sorted(one.score for one in found.candidates)
    assert all(one.measurement is None for one in found.candidates)
    (plan,) = kept(place)
    assert Plan.load(plan).digest == Plan.load(out).digest == found[0].digest
    (document,) = kept(place, "recommendation")
    assert Recommendation.of(store.read_plan_document(document)).content() == found.content()


def test_without_the_model_the_budget_is_for_the_experts(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(ask(place, "--memory", "4MiB", model=False)) == 0
    out = capsys.readouterr().out
    assert "9 MiB" in out and "--memory counts the experts alone" in out and "priced from the run's sums" in out
    assert "not measured" in out and "Loading: packed weights" in out
    assert "the best plan is written to" in out


def test_what_fits_is_left_as_it_is(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = place / "best.json"
    assert main(ask(place, "--memory", "12MiB", "-o", str(out))) == 0
    assert "leave it" in capsys.readouterr().out.splitlines()[0]
    assert not kept(place) and not out.exists() and len(kept(place, "recommendation")) == 1


def test_a_size_that_nothing_reaches_names_one_that_is(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(ask(place, "--memory", "2950000", "--json")) == 0
    found = Recommendation.of(answer(capsys))
    assert found.verdict == "leave it" and not found.candidates and not kept(place)
    nearest = int(found.reasons[-1].split("reached is ")[1].split(" bytes")[0].replace(",", ""))
    assert main(ask(place, "--memory", str(nearest), "--json")) == 0
    assert min(one.bytes for one in Recommendation.of(answer(capsys)).candidates) <= nearest


def test_a_quality_that_nothing_keeps_is_an_answer_too(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = place / "best.json"
    assert main(ask(place, "--memory", "5MiB", "--quality", "1e-9", "-o", str(out))) == 0
    lines = capsys.readouterr().out
    assert lines.startswith("leave it") and "more than was allowed" in lines
    assert not kept(place) and not out.exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ((), "how much memory? give --memory 12GiB"),
        (("--memory", "2MiB"), "the weights beside the experts alone take 2,914,560; plans are found from"),
        (("--memory", "5MiB", "--search", "2"), "give MODEL and --data too"),
        (("--memory", "5MiB", "-o", "/nowhere/at/all.json"), "there is no folder /nowhere/at"),
        (("--memory", "5MiB", "--domains", "germann"), "did you mean 'german'?"),
        (("--memory", "5MiB", "--calibration", str(MODEL / "config.json")), "no recommendation and no calibration"),
        (("--memory", "5MiB", "--calibration", "/nowhere.json"), "cannot be read"),
    ],
)
def test_mistakes_end_in_one_line_and_code_2(
    place: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...], message: str
) -> None:
    assert main(ask(place, *more)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("moescope: ") and message in error
    assert not kept(place) and not kept(place, "recommendation")


def test_a_run_whose_checks_failed_is_refused_unless_allowed(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = store.Badge("invalid", "counts differ")
    monkeypatch.setattr(store.Run, "badge", property(lambda _: failed))
    assert main(ask(place, "--memory", "5MiB", model=False)) == 2
    assert "failed (counts differ)" in capsys.readouterr().err
    assert main(ask(place, "--memory", "5MiB", "--allow-invalid", model=False)) == 0


def test_text_without_a_model_is_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(ask(place, "--memory", "5MiB", "--data", str(TEXT), model=False)) == 2
    assert "give the run's MODEL too" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value"), [("--engine", "vllmm"), ("--quality", "-1"), ("--search", "some"), ("--memory", "much")]
)
def test_values_that_cannot_be_are_refused_by_the_parser(
    place: Path, capsys: pytest.CaptureFixture[str], option: str, value: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(ask(place, option, value))
    assert ended.value.code == 2 and option in capsys.readouterr().err.splitlines()[-1]


def test_a_run_that_does_not_say_its_type_is_refused(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("planner.source.TYPE_BYTES", {})
    assert main(ask(place, "--memory", "5MiB", model=False)) == 2
    assert "does not say in which type its weights are" in capsys.readouterr().err


def test_plans_are_measured_on_the_text_and_later_calls_know_of_it(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(SAMPLE.parent)  # as the run names its texts
    text = ["--data", str(TEXT), "--tokens", "300", "--sequence-length", "96"]
    assert main(ask(place, "--memory", "5MiB", *text, "--search", "1", "--finalists", "2", "--json")) == 0
    output = capsys.readouterr()
    content = json.loads(output.out)
    found = Recommendation.of(content)
    assert any("flatters the plans" in note for note in content["notes"])
    assert "measuring 2 of" in output.err and "search, generation 1 of 1" in output.err
    measured = [one for one in found.candidates if one.measurement is not None]
    assert len(measured) > 2 and found.candidates[: len(measured)] == tuple(measured)
    assert any("factors" in one.recipe for one in measured)  # found by the search
    best = found.candidates[0]
    model, small, tokenizer = load_model(MODEL), load_model(MODEL), load_tokenizer(MODEL)
    corpus = open_corpus([str(TEXT)], tokenizer=tokenizer, token_budget=300, sequence_length=96)
    with edited(small, best.plan):
        assert best.measurement is not None
        assert best.measurement.kl == pytest.approx(divergence(small, model, corpus.batches()).kl, rel=1e-3)
    assert found.calibration.count and best.prediction is not None and best.prediction.basis == "measured plans"

    (document,) = kept(place, "recommendation")
    assert main(ask(place, "--memory", "5.5MiB", "--calibration", str(document), "--json")) == 0
    later = Recommendation.of(answer(capsys))
    assert later.calibration == found.calibration
    assert all(one.prediction is None or one.prediction.basis == "measured plans" for one in later.candidates)


def test_an_interruption_keeps_nothing(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> Callable[[Plan], Any]:
        def measure(plan: Plan) -> Any:
            raise KeyboardInterrupt

        return measure

    monkeypatch.setattr("app.measuring.measuring", interrupted)
    wanted = ["--memory", "5MiB", "--data", str(TEXT), "--tokens", "200", "--sequence-length", "96"]
    assert main(ask(place, *wanted)) == 130
    error = capsys.readouterr().err
    assert error.endswith("moescope: interrupted\n") and "Traceback" not in error
    assert not kept(place) and not kept(place, "recommendation")


def test_the_model_is_as_it_was_after_a_measurement(place: Path) -> None:
    import torch

    model, tokenizer = load_model(MODEL), load_tokenizer(MODEL)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    corpus = open_corpus([str(TEXT)], tokenizer=tokenizer, token_budget=200, sequence_length=96)
    with store.open_run(place / "sample.duckdb") as run:
        plan = planner.make(run, preset="error_bits", bits=3.0)
        measure = measuring(run, model, corpus)
        first, second = measure(plan), measure(plan)
    assert first == second and first.kl > 0 and first.tokens == sum(one.tokens for one in first.domains.values())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_the_curve_is_kept_and_its_front_printed(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("planner.curve.SIZES", (0.2, 0.5))
    assert main(ask(place, "--memory", "6MiB", "--curve")) == 0
    out = capsys.readouterr().out
    (document,) = kept(place, "curve")
    content = store.read_plan_document(document)
    points = [(one["bytes"], one["prediction"]["kl"], one["pareto"]) for one in content["candidates"]]
    assert len(points) > 4 and points == sorted(points, key=lambda point: point[0])
    for size, kl, front in points:
        beaten = any((other[0] <= size and other[1] < kl) or (other[0] < size and other[1] <= kl) for other in points)
        assert front != beaten
    assert "sizes that nothing smaller matches" in out and f"the curve is written to {document}" in out


def test_recommendations_are_listed(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(ask(place, "--memory", "6MiB"))
    main(ask(place, "--memory", "12MiB"))
    capsys.readouterr()
    assert main(["show", "sample", "recommendations", "--store", str(place), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert sorted((row["verdict"], row["memory"], row["plan"] is None) for row in rows) == [
        ("apply", "6 MiB", False),
        ("leave it", "12 MiB", True),
    ]


def test_an_engine_gets_what_it_loads(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert set(ENGINES) == set(engines.ENGINES)
    assert main(ask(place, "--memory", "8MiB", "--engine", "vllm", "--json")) == 0
    content = answer(capsys)
    found = Recommendation.of(content)
    steps = [step for one in found.candidates for step in one.plan.steps if step.step == "quantize"]
    assert steps and all(step.granularity == "layer" and step.symmetric for step in steps)
    assert all(one.plan.target.engine == "vllm" for one in found.candidates)
    assert any("moescope has not run them" in note for note in content["notes"])


def test_other_weights_are_read_from_the_headers(place: Path) -> None:
    whole, experts = bytes_on_disk()
    with store.open_run(place / "sample.duckdb") as run:
        assert whole_model(run, str(MODEL)) == (whole - experts, "bfloat16")


def test_checkpoints_that_say_no_size_are_refused(place: Path, tmp_path: Path) -> None:
    packed, small = tmp_path / "packed", tmp_path / "small"
    name = "model.layers.1.mlp.experts.0.down_proj.weight"
    for folder, kind in ((packed, np.int32), (small, np.float32)):
        folder.mkdir()
        shutil.copy(MODEL / "config.json", folder)
        save_file({name: np.zeros((4, 4), kind)}, folder / "model.safetensors")
    with store.open_run(place / "sample.duckdb") as run:
        with pytest.raises(ModelError, match="experts as I32, packed already"):
            whole_model(run, str(packed))
        with pytest.raises(ModelError, match="is it the run's model"):
            whole_model(run, str(small))


def test_text_that_the_run_did_not_read_flatters_nothing(place: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("Something that nobody has read.\n" * 40, encoding="utf-8")
    corpus = open_corpus([str(other)], tokenizer=load_tokenizer(MODEL), token_budget=200, sequence_length=96)
    with store.open_run(place / "sample.duckdb") as run:
        assert seen_before(run, corpus) is None
        run.info.settings["corpus_sha256"] = corpus.sha256
        assert "very text" in str(seen_before(run, corpus))


def test_progress_says_what_is_left_of_a_counted_stage(capsys: pytest.CaptureFixture[str]) -> None:
    now = iter([0.0, 10.0, 20.0, 30.0, 50.0])
    with Telling(clock=now.__next__) as tell:
        tell("pricing")
        tell("measuring 1 of 4 plans")
        tell("measuring 2 of 4 plans")
        tell("measuring finalist 1 of 2: reap")
    lines = [line.strip() for line in capsys.readouterr().err.split("\r")[1:]]
    assert lines == [
        "[10 s] pricing",
        "[20 s] measuring 1 of 4 plans",
        "[30 s, 30 s left of this] measuring 2 of 4 plans",
        "[50 s] measuring finalist 1 of 2: reap",
    ]
