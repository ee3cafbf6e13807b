"""Level ``errors`` against experts whose weights were replaced by those of the grids, every other gate weight zero."""

from __future__ import annotations

import copy
import json
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from numpy.testing import assert_allclose
from polars.testing import assert_frame_equal
from torch import Tensor, nn

import profiler
import store
from compressor.edits.quantize import to_grid
from compressor.plan import BITS, Bits, QuantizeStep, group_size_for
from moescope.errors import ModelError
from profiler.capture.discovery import MoELayer
from profiler.capture.levels import RecordingOptions
from profiler.capture.session import WatchSession
from profiler.collect import collect
from profiler.inspect import memory
from profiler.recorders import expert_errors
from profiler.recorders.similarity import in_sample
from profiler.stream import collect_streamed
from tests.profiler.capture.test_memory import Texts, held_bytes
from tests.profiler.capture.tiny import CONFIGS, Calls, batch, build, output_of, recorded_calls, tokenizer

DOMAINS = [["code", "code", "code"], ["german", "code", "german"]]
BATCHES = [batch(seed=1), batch(seed=2, padding="left")]
EVERY = 2
KEYS = ["layer", "step", "expert", "kind", "part", "domain", "phase"]
FAMILIES = (
    "olmoe",
    "qwen3_moe",
    "mixtral",
    "gpt_oss",  # transposed, interleaved, biases, clamps
    "deepseek_v3",  # shared experts
    "qwen2_moe",  # shared experts with a gate
    "granitemoehybrid",  # shared experts whose gate and up are one matrix
    "nemotron_h",  # no gate; experts of a latent width
    "muse_spark_text",  # a norm behind each expert
)
SHARED = ("deepseek_v3", "qwen2_moe", "granitemoehybrid", "nemotron_h")


def watch(
    model: Any, folder: Path, name: str = "tiny", *, every: int = EVERY, flush: bool = False, **options: Any
) -> store.Run:
    """A run of the two batches at no other level than errors, in two shards with ``flush``."""
    chosen = RecordingOptions(levels=("routing", "errors"), errors_every=every, **options)
    with torch.no_grad(), WatchSession(model, name=name, directory=folder, options=chosen) as session:
        for inputs, domains in zip(BATCHES, DOMAINS, strict=True):
            session.label(domains=domains)
            model(**inputs)
            if flush:
                session.flush()
    assert session.path is not None
    return store.open_run(session.path)


def build_short(**options: Any) -> Any:
    """Two layers with shared experts and a gate."""
    return build("qwen2_moe", num_hidden_layers=2, layer_types=["full_attention"] * 2, **options)


@dataclass
class Case:
    """A model, what its experts were called with, and the run."""

    model: Any
    calls: list[Calls]
    run: store.Run


_CASES: dict[str, Case] = {}


@torch.no_grad()
def case_of(family: str, folder: Path) -> Case:
    """The case of a family, made once; watching changes neither weights nor outputs."""
    if family not in _CASES:
        model = build(family, **({"num_hidden_layers": 2} if family in ("olmoe", "qwen3_moe", "mixtral") else {}))
        before = {name: parameter.clone() for name, parameter in model.named_parameters()}
        with recorded_calls(model) as calls:
            plain = [output_of(model(**inputs)) for inputs in BATCHES]
        run = watch(model, folder)
        assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
        assert all(torch.equal(output_of(model(**inputs)), out) for inputs, out in zip(BATCHES, plain, strict=True))
        _CASES[family] = Case(model, calls, run)
    return _CASES[family]


def sampled(every: int = EVERY) -> list[Tensor]:
    """Per batch, (rows, length) bool."""
    found = []
    for number, inputs in enumerate(BATCHES):
        mask = inputs["attention_mask"]
        sequence = (torch.arange(3)[:, None] + 3 * number).expand_as(mask)
        found.append(in_sample(sequence, mask.cumsum(1) - 1, every) & (mask == 1))
    return found


def labels(domain: str) -> list[Tensor]:
    """Per batch, (rows, length) bool: the tokens of a domain; of all where it is empty."""
    return [torch.tensor([domain in ("", one) for one in names])[:, None].expand(3, 12) for names in DOMAINS]


def narrow(weight: Tensor, bits: Bits, hidden: int, width: int, nested: int | None = None) -> Tensor:
    step = QuantizeStep(method="", group_size=group_size_for(hidden, width), layers=(), nested=nested)
    return to_grid(weight.detach().float(), bits, step).values()


