"""Adapters: those of the library's families against computations by hand, and one as docs/adapters.md writes it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
import transformers
from torch import Tensor, nn

import profiler
import store
from compressor.families import ADAPTERS, Adapter, Selection, read_router, read_sequences, stacked_layout
from moescope.errors import CaptureError, ModelError
from tests.profiler.capture.by_hand import check
from tests.profiler.capture.families_by_hand import BY_HAND
from tests.profiler.capture.tiny import CONFIGS, batch, build, output_of

PAGE = Path(__file__).parents[3] / "docs" / "adapters.md"


class AcmeExperts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wi, self.wo = nn.Parameter(torch.randn(4, 12, 8)), nn.Parameter(torch.randn(4, 8, 6))

    def _apply_gate(self, inner: Tensor) -> Tensor:
        gate, up = inner.chunk(2, -1)
        return gate.relu() * up

    def forward(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        inner = self._apply_gate(torch.einsum("tkoh,th->tko", self.wi[ids], hidden))
        return torch.einsum("tkhi,tki,tk->th", self.wo[ids], inner, weights)


class AcmeRouter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Linear(8, 4)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = self.projection(hidden)
        weights, ids = logits.softmax(-1).topk(2)
        return logits, weights, ids


class AcmeLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = AcmeRouter(), AcmeExperts()

    def forward(self, hidden: Tensor) -> Tensor:
        flat = hidden.reshape(-1, 8)
        _, weights, ids = self.router(flat)
        return hidden + self.experts(flat, ids, weights).reshape(hidden.shape)


class AcmeModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layers = nn.Embedding(16, 8), nn.ModuleList(AcmeLayer() for _ in range(2))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


@pytest.fixture
def adapters() -> Iterator[dict[str, Adapter]]:
    before = dict(ADAPTERS)
    yield ADAPTERS
    ADAPTERS.clear()
    ADAPTERS.update(before)


def watched(model: nn.Module, folder: Path) -> store.Run:
    ids = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        bare = model(ids)
        with profiler.watch(model, store=folder, name="acme", level="activations") as session:
            assert torch.equal(model(ids), bare)
    assert "forward" not in model.layers[0].experts.__dict__
    assert session.path is not None
    return store.open_run(session.path)


def test_the_example_of_the_page_works(adapters: dict[str, Adapter], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = AcmeModel()
    with pytest.raises(ModelError, match=r"layer 0, layers\.0\.experts \(AcmeExperts\) cannot be watched"):
        profiler.find_moe_layers(model)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    (block,) = [block for block in blocks if "ADAPTERS[" in block]
    exec(block, {})
    run = watched(model, tmp_path)
    assert run.badge.status == "valid", run.badge.reason
    assert run.table("expert_output")["tokens"].sum() == 2 * 12 * 2
    assert run.info.backend == "eager"


def test_a_wrong_layout_is_found_out(adapters: dict[str, Adapter], tmp_path: Path) -> None:
    torch.manual_seed(0)
    adapters["AcmeExperts"] = Adapter(stacked_layout("wrong", "wo"))
    model = AcmeModel()
    for layer in model.layers:
        layer.experts.wrong = nn.Parameter(layer.experts.wi.detach().flip(1))
    run = watched(model, tmp_path)
    assert run.badge.status == "invalid"
    assert "output recomputed" in run.badge.reason


@pytest.mark.parametrize(
    ("read", "said"),
    [
        (lambda call: call.args[7], "the adapter of AcmeExperts cannot read a call: IndexError"),
        (read_sequences, r"reads hidden \(12, 8\), ids \(96, 2\) and weights \(96, 2\): \(tokens, width\)"),
        (lambda call: Selection(*call.args[:2], call.args[2][:, :1]), r"ids \(12, 2\) and weights \(12, 1\)"),
    ],
)
def test_an_adapter_that_reads_wrongly_is_told_so(
    read: Any, said: str, adapters: dict[str, Adapter], tmp_path: Path
) -> None:
    adapters["AcmeExperts"] = Adapter(stacked_layout("wi", "wo"), read=read)
    with pytest.raises(CaptureError, match=said):
        watched(AcmeModel(), tmp_path)


def test_a_reader_that_wants_a_router_says_that_there_was_none(adapters: dict[str, Adapter], tmp_path: Path) -> None:
    adapters["AcmeExperts"] = Adapter(stacked_layout("wi", "wo"), read=read_router, routers=("elsewhere",))
    with pytest.raises(CaptureError, match="AcmeExperts ran without a router that was seen"):
        watched(AcmeModel(), tmp_path)


# The library's families that are called in a way of their own


def built(family: str, **changes: Any) -> Any:
    model = build(family, **changes)
    for module in model.modules():
        if type(module).__name__ == "JetMoeMoE":
            module.bias.data.normal_()  # zero in a new model
    return model


def inputs_of(family: str, padding: str) -> dict[str, Tensor]:
    inputs = batch(padding=padding)
    if family == "switch_transformers":
        other = batch(padding="left" if padding == "right" else "right", seed=2)
        inputs |= {f"decoder_{name}": values for name, values in other.items()}
    return inputs


def entered_blocks(model: nn.Module, inputs: dict[str, Tensor], block_class: str) -> tuple[Tensor, dict[str, Tensor]]:
    """The model's output, and what entered each MoE block, by plain hooks."""
    entered: dict[str, Tensor] = {}
    handles = []
    for name, module in model.named_modules():
        if type(module).__name__ == block_class:

            def see(block: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
                entered[name] = args[0].detach().clone()

            handles.append(module.register_forward_pre_hook(see))
    output = output_of(model(**inputs))
    for handle in handles:
        handle.remove()
    return output, entered


CASES = [(family, padding, None) for family in BY_HAND for padding in ("right", "left")]
CASES += [("switch_transformers", "right", "encoder"), ("llama4_text", "right", "one")]


@torch.no_grad()
@pytest.mark.parametrize(("family", "padding", "special"), CASES)
def test_a_family_called_otherwise_equals_a_computation_by_hand(
    family: str, padding: str, special: str | None, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {"expert_capacity": 2} if family == "switch_transformers" else {}
    changes |= {"num_experts_per_tok": 1} if special == "one" else {}
    stack = special if special == "encoder" else None
    model, inputs = built(family, **changes), inputs_of(family, padding)
    block_class, by_hand = BY_HAND[family]
    bare, entered = entered_blocks(model, inputs, block_class)
    with profiler.watch(model, store=tmp_path, name="tiny", level="activations", stack=stack) as session:
        assert torch.equal(output_of(model(**inputs)), bare)
    assert session.path is not None
    run = store.open_run(session.path)
    assert run.badge.status == "valid", run.badge.reasons
    mask = inputs["decoder_attention_mask" if family == "switch_transformers" and not stack else "attention_mask"]
    layers = profiler.find_moe_layers(model, stack)
    assert len(layers) == run.table("layer").height
    dropped = 0
    for layer in layers:
        name = next(name for name in entered if layer.name.startswith(name))
        expected = by_hand(model.get_submodule(name), entered[name])
        check(run, layer.key, expected, real=mask.reshape(-1).bool(), experts=layer.num_experts)
        dropped += int((expected.ids < 0).sum())
    assert (dropped > 0) == (family == "switch_transformers")


@torch.no_grad()
@pytest.mark.parametrize("family", BY_HAND)
def test_generation_with_a_family_called_otherwise(family: str, tmp_path: Path) -> None:
    model, inputs = build(family), batch(padding="left")
    options: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    bare = model.generate(**inputs, **options)
    with profiler.watch(model, store=tmp_path, name="tiny", level="activations") as session:
        assert torch.equal(model.generate(**inputs, **options), bare)
    assert session.path is not None
    run = store.open_run(session.path)
    assert run.badge.status == "valid", run.badge.reasons
    prompt = 3 if family == "switch_transformers" else int(inputs["attention_mask"].sum())
    assert run.info.tokens == prompt + 3 * 3  # the last token is never fed; Switch's decoder begins with one token
    load = run.table("expert_load").group_by("layer", "phase").agg(pl.col("tokens").sum())
    k = int(run.table("layer")["top_k"].max())  # type: ignore[arg-type]
    counts = {(phase, count) for _, phase, count in load.rows()}
    assert counts == {("prompt", k * prompt), ("decode", k * 9)}


@torch.no_grad()
@pytest.mark.parametrize("family", BY_HAND)
def test_bfloat16_is_recomputed_within_its_precision(family: str, tmp_path: Path) -> None:
    model, inputs = built(family, dtype=torch.bfloat16), inputs_of(family, "right")
    bare = output_of(model(**inputs))
    with profiler.watch(model, store=tmp_path, name="tiny", level="activations") as session:
        assert torch.equal(output_of(model(**inputs)), bare)
    assert session.path is not None
    assert store.open_run(session.path).badge.status == "valid"


@torch.no_grad()
def test_experts_of_attention_are_named_as_not_recorded(tmp_path: Path) -> None:
    model = build("jetmoe")
    with profiler.watch(model, store=tmp_path, name="tiny") as session:
        model(**batch())
    assert session.path is not None
    run = store.open_run(session.path)
    (detail,) = run.table("check").filter(pl.col("name") == "other experts")["detail"].to_list()
    assert detail == "4 modules hold attention heads chosen by a router of their own: not recorded"
    assert run.badge.status == "valid"


@torch.no_grad()
def test_copying_experts_are_named(tmp_path: Path) -> None:
    model = build("longcat_flash")
    with profiler.watch(model, store=tmp_path, name="tiny", level="activations") as session:
        model(**batch())
    assert session.path is not None
    run = store.open_run(session.path)
    kinds = run.table("expert").filter(pl.col("layer") == 0).sort("expert")["kind"].to_list()
    assert kinds == ["routed"] * 8 + ["copy"] * 4
    weights = run.table("expert_weight").filter(pl.col("layer") == 0)
    assert sorted(weights["expert"].to_list()) == list(range(8))


def test_every_family_of_the_library_has_a_tiny_model() -> None:
    models = {entry["model_class"] for entry in CONFIGS.values()}
    families, built = set(), set()
    for path in (Path(transformers.__file__).parent / "models").glob("*/modeling_*.py"):
        code = path.read_text(encoding="utf-8")
        if "Experts(" in code or "MoE(" in code or "use_experts_implementation" in code:
            families.add(path.parent.name)
        if models.intersection(re.findall(r"^class (\w+)\(", code, re.MULTILINE)):
            built.add(path.parent.name)
    assert families == built
