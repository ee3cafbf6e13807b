"""Does llama.cpp compute from a compressed checkpoint what transformers computes?

    python -m benchmarks.llama_cpp --converter llama.cpp/convert_hf_to_gguf.py [--library libllama.so] [--type f32]

Three models: the bundled OLMoE, a random Qwen3-MoE and a random DeepSeek-V3 with groups and a selection bias. Each is
edited by ``compressor.apply`` in every form, converted by llama.cpp's own converter, and run by llama.cpp and by
transformers (float32) on the same tokens of all bundled domains. The baseline is the original checkpoint in both
engines; "KL to original" says how much the edit itself changed. Without llama.cpp, one line says so. Results, and what
else engines ask of a checkpoint: docs/engines.md.

The bundled model normalises the weights of the chosen experts; llama.cpp never does for OLMoE, whatever config.json
says. It is therefore compared with ``norm_topk_prob`` false in both engines, and once as it is, to show the difference.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import compressor
from benchmarks.libllama import Engine, find_library
from compressor.plan import (
    DropLayer,
    DropStep,
    Estimate,
    LayerShape,
    MergeGroup,
    MergeLayer,
    MergeStep,
    Plan,
    Provenance,
    SlimExpert,
    SlimLayer,
    SlimStep,
    Source,
    Step,
    Target,
)
from sample_data import MODEL, TEXTS

BOUND = 1e-3
"""Largest difference of a logit that we accept between two float32 engines."""
TOKENS_PER_DOMAIN = 36


@dataclass(frozen=True)
class Model:
    """A checkpoint in its folder, and what a plan has to know of it."""

    name: str
    folder: Path
    source: Source


def models(folder: Path) -> Iterator[Model]:
    """The three families; the weights of the random ones are wide enough that experts are chosen for a reason."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    olmoe = folder / "olmoe"
    shutil.copytree(MODEL, olmoe)
    (olmoe / "config.json").write_text(json.dumps({**_config(MODEL), "norm_topk_prob": False}))
    yield Model("olmoe", olmoe, _source(_config(olmoe), width="intermediate_size"))
    size: dict[str, Any] = {
        "vocab_size": 4096, "hidden_size": 128, "intermediate_size": 256, "moe_intermediate_size": 64,
        "num_hidden_layers": 4, "num_attention_heads": 4, "max_position_embeddings": 512, "initializer_range": 0.15,
        "norm_topk_prob": True, "num_experts_per_tok": 4, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
    }  # fmt: skip
    torch.manual_seed(0)
    qwen = Qwen3MoeForCausalLM(Qwen3MoeConfig(num_experts=16, num_key_value_heads=2, **{"head_dim": 32, **size}))
    _save(qwen, folder / "qwen3_moe")
    yield Model("qwen3_moe", folder / "qwen3_moe", _source(_config(folder / "qwen3_moe")))
    config = DeepseekV3Config(
        n_routed_experts=16, n_shared_experts=1, first_k_dense_replace=1, n_group=4, topk_group=2, kv_lora_rank=64,
        q_lora_rank=64, qk_rope_head_dim=32, qk_nope_head_dim=32, v_head_dim=32, num_key_value_heads=4,
        routed_scaling_factor=2.5, **{"scoring_func": "sigmoid", "topk_method": "noaux_tc", **size},
    )  # fmt: skip
    deepseek = DeepseekV3ForCausalLM(config)
    for name, buffer in deepseek.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(0, 0.1)
    _save(deepseek, folder / "deepseek_v3")
    yield Model("deepseek_v3", folder / "deepseek_v3", _source(_config(folder / "deepseek_v3")))


def _save(model: Any, folder: Path) -> None:
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL / name, folder / name)


def _config(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "config.json").read_text()))


def _source(config: dict[str, Any], width: str = "moe_intermediate_size") -> Source:
    """By hand from a configuration: 16 experts in all three families."""
    groups = config.get("n_group", 1)
    shapes = [
        LayerShape(
            layer=layer, num_experts=16, top_k=config["num_experts_per_tok"], width=config[width],
            shared_width=config.get("n_shared_experts", 0) * config[width], groups=groups,
            chosen_groups=config.get("topk_group", 1),
        )
        for layer in range(config.get("first_k_dense_replace", 0), config["num_hidden_layers"])
    ]  # fmt: skip
    return Source(
        model="model", model_type=config["model_type"], hidden_size=config["hidden_size"],
        expert_size=config["hidden_size"], num_layers=config["num_hidden_layers"],
        selection_bias=config["model_type"] == "deepseek_v3", layers=tuple(shapes),
    )  # fmt: skip


def drop(source: Source, form: str = "uniform") -> Step:
    """One expert out of each quarter; where layers may differ, none in the first layer and two in the last."""
    random = np.random.default_rng(0)
    layers = []
    for place, shape in enumerate(source.layers):
        count = 1 if form == "uniform" else {0: 0, len(source.layers) - 1: 2}.get(place, 1)
        gone = [quarter + expert for quarter in range(0, 16, 4) for expert in random.choice(4, count, replace=False)]
        layers.append(DropLayer(layer=shape.layer, experts=tuple(sorted(int(expert) for expert in gone))))
    return DropStep(method="random", form=form, layers=tuple(layers))  # type: ignore[arg-type]


def merge(source: Source) -> Step:
    """The first two experts of each quarter become one, the mean of both."""
    pairs = [((quarter, quarter + 1), (quarter + 2,), (quarter + 3,)) for quarter in range(0, 16, 4)]
    groups = tuple(
        MergeGroup(lead=members[0], members=members, weights=(1 / len(members),) * len(members))
        for quarter in pairs
        for members in quarter
    )
    layers = tuple(MergeLayer(layer=shape.layer, groups=groups) for shape in source.layers)
    return MergeStep(grouping="by number", method="average", layers=layers)


