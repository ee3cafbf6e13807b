"""Quantized matrices looked at again: what loads without a word and is wrong does not pass."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import compressor
from compressor.checkpoint import widths
from compressor.checkpoint.widths import WidthReport, check_weights, check_widths
from compressor.memory import edit
from compressor.plan import PARTS, DropLayer, DropStep, ExpertBits, Plan, QuantizeLayer, QuantizeStep
from compressor.sites import find_decoder
from compressor.weights import ExpertWeights
from moescope.errors import ModelError, PlanError, RunError
from tests.compressor import planned
from tests.compressor.apply_cases import slim
from tests.compressor.edit_plans import plan, source
from tests.compressor.edited_models import merging
from tests.compressor.quantize_plans import quantize, tiny

LAYER, EXPERT = 1, 3
MODULE = f"model.layers.{LAYER}.mlp.experts.{EXPERT}"


def relative(found: Tensor, wanted: Tensor) -> float:
    return float(((found - wanted) ** 2).sum().sqrt() / (wanted**2).sum().sqrt())


def one_expert(known: Any, bits: Any, form: Any = "packed") -> Plan:
    unit = ExpertBits(expert=EXPERT, gate=bits, up=bits, down=bits)
    layers = (QuantizeLayer(layer=LAYER, experts=(unit,)),)
    return plan(known, QuantizeStep(method="test", group_size=16, form=form, layers=layers))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp("widths") / "source"
    return tiny("qwen3_moe", folder), folder


@pytest.mark.parametrize("form", ["packed", "dense"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_errors_are_those_of_the_files(model: tuple[Any, Path], tmp_path: Path, form: str, bits: int) -> None:
    wanted = one_expert(source(model[0]), bits, form)
    receipt = compressor.apply(wanted, source=model[1], destination=tmp_path / "out")
    report = receipt.widths
    assert report is not None and report.passed and not report.missing
    state = compressor.load(tmp_path / "out").state_dict()
    gate, up = state[f"model.layers.{LAYER}.mlp.experts.gate_up_proj"][EXPERT].chunk(2)
    down = state[f"model.layers.{LAYER}.mlp.experts.down_proj"][EXPERT]
    dense = load_file(model[1] / "model.safetensors")
    found = {row.part: row for row in report.rows}
    for part, value in (("gate", gate), ("up", up), ("down", down)):
        row = found[part]
        assert row.found == pytest.approx(relative(value, dense[f"{MODULE}.{part}_proj.weight"]), rel=1e-5)
        assert (row.layer, row.expert, row.role, row.bits, row.verdict) == (LAYER, EXPERT, "routed", bits, "ok")
        assert (row.low, row.high) == (0.5 * row.expected, 1.5 * row.expected)
    assert check_widths(tmp_path / "out", model[1], wanted) == report
    # Gaussian weights on our grids lie in the bands that others were measured to have, too.
    published = check_widths(tmp_path / "out", model[1], wanted, published=True)
    assert published.passed and {(row.low, row.high) for row in published.rows} == {widths.PUBLISHED[bits]}  # type: ignore[index]
    content = json.loads(json.dumps(report.content()))
    assert content["passed"] and len(content["rows"]) == 3 and content == json.loads(json.dumps(asdict(report)))


@pytest.mark.parametrize("family", ["deepseek_v3", "mixtral"])
@pytest.mark.parametrize("kind", ["drop", "slim", "merge"])
def test_what_is_cut_as_well_is_held_against_the_cut(tmp_path: Path, family: str, kind: str) -> None:
    built = tiny(family, tmp_path / "source")
    known = source(built)
    layers = [shape.layer for shape in known.layers]
    if kind == "drop":
        steps: Any = (DropStep(method="test", form="per_layer", layers=(DropLayer(layer=layers[-1], experts=(1, 6)),)),)
    elif kind == "slim":
        steps = slim(built, 16)[0].steps
    else:
        steps = merging(known, [(0, 1), (6, 7)], method="aligned").steps
    wanted = quantize(known, *steps, widths=(3, 8), group_size=8) if kind != "merge" else merged(known, steps)
    receipt = compressor.apply(wanted, source=tmp_path / "source", destination=tmp_path / "out")
    assert receipt.widths is not None and receipt.widths.passed
    step = next(step for step in wanted.steps if isinstance(step, QuantizeStep))
    bits = [one.of(part) for layer in step.layers for one in layer.experts for part in PARTS]
    assert len(receipt.widths.rows) == len(bits) - bits.count(None)
    assert {row.bits for row in receipt.widths.rows} >= {3, 8}
    # Against the source alone, slimmed matrices would have other shapes, and merged ones errors of their own.
    row = receipt.widths.rows[0]
    assert row.found < (0.3 if row.bits == 3 else 0.02)


def merged(known: Any, steps: Any) -> Plan:
    layers = tuple(
        QuantizeLayer(layer=shape.layer, experts=(ExpertBits(expert=0, up=3, down=8), ExpertBits(expert=3, gate=8)))
        for shape in known.layers
    )
    return plan(known, *steps, QuantizeStep(method="test", group_size=8, layers=layers))


def _swapped(content: dict[str, Tensor], dense: dict[str, Tensor]) -> None:
    """The bytes of a narrower code, read as those of a wider one."""
    words = content[f"{MODULE}.up_proj.weight_packed"]
    content[f"{MODULE}.up_proj.weight_packed"] = torch.cat([words[:, 1::2], words[:, ::2]], 1).contiguous()


def _left_out(content: dict[str, Tensor], dense: dict[str, Tensor]) -> None:
    for suffix in ("packed", "scale", "zero_point", "shape"):
        del content[f"{MODULE}.up_proj.weight_{suffix}"]
    content[f"{MODULE}.up_proj.weight"] = dense[f"{MODULE}.up_proj.weight"]


def _random(content: dict[str, Tensor], dense: dict[str, Tensor]) -> None:
    _left_out(content, dense)
    name = f"{MODULE}.up_proj.weight"
    content[name] = torch.randn(dense[name].shape, generator=torch.Generator().manual_seed(0)) * dense[name].std()


def _zeros_of_another_width(content: dict[str, Tensor], dense: dict[str, Tensor]) -> None:
    """As a reader does that takes zero points for those of 8 bits: every code is off by a few."""
    name = f"{MODULE}.up_proj.weight_zero_point"
    content[name] = content[name] ^ 0x44444444


def _too_coarse(content: dict[str, Tensor], dense: dict[str, Tensor]) -> None:
    """A grid of 2 bits, stored in place of one of 4."""
    _left_out(content, dense)
    weight = dense[f"{MODULE}.up_proj.weight"]
    scale = weight.abs().amax(1, keepdim=True) / 1.5
    content[f"{MODULE}.up_proj.weight"] = ((weight / scale - 0.5).round() + 0.5) * scale


@pytest.mark.parametrize(
    ("damage", "verdict"),
    [
        (_swapped, "wrong decode"),
        (_left_out, "skipped"),
        (_random, "wrong decode"),
        (_zeros_of_another_width, "outside band"),
        (_too_coarse, "outside band"),
    ],
)
def test_what_is_wrong_is_found(
    model: tuple[Any, Path],
    tmp_path: Path,
    damage: Callable[[dict[str, Tensor], dict[str, Tensor]], None],
    verdict: str,
) -> None:
    wanted = quantize(source(model[0]), widths=(4,))
    compressor.apply(wanted, source=model[1], destination=tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    content = load_file(file)
    damage(content, load_file(model[1] / "model.safetensors"))
    save_file(content, file, {"format": "pt"})
    compressor.load(tmp_path / "out")  # which says nothing
    for published in (False, True):
        report = check_widths(tmp_path / "out", model[1], wanted, published=published)
        wrong = [row for row in report.rows if row.verdict != "ok"]
        assert not report.passed and [(row.layer, row.expert, row.part) for row in wrong] == [(LAYER, EXPERT, "up")]
        assert wrong[0].verdict == verdict
        assert f"1 {verdict}; first the up projection of routed expert {EXPERT} of layer {LAYER}" in report.summary


def test_a_wrong_result_is_not_published(
    model: tuple[Any, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from compressor.checkpoint import packing

    wanted, original, calls = quantize(source(model[0]), widths=(4,)), packing.parts_of, []

    def other(grid: Any) -> Any:
        calls.append(grid)
        parts = original(grid)
        return {**parts, "weight_scale": parts["weight_scale"] * 3} if len(calls) == 5 else parts

    with monkeypatch.context() as patched:
        patched.setattr(packing, "parts_of", other)
        with pytest.raises(RunError, match="1 wrong decode; .* nothing was put at the destination") as caught:
            compressor.apply(wanted, source=model[1], destination=tmp_path / "out")
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()
    receipt = compressor.apply(wanted, source=model[1], destination=tmp_path / "out")  # and is written again
    assert receipt.widths is not None and receipt.widths.passed


def test_loaded_modules_are_checked_by_readers_of_their_own(tmp_path: Path) -> None:
    before, after = tiny("deepseek_v3", tmp_path / "one"), tiny("deepseek_v3", tmp_path / "two")
    wanted = quantize(source(before), widths=(2, 4, "ternary"), form="dense")
    edit(after, wanted)
    sites = [find_decoder(one, wanted.source).sites for one in (before, after)]
    reads = [lambda layer, expert, own=own: own[layer, 0].read(expert) for own in sites]
    report = check_weights(wanted, *reads)  # type: ignore[arg-type]
    assert not report.passed and {row.verdict for row in report.rows} == {"ok"}
    assert report.missing == tuple(f"shared experts of layer {layer}: nobody reads them" for layer in (1, 2))
    assert "2 missing; first shared experts of layer 1" in report.summary
    same = check_weights(wanted, reads[0], reads[0])  # type: ignore[arg-type]
    assert {row.verdict for row in same.rows} == {"skipped"}
    shapes = check_weights(wanted, reads[0], lambda layer, expert: _narrow(reads[1](layer, expert)))  # type: ignore[arg-type]
    assert not shapes.rows and any("instead of [32, 64]" in text for text in shapes.missing)


def _narrow(weights: ExpertWeights) -> ExpertWeights:
    return weights.neurons(torch.arange(weights.width - 1))


def test_weights_that_are_on_the_grid_already() -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 4, (12, 16), generator=generator).float()
    codes[:, 0], codes[:, 1] = 0, 3  # so that the range is that of the grid
    weights = ExpertWeights(up=codes - 1, down=(codes - 1).T.contiguous())
    known = planned.source(hidden_size=16, expert_size=16, gated=False)
    step = QuantizeStep(
        method="test", form="dense", group_size=0, scales="range",
        layers=(QuantizeLayer(layer=1, experts=(ExpertBits(expert=0, up=2),)),),
    )  # fmt: skip
    wanted = plan(known, step)
    report = check_weights(wanted, lambda layer, expert: weights, lambda layer, expert: weights)
    assert report.passed and report.rows[0].expected < 1e-6
    moved = ExpertWeights(up=weights.up * 1.01, down=weights.down)
    assert not check_weights(wanted, lambda layer, expert: weights, lambda layer, expert: moved).passed


def test_one_expert_of_each_is_in_memory(
    model: tuple[Any, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from compressor.checkpoint.layers import ExpertReader

    wanted = quantize(source(model[0]), widths=(4,))
    compressor.apply(wanted, source=model[1], destination=tmp_path / "out")
    alive: list[Any] = []
    most, original = 0, ExpertReader.read

    def counted(self: ExpertReader, reader: Any, expert: int) -> ExpertWeights:
        nonlocal most
        weights = original(self, reader, expert)
        alive.append(weakref.ref(weights))
        most = max(most, sum(one() is not None for one in alive))
        return weights

    monkeypatch.setattr(ExpertReader, "read", counted)
    assert check_widths(tmp_path / "out", model[1], wanted).passed
    assert len(alive) == 2 * 8 * 2 and most <= 3  # the next is read before the last is let go


def test_what_cannot_be_compared(model: tuple[Any, Path], tmp_path: Path) -> None:
    known = source(model[0])
    dropped = plan(known, DropStep(method="test", layers=tuple(DropLayer(layer=n, experts=(1,)) for n in (0, 1))))
    with pytest.raises(PlanError, match="no quantize step"):
        check_widths(model[1], model[1], dropped)
    wanted = one_expert(known, 4)
    content = load_file(model[1] / "model.safetensors")
    content[f"{MODULE}.up_proj.qweight"] = content.pop(f"{MODULE}.up_proj.weight").to(torch.int32)
    (tmp_path / "other").mkdir()
    save_file(content, tmp_path / "other" / "model.safetensors", {"format": "pt"})
    (tmp_path / "other" / "config.json").write_bytes((model[1] / "config.json").read_bytes())
    with pytest.raises(ModelError, match=r"keeps experts in a form that is not read: .*qweight \(I32\)"):
        check_widths(tmp_path / "other", model[1], wanted)
    assert not WidthReport.of((), ("a matrix",)).passed