def changed_experts(layer: MoELayer, expert: int, part: str, bits: Bits, nested: int | None = None) -> nn.Module:
    """A copy of the experts module with one part of one expert on a grid, written into its tensors as they lie."""
    experts, layout = copy.deepcopy(layer.experts), layer.layout
    assert layout is not None
    hidden, width = layout.hidden_size, layout.width
    first = getattr(experts, layout.up_name).data[expert]
    down = getattr(experts, layout.down_name).data[expert]
    first, down = (tensor.T if layout.transposed else tensor for tensor in (first, down))  # views
    places = {"up": slice(None)}
    if layout.gated and layout.interleaved:
        places = {"gate": slice(0, None, 2), "up": slice(1, None, 2)}
    elif layout.gated:
        places = {"gate": slice(0, width), "up": slice(width, None)}
    for name, rows in places.items():
        if part in ("all", name):
            first[rows] = narrow(first[rows], bits, hidden, width, nested)
    if part in ("all", "down"):
        down.copy_(narrow(down, bits, hidden, width, nested))
    return experts


def alone(experts: nn.Module, call: Calls, number: int, expert: int, tokens: Tensor) -> Tensor:
    """(tokens, hidden) float64: what one expert adds to the layer's output, by the module itself."""
    ids, weights = call.ids[number][tokens], call.weights[number][tokens]
    return experts(call.hidden[number][tokens], ids, weights * (ids == expert)).double()


def expected_rows(call: Calls, domain: str, expert: int, part: str) -> tuple[int, float, list[float], list[float]]:
    """Tokens, squared output, squared change per width and, for all parts, per nested width."""
    layer, (tokens, energy) = call.layer, (0, 0.0)
    errors, nested = np.zeros(len(BITS)), np.zeros(3)
    variants: list[tuple[Any, int, nn.Module]] = [
        (errors, place, changed_experts(layer, expert, part, bits)) for place, bits in enumerate(BITS)
    ]
    widths: tuple[Bits, ...] = (2, 3, 4)
    if part == "all":
        variants += [(nested, at, changed_experts(layer, expert, part, bits, 2)) for at, bits in enumerate(widths)]
    for number, (sample, of) in enumerate(zip(sampled(), labels(domain), strict=True)):
        chosen = (sample & of).reshape(-1) & (call.ids[number] == expert).any(1)
        if not chosen.any():
            continue
        plain = alone(layer.experts, call, number, expert, chosen)
        tokens, energy = tokens + int(chosen.sum()), energy + float(plain.square().sum())
        for sums, place, experts in variants:
            sums[place] += float((alone(experts, call, number, expert, chosen) - plain).square().sum())
    return tokens, energy, errors.tolist(), nested.tolist()


def rows_of(run: store.Run, layer: MoELayer, **wanted: Any) -> list[dict[str, Any]]:
    return run.table("expert_error").filter(layer=layer.layer, step=layer.step, **wanted).to_dicts()


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_errors_equal_the_module_with_replaced_weights(family: str, tmp_path: Path) -> None:
    case = case_of(family, tmp_path)
    run, call = case.run, case.calls[-1]
    assert run.badge.status == "valid", run.badge.reason
    layer = call.layer
    gated = layer.layout is not None and layer.layout.gated
    parts = ["all", *(["gate"] if gated else []), "up", "down"]
    assert {row["part"] for row in rows_of(run, layer)} == set(parts)
    met = 0
    for expert in range(0, layer.num_experts, 4):
        for part in parts:
            domain = "code" if part == "all" else ""
            tokens, energy, errors, nested = expected_rows(call, domain, expert, part)
            found = rows_of(run, layer, kind="routed", expert=expert, part=part, domain=domain)
            assert len(found) == int(tokens > 0)
            met += tokens
            for row in found:
                assert (row["tokens"], row["phase"]) == (tokens, "prompt")
                assert row["gated_output_square_sum"] == pytest.approx(energy, rel=1e-4)
                assert row["gated_error_square_sum"] == pytest.approx(errors, rel=1e-3, abs=1e-9 * energy)
                if part == "all":
                    assert row["nested_error_square_sum"] == pytest.approx(nested, rel=1e-3, abs=1e-9 * energy)
                else:
                    assert row["nested_error_square_sum"] is None
    assert met


