"""Applying plans: what the result holds, what the receipt says, what is refused, and what an interruption leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import compressor
from compressor.edits.moments import LayerMoments
from compressor.plan import (
    DropLayer,
    DropStep,
    GivenUp,
    MergeGroup,
    MergeLayer,
    MergeStep,
    Plan,
    SlimExpert,
    SlimLayer,
    SlimStep,
    Step,
)
from moescope.errors import InputError, ModelError, PlanError, RunError
from tests.compressor import edit_plans
from tests.compressor.apply_cases import (
    assert_same_output,
    config,
    digest,
    drop,
    header,
    plan_of,
    reload,
    saved,
    slim,
    tensors,
)

ROOT = Path(__file__).parents[2]
GONE = (1, 6)


@pytest.fixture(scope="module")
def olmoe(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """An OLMoE in several files, with what stands beside weights on a hub."""
    folder = tmp_path_factory.mktemp("olmoe")
    model = saved("olmoe", folder, shard="200KB")
    for name, text in {
        "README.md": "---\nlicense: apache-2.0\nlanguage:\n- en\nmetrics:\n- bleu\n---\n# OLMoE\n",
        "tokenizer.json": "{}",
        "chat_template.jinja": "{{ messages }}",
        "LICENSE": "Apache",
        "modeling_own.py": "x = 1\n",
        "pytorch_model.bin": "weights",
        "model.gguf": "weights",
    }.items():
        (folder / name).write_text(text)
    return model, folder


def test_each_file_becomes_one_file(olmoe: tuple[Any, Path], tmp_path: Path) -> None:
    model, folder = olmoe
    before = digest(folder)
    told: list[tuple[int, int]] = []
    receipt = compressor.apply(
        drop(model, GONE), source=folder, destination=tmp_path / "out", progress=lambda *step: told.append(step)
    )
    assert digest(folder) == before
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(names) > 3
    assert sorted(path.name for path in (tmp_path / "out").glob("*.safetensors")) == names
    old, new = tensors(folder), tensors(tmp_path / "out")
    kept = [expert for expert in range(8) if expert not in GONE]
    for layer in range(4):
        for place, expert in enumerate(kept):
            for part in ("gate_proj", "up_proj", "down_proj"):
                name = "model.layers.{}.mlp.experts.{}.{}.weight"
                assert torch.equal(new.pop(name.format(layer, place, part)), old[name.format(layer, expert, part)])
        router = f"model.layers.{layer}.mlp.gate.weight"
        assert torch.equal(new.pop(router), old[router][kept])
    assert all(torch.equal(value, old[name]) for name, value in new.items())
    assert receipt.tensors_removed == 4 * 2 * 3 and receipt.tensors_edited == 4
    assert receipt.tensors_copied == len(old) - 4 * 2 * 3 - 4
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    places = {name: path for path in names for name in header(tmp_path / "out" / path)}
    assert index["weight_map"] == places
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in tensors(tmp_path / "out").values())
    assert receipt.bytes_after == sum((tmp_path / "out" / name).stat().st_size for name in names)
    assert receipt.bytes_before == sum((folder / name).stat().st_size for name in names)
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert told[-1] == (receipt.bytes_after, receipt.bytes_after)


def test_files_beside_the_weights(olmoe: tuple[Any, Path], tmp_path: Path) -> None:
    model, folder = olmoe
    plan = drop(model, GONE)
    compressor.apply(plan, source=folder, destination=tmp_path / "out")
    result = {path.name for path in (tmp_path / "out").iterdir() if path.suffix != ".safetensors"}
    assert result == {
        "LICENSE", "README.md", "chat_template.jinja", "config.json", "generation_config.json", "modeling_own.py",
        "model.safetensors.index.json", "moescope_plan.json", "tokenizer.json",
    }  # fmt: skip
    assert Plan.load(tmp_path / "out" / "moescope_plan.json") == plan
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlicense: apache-2.0\nlanguage:\n- en\nlibrary_name: transformers\n")
    assert "bleu" not in card and "| 3 | 3 | 8 → 6 |" in card and "Nothing was measured" in card
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]
    # A result can be the source of the next plan; the first plan stays beside the second.
    again = drop(reload("olmoe", tmp_path / "out"), (0,))
    compressor.apply(again, source=tmp_path / "out", destination=tmp_path / "more")
    assert Plan.load(tmp_path / "more" / "moescope_plan.1.json") == plan
    assert Plan.load(tmp_path / "more" / "moescope_plan.json") == again


def test_dry_run_writes_nothing(olmoe: tuple[Any, Path], tmp_path: Path) -> None:
    model, folder = olmoe
    plan = drop(model, GONE)
    before = digest(folder)
    dry = compressor.apply(plan, source=folder, destination=tmp_path / "out", dry_run=True)
    assert dry.dry_run and not list(tmp_path.iterdir()) and digest(folder) == before
    real = compressor.apply(plan, source=folder, destination=tmp_path / "out")
    for name in ("bytes_before", "bytes_after", "tensors_copied", "tensors_edited", "tensors_removed", "loads_with"):
        assert getattr(dry, name) == getattr(real, name), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_types_stay(tmp_path: Path, dtype: torch.dtype) -> None:
    model = saved("qwen3_moe", tmp_path / "in", dtype=dtype)
    groups = _pairs(4)
    plan = plan_of(model, MergeStep(grouping="test", method="average", layers=groups))
    compressor.apply(plan, source=tmp_path / "in", destination=tmp_path / "out")
    old, new = tensors(tmp_path / "in"), tensors(tmp_path / "out")
    assert {value.dtype for value in new.values()} == {dtype}
    for part in ("gate_proj", "up_proj", "down_proj"):
        name = "model.layers.2.mlp.experts.{}." + part + ".weight"
        mean = 0.25 * old[name.format(0)].double() + 0.75 * old[name.format(1)].double()
        # Rounded to the type once; arithmetic in float32 may turn a tie.
        assert (new[name.format(0)].double() - mean).abs().max() <= torch.finfo(dtype).eps * mean.abs().max()
        assert torch.equal(new[name.format(1)], old[name.format(2)])


def _pairs(layers: int) -> tuple[MergeLayer, ...]:
    groups = (
        MergeGroup(lead=1, members=(0, 1), weights=(0.25, 0.75)),
        *(MergeGroup(lead=expert, members=(expert,), weights=(1.0,)) for expert in range(2, 8)),
    )
    return tuple(MergeLayer(layer=layer, groups=groups) for layer in range(layers))


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "dbrx", "granitemoe"])
def test_merged_experts(tmp_path: Path, family: str) -> None:
    model = saved(family, tmp_path / "in")
    step = MergeStep(grouping="test", method="average", router="mean", layers=_pairs(4))
    receipt = compressor.apply(plan_of(model, step), source=tmp_path / "in", destination=tmp_path / "out")
    old, new = model.state_dict(), reload(family, tmp_path / "out").state_dict()
    assert receipt.loads_with == "transformers"
    seen = 0
    for name, value in old.items():
        packed = family == "dbrx" and ".experts.mlp." in name
        value = value.reshape(8, 48, -1) if packed else value
        if value.shape[0] != 8 or not any(word in name for word in ("expert", "router", "gate.", "moe")):
            assert torch.equal(new[name], value), name
            continue
        wanted = torch.cat([0.25 * value[:1].double() + 0.75 * value[1:2].double(), value[2:].double()])
        found = new[name].reshape(7, 48, -1) if packed else new[name]
        assert torch.allclose(found.double(), wanted, rtol=0, atol=1e-7), name
        seen += 1
    assert seen >= 4 * 3


@pytest.mark.parametrize("method", ["nearest", "aligned", "segments", "subspace"])
def test_merges_that_look_at_weights_are_those_in_memory(tmp_path: Path, method: Any) -> None:
    model = saved("qwen2_moe", tmp_path / "in", shard="100KB")
    layers = _pairs(4)
    if method == "segments":
        lone = layers[0].groups[1:]
        layers = tuple(
            MergeLayer(
                layer=layer, groups=lone, given_up=(GivenUp(expert=0, weight=1.0), GivenUp(expert=1, weight=2.0))
            )
            for layer in range(4)
        )
    needed: dict[str, dict[str, Any]] = {"segments": {"threshold": -1.0}, "subspace": {"rank": 20}}
    own = needed.get(method, {})
    plan = plan_of(model, MergeStep(grouping="test", method=method, layers=layers, **own))
    moments = {(layer, 0): LayerMoments(torch.eye(64).double(), torch.rand(8, 32)) for layer in range(4)}
    if method == "subspace":
        with pytest.raises(PlanError, match="needs the second moments"):
            compressor.apply(plan, source=tmp_path / "in", destination=tmp_path / "out")
    compressor.apply(plan, source=tmp_path / "in", destination=tmp_path / "out", moments=moments)
    compressor.edit(model, plan, moments=moments)
    result = reload("qwen2_moe", tmp_path / "out").state_dict()
    for name, value in model.state_dict().items():
        assert torch.allclose(result[name], value, rtol=0, atol=1e-7), name


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss", "nemotron_h"])
def test_dropped_block(tmp_path: Path, family: str) -> None:
    model = saved(family, tmp_path / "in")
    compressor.apply(
        plan_of(model, DropStep(method="test", blocks=(3,))), source=tmp_path / "in", destination=tmp_path / "out"
    )
    old, new = tensors(tmp_path / "in"), tensors(tmp_path / "out")
    for name, value in old.items():
        silent = ".layers.3." in name and "down_proj" in name and "expert" in name
        assert torch.equal(new[name], torch.zeros_like(value) if silent else value), name
    assert sum(not torch.equal(old[name], new[name]) for name in old) >= 2


def test_masked_neurons_are_zero_in_their_places(tmp_path: Path) -> None:
    model = saved("llama4_text", tmp_path / "in")
    plan, masks = slim(model, 20, "masked")
    receipt = compressor.apply(plan, source=tmp_path / "in", destination=tmp_path / "out")
    assert receipt.bytes_after == receipt.bytes_before and config(tmp_path / "out") == config(tmp_path / "in")
    old, new = tensors(tmp_path / "in"), tensors(tmp_path / "out")
    for (layer, expert), mask in masks.items():
        name = f"model.layers.{layer}.feed_forward.experts"
        assert torch.equal(new[f"{name}.down_proj"][expert], old[f"{name}.down_proj"][expert] * mask[:, None])
        both = torch.cat([mask, mask])
        assert torch.equal(new[f"{name}.gate_up_proj"][expert], old[f"{name}.gate_up_proj"][expert] * both)


def test_slimmed_shared_experts_are_filled_up_where_the_configuration_ties_them(tmp_path: Path) -> None:
    model = saved("deepseek_v3", tmp_path / "in", n_shared_experts=2)
    plan, _ = slim(model, 20)
    mask = torch.ones(64, dtype=torch.bool)
    mask[:10] = False
    routed = plan.steps[0]
    assert isinstance(routed, SlimStep)
    shared = SlimExpert.of(expert=0, mask=mask.numpy(), role="shared")
    step: Step = routed.model_copy(
        update={"layers": tuple(SlimLayer(layer=each.layer, experts=(*each.experts, shared)) for each in routed.layers)}
    )
    receipt = compressor.apply(plan_of(model, step), source=tmp_path / "in", destination=tmp_path / "out")
    assert any("filled up with zeros to 60 neurons" in note for note in receipt.notes)
    assert config(tmp_path / "out")["n_shared_experts"] == 3  # 54 neurons in multiples of 20
    old, new = tensors(tmp_path / "in"), tensors(tmp_path / "out")
    name = "model.layers.2.mlp.shared_experts.up_proj.weight"
    assert torch.equal(new[name][:54], old[name][10:]) and not new[name][54:].any()
    reload("deepseek_v3", tmp_path / "out")


def test_padding_is_refused_by_the_checkpoints_family_too(tmp_path: Path) -> None:
    known = edit_plans.source(saved("longcat_flash", tmp_path / "source"))
    layers = (DropLayer(layer=0, experts=(1,)),)
    another = known.model_copy(update={"model_type": "whole_model"})  # a plan may name the model around the decoder
    made = edit_plans.plan(another, DropStep(method="x", form="padded", layers=layers))
    content = {**config(tmp_path / "source"), "whole": {"model_type": "whole_model"}}
    (tmp_path / "source" / "config.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(PlanError, match="longcat_flash chooses by a softmax over all experts"):
        compressor.apply(made, source=tmp_path / "source", destination=tmp_path / "out")


def test_padded_experts_are_never_chosen(tmp_path: Path) -> None:
    model = saved("minimax_m2", tmp_path / "in")
    gone = {0: (1, 6), 1: (0, 2, 5, 7), 2: (3,), 3: (0, 1)}
    plan = drop(model, gone, form="padded")
    receipt = compressor.apply(plan, source=tmp_path / "in", destination=tmp_path / "out")
    assert receipt.loads_with == "transformers" and config(tmp_path / "out")["num_local_experts"] == 7
    uneven = drop(model, gone, form="per_layer")
    compressor.apply(uneven, source=tmp_path / "in", destination=tmp_path / "uneven")
    assert_same_output(reload("minimax_m2", tmp_path / "out"), compressor.load(tmp_path / "uneven"))


def test_destinations_that_cannot_be(olmoe: tuple[Any, Path], tmp_path: Path) -> None:
    model, folder = olmoe
    plan, before = drop(model, GONE), digest(folder)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for destination, reason in (
        (folder, "inside each other"),
        (folder / "out", "inside each other"),
        (folder.parent, "inside each other"),
        (tmp_path / "full", "not empty"),
        (tmp_path / "file", "is a file"),
    ):
        with pytest.raises(InputError, match=reason):
            compressor.apply(plan, source=folder, destination=destination)
    assert digest(folder) == before and (tmp_path / "full" / "file").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    compressor.apply(plan, source=folder, destination=tmp_path / "empty")
    compressor.apply(plan, source=folder, destination=tmp_path / "new" / "and" / "deep")
    assert digest(tmp_path / "empty").keys() == digest(tmp_path / "new" / "and" / "deep").keys()


def test_too_little_room(olmoe: tuple[Any, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(InputError, match=r"needs 0\.00 GiB and .* has 0\.00 GiB free"):
        compressor.apply(drop(olmoe[0], GONE), source=olmoe[1], destination=tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_plans_for_another_model(olmoe: tuple[Any, Path], tmp_path: Path) -> None:
    model, folder = olmoe
    plan = drop(model, GONE)
    shape = plan.source.layers[0]

    def changed(**values: Any) -> Plan:
        return plan.model_copy(update={"source": plan.source.model_copy(update=values)})

    def layers(**values: Any) -> tuple[Any, ...]:
        return tuple(each.model_copy(update=values) for each in plan.source.layers)

    for other, reason in (
        (changed(model_type="mixtral"), "plan is for a mixtral"),
        (changed(num_layers=5), "5 decoder layers; the checkpoint has 4"),
        (changed(hidden_size=32), "width 32; the checkpoint's is 64"),
        (changed(layers=layers(num_experts=9)), "9 experts in layer 0; the checkpoint has 8"),
        (changed(layers=layers(top_k=3)), "3 experts per token in layer 0; the checkpoint has 2"),
        (changed(layers=layers(width=40)), "40 neurons per expert in layer 0; the checkpoint has 48"),
        (changed(layers=(*layers()[:3], shape.model_copy(update={"layer": 3, "top_k": 1}))), "1 experts per token"),
    ):
        with pytest.raises(PlanError, match=reason):
            compressor.apply(other, source=folder, destination=tmp_path / "out")
    silent = plan_of(model, DropStep(method="test", blocks=(0,)))
    source = silent.source.model_copy(update={"layers": layers()[:3]})
    with pytest.raises(PlanError, match="layer 3 has experts in the checkpoint, not in the plan"):
        compressor.apply(silent.model_copy(update={"source": source}), source=folder, destination=tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_an_interruption_goes_on_where_it_was(olmoe: tuple[Any, Path], tmp_path: Path) -> None:
    model, folder = olmoe
    plan = drop(model, GONE)
    compressor.apply(plan, source=folder, destination=tmp_path / "whole")
    (tmp_path / "other").mkdir()
    out = tmp_path / "other" / "whole"
    partial = out.with_name(".whole.partial")

    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compressor.apply(plan, source=folder, destination=out, progress=stop)
    kept = {path.name: path.stat().st_ino for path in partial.glob("*.safetensors")}
    assert kept and not out.exists()
    damaged = sorted(kept)[0]
    with open(partial / damaged, "r+b") as stream:
        stream.truncate(100)
    compressor.apply(plan, source=folder, destination=out)
    assert digest(out) == digest(tmp_path / "whole") and not partial.exists()
    inodes = {name: (out / name).stat().st_ino for name in kept}
    assert inodes[damaged] != kept[damaged]
    assert all(inodes[name] == kept[name] for name in kept if name != damaged)


def test_another_plan_starts_over(olmoe: tuple[Any, Path], tmp_path: Path) -> None:
    model, folder = olmoe

    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compressor.apply(drop(model, GONE), source=folder, destination=tmp_path / "out", progress=stop)
    left = {path.stat().st_ino for path in (tmp_path / ".out.partial").glob("*.safetensors")}
    other = drop(model, (0, 7))
    compressor.apply(other, source=folder, destination=tmp_path / "out")
    compressor.apply(other, source=folder, destination=tmp_path / "b" / "out")
    assert left and digest(tmp_path / "out") == digest(tmp_path / "b" / "out")


SLOW = """
import sys, time, compressor
plan = compressor.Plan.load(sys.argv[1])
def slowly(done, total):
    print(done, flush=True)
    time.sleep(0.02)