def slim(source: Source, form: str) -> Step:
    """Every routed expert keeps three quarters of its neurons."""
    random = np.random.default_rng(0)
    layers, width = [], source.layers[0].width
    for shape in source.layers:
        masks = [random.permutation(width) < width * 3 // 4 for _ in range(16)]
        experts = tuple(SlimExpert.of(expert=expert, mask=mask) for expert, mask in enumerate(masks))
        layers.append(SlimLayer(layer=shape.layer, experts=experts))
    kept = width * 3 // 4 if form == "uniform" else None
    return SlimStep(method="random", form=form, width=kept, layers=tuple(layers))  # type: ignore[arg-type]


EDITS: dict[str, Callable[[Source], Step]] = {
    "drop, uniform": drop,
    "merge, uniform": merge,
    "slim, uniform": lambda source: slim(source, "uniform"),
    "slim, masked": lambda source: slim(source, "masked"),
    "drop, padded": lambda source: drop(source, "padded"),
    "drop, per layer": lambda source: drop(source, "per_layer"),
    "a decoder layer": lambda source: DropStep(method="by hand", decoder_layers=(2,)),
}


def plan(source: Source, step: Step) -> Plan:
    """A plan with nothing in it but its step."""
    return Plan(
        provenance=Provenance(run="none", tool_version="0"),
        source=source,
        target=Target(share=0.25, preset="none"),
        steps=(step,),
        estimate=Estimate(
            expert_parameters=1,
            expert_parameters_after=1,
            active_parameters=1,
            active_parameters_after=1,
            bytes_saved=0,
        ),
    ).checked()


def tokens() -> list[int]:
    """The beginning of the first text of every domain, one sequence."""
    from tokenizers import Tokenizer

    tokenizer, result = Tokenizer.from_file(str(MODEL / "tokenizer.json")), [0]
    for path in sorted(TEXTS.glob("*.jsonl")):
        with path.open(encoding="utf-8") as lines:
            text = json.loads(next(lines))["text"]
        result += tokenizer.encode(text, add_special_tokens=False).ids[:TOKENS_PER_DOMAIN]
    return result


def reference(checkpoint: Path, ids: list[int]) -> torch.Tensor:
    """(tokens, vocabulary) float32, by transformers."""
    model = compressor.load(checkpoint, dtype="float32").eval()
    with torch.no_grad():
        return torch.as_tensor(model(torch.tensor([ids])).logits[0])


def divergence(base: torch.Tensor, other: torch.Tensor) -> float:
    """Mean Kullback-Leibler divergence of the next token, in nats."""
    left, right = base.double().log_softmax(-1), other.double().log_softmax(-1)
    return float((left.exp() * (left - right)).sum(-1).mean())


def compare(model: Model, engine: Engine, folder: Path, ids: list[int]) -> bool:
    """Print one line per form; whether all that should agree do."""
    original, good = reference(model.folder, ids), True
    good &= _line(model.name, "original", original, engine.logits(model.folder, ids), original)
    if model.name == "olmoe":
        normalised = reference(MODEL, ids)
        _line(model.name, "normalised", normalised, engine.logits(MODEL, ids), normalised)
    for name, step in EDITS.items():
        if name == "drop, padded" and not model.source.selection_bias:
            continue
        target = folder / f"{model.name} {name}".replace(", ", "-").replace(" ", "-")
        compressor.apply(plan(model.source, step(model.source)), source=model.folder, destination=target)
        agrees = _line(model.name, name, reference(target, ids), engine.logits(target, ids), original)
        good &= agrees or name == "drop, per layer"
    return good


def _line(model: str, form: str, ours: torch.Tensor, answer: NDArray[np.float32] | str, original: torch.Tensor) -> bool:
    start, edit = f"{model:<12}{form:<17}", f"{divergence(original, ours):>15.1e}"
    if isinstance(answer, str):
        print(f"{start}{'':>35}{edit}   refused, {answer[:70]}", flush=True)
        return False
    theirs = torch.from_numpy(answer)
    largest = float((ours - theirs).abs().max())
    top = float((ours.argmax(-1) == theirs.argmax(-1)).float().mean())
    print(f"{start}{largest:>13.1e}{top:>9.1%}{divergence(ours, theirs):>13.1e}{edit}", flush=True)
    return largest <= BOUND and top == 1


def main() -> None:
    """Convert, run, compare; status 1 where the engines differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--converter", type=Path, help="convert_hf_to_gguf.py in a copy of llama.cpp's sources")
    parser.add_argument("--library", type=Path, help="libllama; default: that of an installed Python package")
    parser.add_argument("--type", default="f32", help="how the converter stores weights; the bound is for f32")
    arguments = parser.parse_args()
    library = arguments.library or find_library()
    if arguments.converter is None or not arguments.converter.is_file() or library is None or not library.is_file():
        print("skipped: llama.cpp is not here; --converter and --library say where it is (docs/engines.md)")
        return
    torch.set_num_threads(1)
    engine, ids = Engine(arguments.converter.resolve().parent, library.resolve(), arguments.type), tokens()
    print(f"{len(ids)} tokens; bound {BOUND:g}")
    print(f"{'model':<12}{'form':<17}{'max |logit|':>13}{'top-1':>9}{'KL':>13}{'KL to original':>15}")
    with tempfile.TemporaryDirectory() as name:
        good = [compare(model, engine, Path(name), ids) for model in models(Path(name))]
    if not all(good) and arguments.type == "f32":
        sys.exit("the engines differ, or a form that should load does not")


if __name__ == "__main__":
    main()