@pytest.mark.parametrize("family", SHARED)
@torch.no_grad()
def test_shared_experts(family: str, tmp_path: Path) -> None:
    case = case_of(family, tmp_path)
    model, run, layer = case.model, case.run, case.calls[-1].layer
    shared = layer.shared
    assert shared is not None
    inputs: list[Tensor] = []
    handle = shared.module.register_forward_pre_hook(
        lambda _, args: inputs.append(args[0].reshape(-1, args[0].shape[-1]))
    )
    for texts in BATCHES:
        model(**texts)
    handle.remove()
    chosen = torch.cat(inputs)[torch.cat([mask.reshape(-1) for mask in sampled()])]
    gate = torch.ones(len(chosen)) if shared.gate is None else torch.sigmoid(shared.gate(chosen))[:, 0]

    def of(module: nn.Module) -> Tensor:
        result = module(chosen)
        return (result * gate[:, None]).double()

    names = [name for name, _ in shared.module.named_parameters()]
    for part in ("all", "up", "down"):
        errors = []
        for bits in BITS:
            twin = copy.deepcopy(shared.module)
            for name in names:
                weight = twin.get_parameter(name).data
                hidden, width = shared.down.weight.shape
                rows = slice(width, None) if name.startswith("input_linear") and part == "up" else slice(None)
                is_down = name.startswith(("down", "output"))
                is_up = name.startswith(("up", "input"))
                if part == "all" or (part == "down" and is_down) or (part == "up" and is_up):
                    weight[rows] = narrow(weight[rows], bits, hidden, width)
            errors.append(float((of(twin) - of(shared.module)).square().sum()))
        found = run.table("expert_error").filter(layer=layer.layer, kind="shared", part=part)
        assert found["expert"].unique().to_list() == [0]
        assert found["tokens"].sum() == len(chosen)
        energy = float(of(shared.module).square().sum())
        assert found["gated_output_square_sum"].sum() == pytest.approx(energy, rel=1e-4)
        sums = np.array(found["gated_error_square_sum"].to_list()).sum(0)
        assert sums.tolist() == pytest.approx(errors, rel=1e-3, abs=1e-9 * energy)


@torch.no_grad()
def test_grids_are_those_of_the_weights(tmp_path: Path) -> None:
    case = case_of("gpt_oss", tmp_path)
    layer = case.calls[1].layer
    layout = layer.layout
    assert layout is not None
    table = case.run.table("expert_grid").filter(layer=layer.layer)
    assert len(table) == 3 * layer.num_experts  # experts without a token too
    for row in table.filter(expert=5).to_dicts():
        gate, up = layout.first_projections(layer.experts, 5)
        weight = {"gate": gate, "up": up, "down": layout.down_weight(layer.experts, 5)}[row["part"]]
        assert weight is not None
        assert row["group_size"] == group_size_for(layout.hidden_size, layout.width) == 16
        assert row["square_sum"] == pytest.approx(float(weight.double().square().sum()), rel=1e-5)
        errors = [
            float((narrow(weight, bits, layout.hidden_size, layout.width) - weight).double().square().sum())
            for bits in BITS
        ]
        assert row["error_square"] == pytest.approx(errors, rel=1e-4)
        assert row["error_square"] == sorted(row["error_square"], reverse=True)
        columns = [float(column.abs().max() / column.abs().mean()) for column in weight.T]
        assert row["outlier"] == pytest.approx(max(columns), rel=1e-5)


def test_two_halves_are_one_run(tmp_path: Path) -> None:
    """One shard or two, watched in one piece or interrupted and resumed."""
    model, options = (
        build_short(),
        RecordingOptions(("routing", "errors"), errors_every=EVERY),
    )
    runs = [watch(model, tmp_path, "one"), watch(model, tmp_path, "sharded", flush=True)]
    for part, stopped in ((0, True), (1, False)):
        session = WatchSession(model, name="resumed", directory=tmp_path, options=options, resume=not stopped)
        with nullcontext() if not stopped else pytest.raises(KeyboardInterrupt), torch.no_grad(), session:
            session.label(domains=DOMAINS[part])
            model(**BATCHES[part])
            if stopped:
                raise KeyboardInterrupt
    assert session.path is not None
    runs.append(store.open_run(session.path))
    for table, keys in (("expert_error", KEYS), ("expert_grid", KEYS[:5])):
        first, *others = (run.table(table).sort(keys) for run in runs)
        assert len(first)
        for other in others:
            assert_frame_equal(first.select(pl.exclude(pl.List)), other.select(pl.exclude(pl.List)), rel_tol=1e-5)
            for column in (name for name in first.columns if first[name].dtype == pl.List):
                pair = [np.array(frame[column].drop_nulls().to_list()) for frame in (first, other)]
                assert_allclose(*pair, rtol=1e-3, err_msg=column)