compressor.apply(plan, source=sys.argv[2], destination=sys.argv[3], progress=slowly)
"""


def test_killed_and_resumed_is_the_same_byte_for_byte(olmoe: tuple[Any, Path], tmp_path: Path) -> None:
    model, folder = olmoe
    plan = drop(model, GONE)
    plan.save(tmp_path / "plan.json")
    compressor.apply(plan, source=folder, destination=tmp_path / "a" / "out")
    before = digest(folder)
    command = [sys.executable, "-c", SLOW, str(tmp_path / "plan.json"), str(folder), str(tmp_path / "b" / "out")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    partial = tmp_path / "b" / ".out.partial"
    while process.stdout.readline():
        if len(list(partial.glob("*.safetensors"))) >= 2:
            break
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not (tmp_path / "b" / "out").exists() and partial.exists()
    compressor.apply(plan, source=folder, destination=tmp_path / "b" / "out")
    assert digest(tmp_path / "b" / "out") == digest(tmp_path / "a" / "out") and digest(folder) == before


FULL = """
import resource, sys, compressor
from moescope.errors import RunError
plan = compressor.Plan.load(sys.argv[1])
import compressor.edits.layer
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    compressor.apply(plan, source=sys.argv[2], destination=sys.argv[3])
except RunError as error:
    print(error)
