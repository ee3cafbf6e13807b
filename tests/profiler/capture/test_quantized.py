"""Quantized checkpoints: what is loaded equals what the bytes mean, the run says so, and wrong readings are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from numpy.testing import assert_array_equal
from torch import Tensor

import profiler
import store
from app.cli import main
from moescope.errors import ModelError
from profiler.capture.provenance import sample
from tests.profiler.capture import quantized
from tests.profiler.capture.tiny import batch, build

Write = Callable[[Path], dict[str, Tensor]]


def profile(model: Any, folder: Path, level: str = "routing,activations", name: str = "tiny") -> store.Run:
    with torch.no_grad(), profiler.watch(model, store=folder, name=name, level=level) as session:
        model(**batch(padding="left"))
    assert session.path is not None
    return store.open_run(session.path)


def check(run: store.Run, name: str) -> dict[str, Any]:
    found: dict[str, Any] = run.table("check").filter(name=name).to_dicts()[0]
    return found


def meant_by(name: str, meant: dict[str, Tensor]) -> Tensor | None:
    """What a parameter of the model should hold, from the weights of the checkpoint's separate projections."""
    if name in meant:
        return meant[name]
    base, _, part = name.rpartition(".")
    sources = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}.get(part)
    if sources is None or f"{base}.0.{sources[0]}.weight" not in meant:
        return None
    experts = range(sum(entry.startswith(f"{base}.") and "down_proj" in entry for entry in meant))
    return torch.stack([torch.cat([meant[f"{base}.{e}.{source}.weight"] for source in sources]) for e in experts])


FORMATS: dict[str, tuple[Write, str]] = {
    "fp8": (quantized.fp8, "fp8 blocks 16x16 weights were dequantized to bfloat16"),
    "mxfp4": (quantized.mxfp4, "mxfp4 weights were dequantized to bfloat16"),
    "compressed-tensors": (quantized.compressed, "compressed-tensors pack-quantized 4 bit weights were dequantized"),
    "compressed-tensors fp8": (
        quantized.compressed_fp8,
        "compressed-tensors float-quantized 8 bit weights were dequantized to bfloat16",
    ),
    "gguf": (lambda folder: quantized.gguf(folder / "tiny.gguf"), "gguf Q8_0 weights were dequantized to float32"),
    "gguf qwen2": (
        lambda folder: quantized.gguf(folder / "tiny.gguf", "qwen2_moe"),
        "gguf Q8_0 weights were dequantized to float32",
    ),
}