def test_each_matrix_goes_on_each_grid_once_per_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from profiler.recorders import widths

    counted: Counter[Any] = Counter()

    def counting(weight: Tensor, bits: Bits, step: QuantizeStep) -> Any:
        counted[bits, step.nested] += 1
        return to_grid(weight, bits, step)

    monkeypatch.setattr(widths, "to_grid", counting)
    model = build("olmoe", num_hidden_layers=2)
    options = RecordingOptions(levels=("routing", "errors"), errors_every=1)
    with torch.no_grad(), WatchSession(model, name="tiny", directory=tmp_path, options=options) as session:
        for _ in range(3):
            model(**BATCHES[0])
        assert not counted
    assert session.path is not None
    run = store.open_run(session.path)
    matrices = 3 * run.table("expert_load").select("layer", "expert").n_unique()
    assert {counted[bits, None] for bits in BITS} == {matrices}
    used = 3 * run.table("expert_error").select("layer", "expert").n_unique()
    assert [counted[bits, 2] for bits in (3, 4)] == [used, used]


def test_the_sample_is_bounded_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expert_errors, "MAX_TOKENS", 30)
    model = build("olmoe", num_hidden_layers=2)
    run = watch(model, tmp_path, every=1)
    table = run.table("expert_error").filter(part="all")
    top_k = model.config.num_experts_per_tok
    assert table.group_by("layer").agg(pl.col("tokens").sum())["tokens"].unique().to_list() == [30 * top_k]
    checks = run.table("check").filter(name=expert_errors.CHECK, status="skipped")
    real = sum(int(inputs["attention_mask"].sum()) for inputs in BATCHES)
    assert checks["value"].to_list() == [real - 30] * model.config.num_hidden_layers
    assert run.badge.status == "valid"
    # Those that were kept are the first ones: the first batch has 27 tokens, the second gives three more.
    monkeypatch.setattr(expert_errors, "MAX_TOKENS", 1000)
    whole = watch(model, tmp_path, "whole", every=1).table("expert_error").filter(part="all", domain="code")
    assert whole["tokens"].sum() > table.filter(domain="code")["tokens"].sum()


def test_what_waits_is_what_was_stated(tmp_path: Path) -> None:
    """Until a shard is written, inputs wait and nothing else; afterwards, nothing."""
    session = profiler.watch(build("deepseek_v3"), store=tmp_path, name="tiny", level="errors", flush_seconds=1e9)
    bare = profiler.watch(build("deepseek_v3"), store=tmp_path, name="bare", level="routing", flush_seconds=1e9)
    for one in (session, bare):
        with torch.no_grad(), one.attached():
            for seed in range(4):
                one.model(**batch(8, 64, padding="none", seed=seed))
    assert (expert_errors.MAX_TOKENS, len(BITS)) == (memory.WAITING_TOKENS, memory.WIDTHS)
    waiting = held_bytes(session._recording) - held_bytes(bare._recording)
    options = RecordingOptions(levels=("routing", "errors"))
    stated = memory.extra_memory(session.found, options, batch=8 * 64, tokens=4 * 8 * 64).waiting
    assert waiting <= stated <= 2 * waiting
    session._recording.drain()
    bare._recording.drain()
    assert held_bytes(session._recording) == held_bytes(bare._recording)


def test_too_many_experts_are_left_out_with_a_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expert_errors, "MAX_EXPERTS", 7)
    run = watch(build_short(), tmp_path)
    assert set(run.table("expert_error")["kind"]) == {"shared"}
    details = run.table("check").filter(name=expert_errors.CHECK, status="skipped")["detail"].to_list()
    assert details == [f"layer {layer}: its 8 experts were left out: more than 7" for layer in (0, 1)]


def test_experts_that_saw_nothing_have_a_grid_alone(tmp_path: Path) -> None:
    run = watch(build("olmoe", num_hidden_layers=2), tmp_path, every=8)
    there, grids = run.table("expert_error"), run.table("expert_grid")
    assert there["tokens"].min() > 0
    pairs = [frame.select("layer", "expert").unique() for frame in (there, grids)]
    assert len(pairs[0].join(pairs[1], on=["layer", "expert"], how="anti")) == 0
    assert len(pairs[0]) < len(pairs[1]) == 2 * 8