"""


def test_a_disk_that_takes_no_more(olmoe: tuple[Any, Path], tmp_path: Path) -> None:
    model, folder = olmoe
    drop(model, GONE).save(tmp_path / "plan.json")
    before = digest(folder)
    command = [sys.executable, "-c", FULL, str(tmp_path / "plan.json"), str(folder), str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "cannot be written: File too large" in done.stdout and len(done.stdout.splitlines()) == 1
    assert not (tmp_path / "out").exists() and digest(folder) == before


def test_errors_of_the_disk_are_one_line(
    olmoe: tuple[Any, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(RunError, match=r"cannot be written: No space left on device: make room"):
            compressor.apply(drop(olmoe[0], GONE), source=olmoe[1], destination=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    compressor.apply(drop(olmoe[0], GONE), source=olmoe[1], destination=tmp_path / "out")


@pytest.mark.parametrize("missing", ["copy_file_range", "both"])
def test_file_systems_that_copy_otherwise(
    olmoe: tuple[Any, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    plan = drop(olmoe[0], GONE)
    compressor.apply(plan, source=olmoe[1], destination=tmp_path / "a" / "out")

    def no(*_: Any) -> int:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "copy_file_range", no)
    if missing == "both":
        monkeypatch.setattr(os, "sendfile", no)
    compressor.apply(plan, source=olmoe[1], destination=tmp_path / "b" / "out")
    assert digest(tmp_path / "a" / "out") == digest(tmp_path / "b" / "out")


def test_two_processes_do_not_write_one_result(olmoe: tuple[Any, Path], tmp_path: Path) -> None:
    model, folder = olmoe
    plan = drop(model, GONE)

    def meanwhile(done: int, total: int) -> None:
        with pytest.raises(RunError, match="another process is writing"):
            compressor.apply(plan, source=folder, destination=tmp_path / "out")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compressor.apply(plan, source=folder, destination=tmp_path / "out", progress=meanwhile)


def test_a_wrong_result_is_not_published(
    olmoe: tuple[Any, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.copy_file_range

    def shifted(source: int, target: int, count: int, start: int, begin: int) -> int:
        return real(source, target, count, max(start - 2, 0), begin)

    plan = drop(olmoe[0], GONE)
    with monkeypatch.context() as patch:
        patch.setattr(os, "copy_file_range", shifted)
        with pytest.raises(RunError, match="is not what the source holds"):
            compressor.apply(plan, source=olmoe[1], destination=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    compressor.apply(plan, source=olmoe[1], destination=tmp_path / "out")  # keeps nothing of what was wrong
    compressor.apply(plan, source=olmoe[1], destination=tmp_path / "a" / "out")
    assert digest(tmp_path / "a" / "out") == digest(tmp_path / "out")


def test_names_stay_functions() -> None:
    code = (
        "import sys, compressor, compressor.plan\n"
        "assert 'torch' not in sys.modules\n"
        "import compressor.apply\n"
        "from compressor.load import load\n"
        "assert callable(compressor.apply) and compressor.load is load and compressor.Plan is compressor.plan.Plan\n"
        "assert compressor.verify.__name__ == 'verify' and compressor.edit.__name__ == 'edit'\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_what_is_no_checkpoint(olmoe: tuple[Any, Path], tmp_path: Path) -> None:
    plan = drop(olmoe[0], GONE)
    for source, reason in ((tmp_path / "nowhere", "no folder"), (tmp_path, "has no config.json")):
        with pytest.raises(ModelError, match=reason):
            compressor.apply(plan, source=source, destination=tmp_path / "out" / "out")
    assert not (tmp_path / "out").exists()