def written(name: str, folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """Where a checkpoint of this format now lies, and the weights that it means."""
    folder.mkdir()
    meant = FORMATS[name][0](folder)
    return folder / "tiny.gguf" if name.startswith("gguf") else folder, meant


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_loaded_is_what_the_bytes_mean_and_the_run_says_so(name: str, tmp_path: Path) -> None:
    kind, said = name.partition(" ")[0], FORMATS[name][1]
    place, meant = written(name, tmp_path / "checkpoint")
    model = profiler.load_model(place, device="cpu")
    seen = 0
    for path, parameter in model.named_parameters():
        expected = meant_by(path, meant)
        if expected is not None:
            seen += 1
            # Rounded to the type of the loaded model, bfloat16 mostly: half a step of 2^-8.
            torch.testing.assert_close(parameter.detach().float(), expected, rtol=2**-8, atol=1e-6)
    assert seen >= 2 * len(model.model.layers)
    run = profile(model, tmp_path)
    row = check(run, "weights as stored")
    assert row["status"] == "warning" and said in row["detail"], row["detail"]
    assert "figures are those of the dequantized model" in row["detail"]
    assert ("round activations" in row["detail"]) == name.endswith("fp8")
    assert run.badge.status == "warning" and run.badge.reason.startswith("weights as stored: ")
    stored = run.info.settings["weights"]
    assert stored["dequantized"] and stored["stored"].startswith(kind)
    assert not run.table("expert_output").is_empty()


@pytest.mark.parametrize("kind", ["fp8", "mxfp4", "gguf"])
def test_weights_that_shall_stay_packed_are_refused_where_no_kernel_runs_them(kind: str, tmp_path: Path) -> None:
    place, _ = written(kind, tmp_path / "checkpoint")
    with pytest.raises(ModelError, match=f"no kernels for {kind}.*dequantize='auto'"):
        profiler.load_model(place, device="cpu", dequantize=False)


@pytest.mark.parametrize("name", ["fp8", "mxfp4", "compressed-tensors", "gguf"])
def test_dequantized_weights_may_lie_on_disk(name: str, tmp_path: Path) -> None:
    place, _ = written(name, tmp_path / "checkpoint")
    model = profiler.load_model(place, device="cpu")
    layer = sum(tensor.numel() * tensor.element_size() for tensor in model.model.layers[0].parameters())
    offloaded = profiler.load_model(place, memory_limit=int(2.2 * layer))
    assert set(offloaded.hf_device_map.values()) == {"cpu", "disk"}
    with torch.no_grad():
        assert torch.equal(offloaded(**batch()).logits, model(**batch()).logits)
    runs = [profile(watched, tmp_path, "routing", f"run{place}") for place, watched in enumerate((model, offloaded))]
    assert_array_equal(runs[0].selections().ids, runs[1].selections().ids)
    assert check(runs[1], "weights as stored")["status"] == "warning"


def test_dequantized_on_request_is_the_same(tmp_path: Path) -> None:
    quantized.compressed(tmp_path)
    auto, asked = (profiler.load_model(tmp_path, dequantize=wanted).state_dict() for wanted in ("auto", True))
    assert all(torch.equal(asked[name], tensor) for name, tensor in auto.items())
    kept = profiler.load_model(tmp_path, dequantize=False)
    run = profile(kept, tmp_path, name="kept")
    row = check(run, "weights as stored")
    assert row["status"] == "warning"
    assert "weights of the experts of 4 layers were dequantized to bfloat16" in row["detail"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"widths": (4, 8)}, r"experts are packed with 4 bit .* 8 bit .* transformers unpacks all with 4 bit"),
        ({"widths": (8, 2)}, r"experts are packed with 2 bit .* 8 bit .* transformers unpacks all with 8 bit"),
        ({"zero_points": True}, "has zero points, which transformers cannot unpack"),
    ],
)
def test_experts_that_the_library_unpacks_wrongly_are_refused(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    quantized.compressed(tmp_path, **options)
    with pytest.raises(ModelError, match=message) as caught:
        profiler.load_model(tmp_path, device="cpu")
    assert "\n" not in str(caught.value)


def test_a_checkpoint_of_the_hub_is_checked_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "hub"
    snapshot = cache / "models--acme--tiny" / "snapshots" / ("0" * 40)
    quantized.compressed(snapshot, (4, 8))
    (cache / "models--acme--tiny" / "refs").mkdir()
    (cache / "models--acme--tiny" / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    with pytest.raises(ModelError, match="transformers unpacks all with 4 bit"):
        profiler.load_model("acme/tiny", device="cpu")


def test_the_library_still_unpacks_mixed_widths_wrongly(tmp_path: Path) -> None:
    """The day this fails, the refusal above can go."""
    from transformers import AutoModelForCausalLM

    meant = quantized.compressed(tmp_path, (4, 8))
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    experts = model.model.layers[0].mlp.experts.down_proj.detach().float()
    errors = []
    for expert in (0, 1):
        right = meant[f"model.layers.0.mlp.experts.{expert}.down_proj.weight"]
        errors.append(float((experts[expert] - right).norm() / right.norm()))
    assert errors[0] < 0.01 and errors[1] > 0.5


def test_a_width_that_no_group_names_is_refused(tmp_path: Path) -> None:
    quantized.compressed(tmp_path, (8,))
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["num_bits"] = 4
    path.write_text(json.dumps(config))
    with pytest.raises(ModelError, match="packed with 8 bit .* unpacks all with 4 bit"):
        profiler.load_model(tmp_path)


def test_gguf_takes_tokenizer_and_widths_from_the_file(tmp_path: Path) -> None:
    quantized.gguf(tmp_path / "tiny.gguf")
    words = profiler.load_tokenizer(tmp_path / "tiny.gguf")
    assert words("hello")["input_ids"] == [words.convert_tokens_to_ids(letter) for letter in "hello"]
    model = profiler.load_model(tmp_path / "tiny.gguf")
    # The library takes its default of 768 here, which the file contradicts.
    assert model.config.moe_intermediate_size == 32
    plain = build("qwen3_moe", head_dim=16, norm_topk_prob=True)
    runs = [profile(model, tmp_path, "routing"), profile(plain, tmp_path, "routing", "plain")]
    ids = [run.selections().ids for run in runs]
    assert ids[0].shape == ids[1].shape
    assert (ids[0] == ids[1]).mean() > 0.8  # 8-bit blocks change few choices


def test_a_gguf_file_is_inspected_and_collected(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "tiny.gguf"
    quantized.gguf(file)
    assert main(["inspect", str(file), "--json"]) == 0
    inspection = json.loads(capsys.readouterr().out)
    assert inspection["model_type"] == "qwen3_moe"
    assert {layer["expert_width"] for layer in inspection["moe_layers"]} == {32}
    assert any("quantised (gguf Q8_0)" in warning for warning in inspection["warnings"])
    (tmp_path / "text.txt").write_text("A text of some words. " * 20)
    words = ["collect", str(file), "--data", str(tmp_path / "text.txt"), "--store", str(tmp_path), "--level", "routing"]
    assert main([*words, "--sequence-length", "32", "--device", "cpu", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["capture"] == "warning" and "gguf Q8_0 weights were dequantized" in answer["reason"]


def test_four_bit_that_leaves_the_experts_alone_is_not_called_four_bit(tmp_path: Path) -> None:
    from transformers import BitsAndBytesConfig

    model = build("olmoe")
    model.config.quantization_config = BitsAndBytesConfig(load_in_4bit=True)
    run = profile(model, tmp_path)
    row = check(run, "experts quantized")
    assert row["status"] == "warning"
    assert row["detail"].startswith("bitsandbytes 4 bit covers linear layers only: the experts of 4 layers are plain")
    assert run.badge.status == "warning"
    assert run.info.settings["weights"] == {"stored": "bitsandbytes 4 bit", "dequantized": False}
    plain = profile(build("olmoe"), tmp_path, name="plain")
    assert plain.badge.status == "valid"
    assert "weights" not in plain.info.settings
    assert_array_equal(plain.selections().ids, run.selections().ids)


def test_tensors_that_know_few_operations_have_a_fingerprint() -> None:
    class Packed(Tensor):
        def reshape(self, *_: Any) -> Tensor:
            raise NotImplementedError("Int8Tensor dispatch: attempting to run unimplemented operator aten.view")

        def dequantize(self) -> Tensor:
            return self.as_subclass(Tensor)

    values = torch.arange(640.0).view(20, 32)
    assert torch.equal(sample(values.as_subclass(Packed)), sample(values))


def test_what_cannot_be_dequantized_while_loading_is_refused(tmp_path: Path) -> None:
    build("olmoe").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] = {"quant_method": "awq", "bits": 4, "group_size": 128}
    path.write_text(json.dumps(config))
    with pytest.raises(ModelError, match="awq 4 bit weights cannot be dequantized while loading"):
        profiler.load_model(tmp_path, dequantize=True)
    with pytest.raises(ModelError, match="cannot be loaded") as caught:
        profiler.load_model(tmp_path)
    assert "\n" not in str(caught.value)
