"""The entry: every preset on the bundled run, the same bytes again, budgets, and what is refused before any work."""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest

import planner
import store
from compressor.plan import DropStep, MergeStep, Plan, SlimStep, experts_after
from moescope.errors import PlanError
from planner.estimate.parameters import expert_parameters, sizes_after, sizes_before
from planner.presets import DEFAULT_UNIFORM, PRESETS, Preset, find
from tests.app import synthetic
from tests.planner.collected import ROOT, asked, sample


@pytest.fixture(scope="module")
def run() -> Iterator[store.Run]:
    with sample() as opened:
        yield opened


@functools.cache
def _made(name: str) -> Plan:
    """The preset's plan from the bundled run; made once for all tests."""
    with sample() as opened:
        return planner.make(opened, preset=name, **asked(find(name)))  # type: ignore[arg-type]


def _recorded(run: store.Run, preset: Preset) -> bool:
    return not preset.lacking(run.info.levels)


LACKING = {
    "copies": "0 of 96 experts are copies",
}
"""What the sample has not, beside whole levels."""


@pytest.mark.parametrize("preset", PRESETS, ids=lambda one: one.name)
def test_every_preset_plans_or_names_the_level(run: store.Run, preset: Preset) -> None:
    if not _recorded(run, preset):
        with pytest.raises(PlanError, match=f"collect it with --level {preset.wanted}"):
            planner.make(run, preset=preset.name, **asked(preset))  # type: ignore[arg-type]
        return
    if preset.name in LACKING:
        with pytest.raises(PlanError, match=LACKING[preset.name]):
            planner.make(run, preset=preset.name, **asked(preset))  # type: ignore[arg-type]
        return
    plan = _made(preset.name)
    assert Plan.parse(plan.text()) == plan
    assert plan.steps[-1].step == preset.step and (len(plan.steps) == 1 or preset.name == "mc_smoe")
    (evidence,) = plan.evidence
    assert evidence.source == preset.source and evidence.guard
    assert plan.provenance.domains == tuple(run.domains) and plan.provenance.badge == "valid"
    assert plan.provenance.corpus == run.info.settings["corpus_sha256"]
    assert plan.target.preset == preset.name
    assert (plan.target.share, plan.target.bits) == (asked(preset).get("share"), asked(preset).get("bits"))
    if plan.evidence[0].layers:
        assert all(value == float(f"{value:.6g}") for one in evidence.layers for value in one.values)  # type: ignore[str-format]


FROM_SAMPLE = [one for one in PRESETS if one.name not in (*LACKING, "heapr", "sub_moe_truncated")]
"""The sample's run has neither gradients nor moments."""


@pytest.mark.parametrize("preset", FROM_SAMPLE, ids=lambda one: one.name)
def test_every_form_of_every_preset(run: store.Run, preset: Preset) -> None:
    for form in preset.forms:
        if form == "padded":
            with pytest.raises(PlanError, match="olmoe chooses experts without a bias"):
                planner.make(run, preset=preset.name, share=0.25, form=form)
        elif form in ("per_layer", "shared"):
            with pytest.raises(PlanError, match="use engine transformers"):
                planner.make(run, preset=preset.name, share=0.25, form=form, engine="any")
            plan = planner.make(run, preset=preset.name, share=0.25, form=form)
            assert plan.target.engine == "transformers"
            assert plan.estimate.expert_parameters_after == 0.75 * plan.estimate.expert_parameters
        else:
            more = {"widths": [2, 3]} if (form, preset.step) == ("packed", "quantize") else {}
            plan = planner.make(run, preset=preset.name, form=form, **asked(preset), **more)  # type: ignore[arg-type]
            assert plan.steps[0].form == form
            assert form == "packed" or plan.target.engine == "any"