def test_decoded_tokens_stand_apart(tmp_path: Path) -> None:
    model = build("olmoe", num_hidden_layers=2)
    with torch.no_grad(), profiler.watch(model, store=tmp_path, name="tiny", level="errors", errors_every=1) as session:
        model.generate(**batch(2, 6, padding="left"), max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert session.path is not None
    table = store.open_run(session.path).table("expert_error").filter(layer=0, part="all")
    tokens = dict(table.group_by("phase").agg(pl.col("tokens").sum()).iter_rows())
    assert tokens == {"prompt": 2 * (6 + 3), "decode": 2 * (2 * 3)}


def test_a_failed_forward_leaves_nothing(tmp_path: Path) -> None:
    model = build("olmoe", num_hidden_layers=2)
    options = RecordingOptions(levels=("routing", "errors"), errors_every=1)
    with torch.no_grad(), WatchSession(model, name="tiny", directory=tmp_path, options=options) as session:
        handle = model.model.norm.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(torch.arange(3, 9)[None])
        handle.remove()
        model(torch.arange(3, 13)[None])
    assert session.path is not None
    table = store.open_run(session.path).table("expert_error").filter(layer=0, part="all")
    assert table["tokens"].sum() == 10 * model.config.num_experts_per_tok


def test_16_bit_weights_are_measured_in_32(tmp_path: Path) -> None:
    """Width 8 changes less than bfloat16 rounds; the errors are still those of the grid."""
    wide = build_short(dtype=torch.bfloat16)
    table = watch(wide, tmp_path).table("expert_error").filter(part="all")
    sums = np.array(table["gated_error_square_sum"].to_list()).sum(0) / table["gated_output_square_sum"].sum()
    assert sums[5] < 3e-4
    assert (np.diff(sums[2:]) < 0).all()


def test_llama4_weights_inputs(tmp_path: Path) -> None:
    model = build("llama4_text")
    run = watch(model, tmp_path, every=1)
    assert run.badge.status == "valid", run.badge.reason
    output = profiler.watch(model, store=tmp_path, name="outputs", level="activations")
    with torch.no_grad(), output as session:
        for inputs in BATCHES:
            model(**inputs)
    assert session.path is not None
    expected = store.open_run(session.path).table("expert_output").filter(kind="routed").sort("layer", "expert")
    found = run.table("expert_error").filter(part="all", kind="routed").group_by("layer", "expert").agg(
        pl.col("gated_output_square_sum").sum()
    ).sort("layer", "expert")  # fmt: skip
    assert_allclose(found["gated_output_square_sum"], expected["gated_norm_square_sum"], rtol=1e-4)


@pytest.mark.parametrize("family", ["dbrx", "jetmoe", "switch_transformers", "longcat_flash", "doge"])
def test_families_with_layouts_of_their_own(family: str, tmp_path: Path) -> None:
    """Put together from their projections, experts are what their layouts run: a check of the run says so."""
    model = build(family)
    inputs = dict(BATCHES[0])
    if CONFIGS[family].get("config", {}).get("is_encoder_decoder") or family == "switch_transformers":
        inputs["decoder_input_ids"] = inputs["input_ids"]
    with torch.no_grad(), profiler.watch(model, store=tmp_path, name="tiny", level="errors", errors_every=1) as session:
        model(**inputs)
    assert session.path is not None
    run = store.open_run(session.path)
    checks = run.table("check").filter(name=expert_errors.CHECK, status="pass")
    assert len(checks) == len(run.table("layer"))
    assert len(run.table("expert_error"))


def test_streamed_layer_by_layer(tmp_path: Path) -> None:
    build("deepseek_v3").save_pretrained(tmp_path / "model")
    options: dict[str, Any] = {"level": "errors", "errors_every": 2, "headline": False, "store": tmp_path}
    texts: Any = StreamTexts()
    model = profiler.load_model(tmp_path / "model", device="cpu")
    whole = collect(model, corpus=texts, name="whole", tokenizer=tokenizer(), **options)
    streamed = collect_streamed(tmp_path / "model", corpus=texts, name="streamed", tokenizer=tokenizer(), **options)
    first, second = (store.open_run(path).table("expert_error").sort(KEYS) for path in (whole, streamed))
    assert len(first)
    assert_frame_equal(first, second, rel_tol=1e-5, abs_tol=1e-9)


class StreamTexts(Texts):
    """The same batches, as often as they are asked for."""

    def batches(self, *, skip: Any = ()) -> Any:
        return super().batches(skip=set(skip))


def test_weights_that_wait_elsewhere_are_refused(tmp_path: Path) -> None:
    build("olmoe").save_pretrained(tmp_path / "model")
    places: dict[str, Any] = {f"model.layers.{index}": "cpu" for index in range(4)}
    places |= dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    places["model.layers.2"] = "disk"
    model = profiler.load_model(tmp_path / "model", device_map=json.dumps(places))
    with pytest.raises(ModelError, match=r"layers\.2\.mlp\.experts .* waits on the CPU or disk"):
        profiler.watch(model, store=tmp_path, name="tiny", level="errors")
