"""Loading: where the weights go, and what is refused, with numbers, before anything is read."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from numpy.testing import assert_array_equal
from polars.testing import assert_frame_equal

import profiler
import store
from app.cli import main
from moescope.errors import InputError, ModelError
from profiler.capture import placement
from profiler.capture.placement import GIB, parse_device_map, parse_size, plan_placement
from tests.profiler.capture.tiny import batch, build, tokenizer


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    build("olmoe").save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def weight_bytes(module: torch.nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("text", "size"),
    [("20GiB", 20 << 30), ("1.5 gib", 3 << 29), ("500MB", 500_000_000), ("64kib", 1 << 16), (4096, 4096)],
)
def test_sizes_are_read(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "much", "20 parsecs", "-1GiB", "0", "1e3"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="is no size of memory"):
        parse_size(text)


def test_device_maps_are_read() -> None:
    assert parse_device_map("balanced") == "balanced"
    assert parse_device_map("cpu") == {"": "cpu"}
    assert parse_device_map('{"model.layers.1": "disk", "model.layers.10": "cpu", "lm_head": 1}') == {
        "model.layers.1": "disk",
        "model.layers.10": "cpu",
        "lm_head": 1,
    }
    assert parse_device_map({"": 0, "lm_head": "cpu"}) == {"": 0, "lm_head": "cpu"}
    for text, message in (
        ("{broken", "no JSON object"),
        ("{}", "names no modules"),
        ("abacus", "is no device"),
        ('{"model": "disk", "model.norm": "cpu"}', "'model.norm' inside 'model'"),
        ('{"": "cpu", "lm_head": "disk"}', "'lm_head' inside ''"),
    ):
        with pytest.raises(InputError, match=message):
            parse_device_map(text)


@pytest.mark.parametrize("family", ["olmoe", "qwen2_moe", "gpt_oss"])
def test_capture_is_exact_with_a_part_of_the_model_on_disk(family: str, tmp_path: Path) -> None:
    model = build(family)
    model.save_pretrained(tmp_path / "checkpoint")
    limit = weight_bytes(model.model.layers[-1]) + weight_bytes(model.model.embed_tokens) + 4096
    offloaded = profiler.load_model(tmp_path / "checkpoint", memory_limit={"cpu": limit})
    places = set(offloaded.hf_device_map.values())
    assert places == {"cpu", "disk"}
    inputs, runs = batch(padding="left"), []
    for name, watched in (("whole", model), ("offloaded", offloaded)):
        with torch.no_grad(), profiler.watch(watched, store=tmp_path, name=name, level="activations") as session:
            watched(**inputs)
        assert session.path is not None
        runs.append(store.open_run(session.path))
    whole, part = runs
    assert part.badge.status == "valid", part.badge.reason
    assert_array_equal(part.selections().ids, whole.selections().ids)
    assert_array_equal(part.selections().weights, whole.selections().weights)
    for table in ("expert_load", "router_load", "expert_output", "residual"):
        assert_frame_equal(part.table(table), whole.table(table), rel_tol=1e-6)


def test_a_device_map_says_what_goes_to_disk(checkpoint: Path) -> None:
    places: dict[str, Any] = {f"model.layers.{index}": "cpu" for index in range(4)}
    places |= dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    model = profiler.load_model(checkpoint, device_map=json.dumps({**places, "model.layers.2": "disk"}))
    offloaded = {name for name, parameter in model.named_parameters() if parameter.is_meta}
    assert offloaded and all(name.startswith("model.layers.2.") for name in offloaded)
    with torch.no_grad():
        assert torch.equal(model(**batch()).logits, build("olmoe")(**batch()).logits)


def test_temporary_offload_folders_are_removed(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "offload"
    monkeypatch.setattr(placement.tempfile, "mkdtemp", lambda prefix: folder.mkdir() or str(folder))
    model = profiler.load_model(checkpoint, memory_limit="600KB")
    assert any(folder.iterdir())
    del model
    gc.collect()
    assert not folder.exists()
    (checkpoint / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(ModelError, match="cannot be loaded"):
        profiler.load_model(checkpoint, memory_limit="600KB")
    assert not folder.exists()
    build("olmoe").save_pretrained(checkpoint)
    kept = tmp_path / "kept"
    del profiler.load_model(checkpoint, memory_limit="600KB", offload_folder=kept).config
    gc.collect()
    assert any(kept.iterdir())


def test_packed_weights_are_loaded_where_they_run() -> None:
    assert plan_placement("cuda:1").at_once().device_map == {"": "cuda:1"}
    assert plan_placement("cpu").at_once().device_map is None
    assert plan_placement("cuda:1", device_map="balanced").at_once().device_map == "balanced"


def test_what_cannot_fit_is_refused_with_numbers(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", lambda *_, **__: pytest.fail("it was read"))
    with pytest.raises(InputError, match=r"largest layer takes 0\.000323 GiB, more than the memory limit of 9\.31e-08"):
        profiler.load_model(checkpoint, memory_limit="100B")
    monkeypatch.setattr(placement, "_free", lambda device: 1 << 20)
    with pytest.raises(InputError, match=r"weights take 0\.00135 GiB, but 0\.000977 GiB of memory are free on cpu"):
        profiler.load_model(checkpoint, device="cpu")

    class Disk:
        free = 1000

    monkeypatch.setattr(placement.shutil, "disk_usage", lambda _: Disk)
    with pytest.raises(InputError, match=r"do not fit into the memory limit, and .* has 9\.31e-07 GiB free"):
        profiler.load_model(checkpoint, memory_limit="600KB")


def test_one_device_needs_no_accelerate_and_a_limit_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement.importlib.util, "find_spec", lambda _: None)
    plan = plan_placement("cpu")
    with plan.loading() as options:
        assert options == {} and plan.device == "cpu"
    with pytest.raises(ModelError, match="pip install accelerate"):
        plan_placement("cpu", memory_limit=GIB)


def test_the_command_refuses_before_it_reads_the_corpus(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer().save_pretrained(checkpoint)
    words = ["collect", str(checkpoint), "--data", str(tmp_path), "--store", str(tmp_path / "runs")]
    monkeypatch.setattr("profiler.corpus.open_corpus", lambda *_, **__: pytest.fail("the corpus was read"))
    for given, message in (
        (["--memory-limit", "plenty"], "'plenty' is no size of memory"),
        (["--device-map", "abacus"], "'abacus' is no device"),
        (["--device-map", "{1"], "no JSON object"),
    ):
        assert main([*words, *given]) == 2
        assert message in capsys.readouterr().err


def test_the_command_collects_with_layers_on_disk(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer().save_pretrained(checkpoint)
    (tmp_path / "text.txt").write_text("A text of some words. " * 20)
    words = ["collect", str(checkpoint), "--data", str(tmp_path / "text.txt"), "--store", str(tmp_path / "runs")]
    words += ["--memory-limit", "800KB", "--offload-folder", str(tmp_path / "offload"), "--sequence-length", "32"]
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["capture"] == "valid"
    assert any((tmp_path / "offload").iterdir())


def test_files_that_are_no_checkpoint_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ModelError, match=r"or a \.gguf file"):
        profiler.load_model(tmp_path / "notes.txt")
    with pytest.raises(ModelError, match=r"nowhere\.gguf is no file"):
        profiler.load_model("folder/nowhere.gguf")  # not asked of the hub
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(40))
    with pytest.raises(ModelError, match=r"broken\.gguf cannot be (loaded|read)") as caught:
        profiler.load_model(tmp_path / "broken.gguf")
    assert "\n" not in str(caught.value)


def test_code_of_a_checkpoint_is_not_run_with_a_device_map(checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    config.update(model_type="unheard_of", auto_map={"AutoModelForCausalLM": "code.Model", "AutoConfig": "code.Config"})
    (checkpoint / "config.json").write_text(json.dumps(config))
    (checkpoint / "code.py").write_text("raise SystemExit('code of the checkpoint ran')")
    with pytest.raises(ModelError, match="never runs code that comes with a checkpoint"):
        profiler.load_model(checkpoint, device_map="cpu")