def test_the_same_again_is_the_same_bytes() -> None:
    names = {one.name: asked(one) for one in FROM_SAMPLE}
    first = {name: _made(name).digest for name in names}
    code = (
        "import planner, store\n"
        "run = store.open_run('sample_data/runs/sample.duckdb')\n"
        f"for name, how in {names!r}.items(): print(name, planner.make(run, preset=name, **how).digest)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert dict(line.split() for line in done.stdout.splitlines()) == first


def test_the_default_is_one_of_the_presets(run: store.Run) -> None:
    plan = planner.make(run, share=0.25)
    assert plan.target.preset == planner.DEFAULT == find(planner.DEFAULT).name
    for more in ({"engine": "any"}, {"form": "uniform"}):
        plan = planner.make(run, share=0.25, **more)  # type: ignore[arg-type]
        assert plan.target.preset == DEFAULT_UNIFORM and plan.steps[0].form == "uniform"


def test_importing_planner_loads_little() -> None:
    code = "import sys, planner, planner.presets; print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert {"torch", "transformers", "numpy", "polars", "duckdb"}.isdisjoint(done.stdout.split())


def test_every_layer_loses_its_share(run: store.Run) -> None:
    for share, kept in ((0.0625, 15), (0.25, 12), (0.5, 8), (0.875, 2)):
        after = experts_after(planner.make(run, share=share, form="uniform"))
        assert {len(experts) for experts in after.values()} == {kept}


def test_estimates_are_counted_by_hand(run: store.Run) -> None:
    neuron = 3 * 128
    for preset, after, active in (
        ("reap", 6 * 12 * 128 * neuron, 6 * 2 * 128 * neuron),
        ("width", 6 * 16 * 96 * neuron, 6 * 2 * 96 * neuron),
        ("camera_p", 6 * 16 * 128 * neuron, 6 * 2 * 128 * neuron),
        ("block_influence", 5 * 16 * 128 * neuron, 5 * 2 * 128 * neuron),
    ):
        estimate = planner.make(run, preset=preset, share=0.25).estimate
        assert estimate.expert_parameters == 6 * 16 * 128 * neuron
        assert (estimate.expert_parameters_after, estimate.active_parameters_after) == (after, active)
        assert estimate.bytes_saved == 2 * (estimate.expert_parameters - after)  # bfloat16


@pytest.mark.parametrize(
    ("preset", "options"),
    [
        ("set_search", {}), ("frequency", {"allocation": "budgeted", "engine": "transformers"}), ("m_smoe", {}),
        ("width", {"multiple": 1}), ("width", {"multiple": 16}),
        ("camera_p", {"form": "per_layer", "engine": "transformers", "multiple": 1}),
        ("block_influence", {}),
    ],
)  # fmt: skip
def test_memory_takes_the_smallest_share_that_fits(run: store.Run, preset: str, options: dict[str, Any]) -> None:
    memory = 6_500_000
    plan = planner.make(run, preset=preset, memory=memory, **options)
    size = 2 * plan.estimate.expert_parameters_after
    unit = 2 * plan.estimate.expert_parameters // {"block_influence": 6}.get(preset, 128 if "width" in preset else 16)
    unit = unit * options.get("multiple", 1)
    assert memory - unit < size <= memory
    assert plan.target.memory == memory and plan.target.share is None
    beside = planner.make(run, preset=preset, memory=memory + 5_000, other_weights=5_000, **options)
    assert beside.steps == plan.steps


def test_one_domain_is_planned_for_itself(run: store.Run) -> None:
    whole, german = (
        planner.make(run, preset="reap", share=0.5),
        planner.make(run, preset="reap", share=0.5, domains=["german"]),
    )
    assert whole.steps != german.steps and german.provenance.domains == ("german",)
    assert planner.make(run, preset="reap", share=0.5, domains=run.domains).text() == whole.text()
    both = planner.make(run, preset="frequency", share=0.5, domains=["python", "german"])
    assert both.provenance.domains == ("german", "python")
    assert "Part of each domain's score that stays: german 0." in " ".join(both.evidence[0].notes)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "neither": ({}, "a share to remove or a memory budget: give one of the two"),
    "both": ({"share": 0.25, "memory": 10**7}, "give one of the two"),
    "whole": ({"share": 1.0}, r"share 1 is outside \(0, 1\)"),
    "none": ({"share": 0.0}, r"share 0 is outside \(0, 1\)"),
    "negative": ({"share": -0.5}, r"share -0.5 is outside"),
    "not a number": ({"share": float("nan")}, r"outside \(0, 1\)"),
    "less than one": ({"share": 0.01}, "share 0.01 of 96 experts removes none: ask for at least 0.01042"),
    "less than one of each": ({"share": 0.06, "engine": "any"}, "0.06 of 16 .* none from layer 0: .* 0.0625"),
    "fewer than all can spare": ({"share": 0.95}, "remove 91 of 96 .* can spare 84.* at most 0.875"),
    "fewer than k": ({"share": 0.95, "engine": "any"}, "keep 1 of 16 .* layer 0, which needs 2: .* at most 0.875"),
    "no bytes": ({"memory": 0}, "memory 0 is no number of bytes"),
    "too few bytes": ({"memory": 10**6}, "fits into 1,000,000 bytes: without 14 of 16 experts .* still take 1,179,648"),
    "enough bytes": ({"memory": 10**9}, "the weights take 9,437,184 bytes and fit into 1,000,000,000"),
    "masked bytes": ({"memory": 5 * 10**6, "preset": "camera_p"}, "form masked .*: give a share, or form uniform"),
    "silent blocks": ({"memory": 5 * 10**6, "preset": "moe_blocks"}, "saves no memory: give a share"),
    "preset": ({"share": 0.25, "preset": "reep"}, "no preset 'reep': did you mean 'reap'?"),
    "preset unlike any": ({"share": 0.25, "preset": "zzz"}, "no preset 'zzz': there are budgeted_reap, even_search"),
    "parameter": ({"share": 0.25, "preset": "camera_p", "alpa": 1}, "no parameter 'alpa': did you mean 'alpha'?"),
    "score parameter": ({"share": 0.25, "preset": "reap", "rank": 1}, "score 'reap' has no parameter 'rank'"),
    "no parameter": ({"share": 0.25, "preset": "random", "x": 1}, "no parameter 'x': it takes seed"),
    "domain": ({"share": 0.25, "domains": ["pyton"]}, "no domain 'pyton': did you mean 'python'?"),
    "no domain": ({"share": 0.25, "domains": []}, "no domain is left: name some of arithmetic"),
    "form": ({"share": 0.25, "form": "masked"}, "'budgeted_reap' has no form 'masked': it has per_layer, padded"),
    "engine": ({"share": 0.25, "engine": "tgi"}, "engine 'tgi' is not known: use any, transformers"),
    "guard": ({"share": 0.25, "guard": "on"}, "guard 'on' is not known"),
    "allocation": ({"share": 0.25, "allocation": "fair"}, "allocation 'fair' is not known"),
    "uneven": (
        {"share": 0.25, "allocation": "budgeted", "form": "uniform"}, "which form uniform cannot hold: use form per_l"
    ),
    "uneven for any": ({"share": 0.25, "allocation": "budgeted", "engine": "any"}, "use engine transformers"),
    "mix": ({"share": 0.25, "preset": "reap", "mix": "mean"}, "mix 'mean' is not known"),
    "mixed tokens": (
        {"share": 0.25, "preset": "reap", "mix": "tokens", "domains": ["c", "german"]}, "takes all domains or one"
    ),
    "score of neurons": ({"share": 0.25, "preset": "reap", "score": "camera"}, "'camera' is one per neuron"),
    "threshold": ({"share": 0.25, "preset": "dern", "threshold": 2}, "threshold 2 is no cosine"),
    "copies": ({"share": 0.25, "preset": "copies", "threshold": 0}, r"threshold 0 is outside \(0, 1\]"),
    "multiple": ({"share": 0.25, "preset": "width", "multiple": 0}, "multiple 0 is no number of neurons"),
    "less than a multiple": (
        {"share": 0.3, "preset": "width", "multiple": 64}, "removes none in multiples of 64: ask for at least 0.5"
    ),
    "rank": ({"share": 0.25, "preset": "sub_moe", "rank": 500}, r"rank 500 is outside 1\.\.128"),
    "truncation": ({"share": 0.25, "preset": "sub_moe", "truncation": 1.0}, r"truncation 1 is outside \(0, 1\)"),
    "moments": ({"share": 0.25, "preset": "sub_moe", "rank": 5}, "--level activations,similarity,moments"),
    "layers": ({"share": 0.1, "preset": "block_influence"}, "share 0.1 of 6 layers removes none: ask for at l"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused(run: store.Run, name: str) -> None:
    arguments, sentence = REFUSED[name]
    with pytest.raises(PlanError, match=sentence) as raised:
        planner.make(run, **arguments)
    assert "\n" not in str(raised.value)


def test_live_and_invalid_runs_are_refused(tmp_path: Path) -> None:
    writer = synthetic.live(tmp_path)
    with (
        store.open_run(tmp_path / "growing.live") as growing,
        pytest.raises(PlanError, match="run 'growing' is still being collected"),
    ):
        planner.make(growing, preset="frequency", share=0.25)
    failed = {"name": ["layers_seen"], "status": ["fail"], "detail": ["layer 2 was not seen"]}
    writer.write_shard({"check": pl.DataFrame(failed)})
    with store.open_run(writer.finish(seconds=1.0)) as invalid:
        assert invalid.badge.status == "invalid"
        with pytest.raises(PlanError, match=r"checks of run 'growing' failed \(layers_seen: layer 2 was not seen\)"):
            planner.make(invalid, preset="frequency", share=0.25)
        plan = planner.make(invalid, preset="frequency", share=0.25, allow_invalid=True)
        assert plan.provenance.badge == "invalid"


def test_runs_without_the_tables_are_refused(tmp_path: Path) -> None:
    """Imports say level routing; a run may also say a level and lack its tables."""
    with store.open_run(synthetic.finished(tmp_path, metrics=False, activations=False)) as run:
        with pytest.raises(PlanError, match="recorded at level routing, and preset 'reap' needs activations"):
            planner.make(run, preset="reap", share=0.25)
        with pytest.raises(PlanError, match=r"has no expert_pair.logit_products: collect it with --level routing"):
            planner.make(run, preset="m_smoe", share=0.25)
        plan = planner.make(run, preset="frequency", share=0.25)
        assert plan.estimate.layer_error is None
        assert not plan.evidence[0].guard and "no expert outputs (level activations)" in plan.evidence[0].notes[-1]
    with (
        store.open_run(synthetic.finished(tmp_path, "rich", metrics=False)) as run,
        pytest.raises(PlanError, match="has no expert_pair.output_products: collect it with --level activations"),
    ):
        planner.make(run, preset="set_search", share=0.25)


def test_a_run_that_does_not_know_its_model_is_refused(tmp_path: Path) -> None:
    writer = store.RunWriter.create(tmp_path, "imported", store.RunInfo(model="toy", origin="import counts"))
    key = {"layer": 0, "step": 0}
    load = {**key, "expert": 0, "kind": "routed", "domain": "text", "phase": "prompt", "tokens": 3}
    writer.write_shard(
        {
            "layer": pl.DataFrame([{**key, "num_experts": 4, "top_k": 1}]),
            "expert_load": pl.DataFrame([load]),
            "router_load": pl.DataFrame([{**key, "domain": "text", "phase": "prompt", "tokens": 3}]),
        }
    )
    with (
        store.open_run(writer.finish(seconds=1.0)) as run,
        pytest.raises(PlanError, match="does not know the width of the experts of layer 0: import it with the model's"),
    ):
        planner.make(run, preset="frequency", share=0.25)


def test_sizes_follow_the_steps(run: store.Run) -> None:
    plan = planner.make(run, preset="reap", share=0.25)
    assert expert_parameters(plan.source, sizes_before(plan.source)) == plan.estimate.expert_parameters
    padded = plan.model_copy(
        update={"steps": (DropStep(method="reap", form="padded", layers=plan.steps[0].layers[:3]),)}  # type: ignore[arg-type]
    )
    assert {size.experts for size in sizes_after(padded).values()} == {16}  # three layers keep all, so all store 16
    assert isinstance(planner.make(run, preset="m_smoe", share=0.25).steps[0], MergeStep)
    assert isinstance(planner.make(run, preset="width", share=0.25).steps[0], SlimStep)
