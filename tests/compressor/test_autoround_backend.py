"""AutoRound as a backend: what its process is told, what becomes of its result, and how failures end.

A stand-in named ``auto_round`` writes down what it is asked, and rounds the source to the widths that it is told.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from compressor import edited
from compressor.autoround import Report, Tuning, apply, backend, job
from compressor.autoround.judgement import judged
from compressor.plan import DropLayer, DropStep, Plan
from moescope.errors import InputError, PlanError, RunError
from sample_data import MODEL
from tests.compressor.apply_cases import saved
from tests.compressor.bit_plans import quantize, quantizing
from tests.compressor.edit_plans import plan, source

SIZES = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_experts": 4}
STAND_IN = """
import json, os, sys, torch
from pathlib import Path
if os.environ.get("STAND_IN") == "fails":
    print("first line", file=sys.stderr); print("ValueError: out of luck", file=sys.stderr); sys.exit(7)
if os.environ.get("STAND_IN") == "waits":
    Path(os.environ["STARTED"]).write_text(str(os.getpid())); import time; time.sleep(120)

class AutoRound:
    def __init__(self, model, tokenizer, **told):
        told["dataset"] = [tuple(batch.shape) for batch in told["dataset"]]
        self.model, self.told = model, told
    def quantize_and_save(self, folder, format):
        with torch.no_grad():
            for name, entry in self.told["layer_config"].items():
                if "experts" not in name or entry["bits"] >= 16: continue
                path, expert, part = name.rsplit(".", 2)
                experts = self.model.get_submodule(path)
                if part == "down_proj": matrix = experts.down_proj[int(expert)]
                else: matrix = experts.gate_up_proj[int(expert)].chunk(2)[part == "up_proj"]
                steps = 2 ** (entry["bits"] - 1) - 0.5
                scale = matrix.abs().amax(-1, keepdim=True) / steps
                matrix.copy_((matrix / scale - 0.5).round().add(0.5).clamp(-steps, steps) * scale)
        target = Path(folder) / "model-w4g64"
        self.model.save_pretrained(target)
        Path(os.environ["TOLD"]).write_text(json.dumps({**self.told, "format": format}))
        print("quantized layer 1 of 2")
"""
"""Rounds the fused experts, and leaves them fused, so that the modules of the experts are not there to be looked at."""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that the stand-in writes what it was told to."""
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "auto_round.py").write_text(textwrap.dedent(STAND_IN))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "packages"))
    monkeypatch.setenv("TOLD", str(tmp_path / "told.json"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path / "told.json"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp("model") / "olmoe"
    made = saved("olmoe", folder, **SIZES)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(MODEL / name, folder / name)
    return made, folder


def widths(known: Any, *before: Any) -> Plan:
    def bits(layer: int, expert: int, part: str) -> Any:
        return (8, 4, 2, None)[expert]

    return plan(known, *before, quantize(known, bits))


def test_the_plan_is_told_and_the_result_put_in_its_place(
    model: tuple[Any, Path], stand_in: Path, tmp_path: Path
) -> None:
    what, lines = widths(source(model[0])), []
    receipt, report = apply(
        what, source=model[1], destination=tmp_path / "out", tokens=[list(range(300)), list(range(340))],
        tuning=Tuning(iters=60, samples=4, length=100, batch=2), tell=lines.append,
    )  # fmt: skip
    told = json.loads(stand_in.read_text())
    config = told["layer_config"]
    expected = {
        f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj": (8, 4, 2, 16)[expert]
        for layer in (0, 1) for expert in range(4) for part in ("gate", "up", "down")
    }  # fmt: skip
    assert {name: entry["bits"] for name, entry in config.items() if "experts" in name} == expected
    rest = {name: entry["bits"] for name, entry in config.items() if "experts" not in name}
    assert set(rest.values()) == {16} and "model.layers.0.self_attn.q_proj" in rest and "lm_head" not in rest
    assert (told["iters"], told["seqlen"], told["nsamples"], told["format"]) == (60, 100, 4, "auto_round")
    assert told["dataset"] == [[2, 100], [2, 100]] and told["disable_model_free"] is True
    assert "disable_opt_rtn" not in told
    assert told["scheme"] == {"bits": 4, "group_size": 64, "sym": False, "data_type": "int"}
    assert "quantized layer 1 of 2" in lines
    assert receipt.destination == tmp_path / "out" and receipt.loads_with == "transformers with auto-round"
    assert Plan.load(tmp_path / "out" / "moescope_plan.json") == what
    assert (tmp_path / "out" / "README.md").is_file() and not list(tmp_path.glob(".out*"))
    assert report.missing == report.mismatched == ()
    assert report.logits.shape[0] == 64 and torch.equal(report.ids, torch.arange(64))
    assert set(report.widths) == {name for name, bits in expected.items() if bits < 16}
    assert set(report.errors) == set(report.widths) and set(report.errors.values()) == {None}


def test_rounding_to_nearest_needs_no_text(
    model: tuple[Any, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known, told = source(model[0]), {}
    layers = tuple(DropLayer(layer=layer, experts=(0,)) for layer in (0, 1))
    drop = DropStep(method="test", form="uniform", layers=layers)
    what = plan(known, drop, quantize(known, lambda layer, expert, part: (None, 8, 4, 2)[expert]))

    def keep(python: str, part: str, folder: Path, tell: Any) -> None:
        told.update(json.loads((folder / "job.json").read_text()), part=part)
        told["experts"] = json.loads((Path(told["source"]) / "config.json").read_text())["num_experts"]
        raise RunError("enough")

    monkeypatch.setattr(backend, "require_auto_round", lambda python: None)
    monkeypatch.setattr(backend, "run_job", keep)
    with pytest.raises(RunError, match="enough"):
        apply(what, source=model[1], destination=tmp_path / "out", tuning=Tuning(iters=0))
    bits = [told["layer_config"][f"model.layers.1.mlp.experts.{place}.up_proj"]["bits"] for place in range(3)]
    assert bits == [8, 4, 2]
    assert "model.layers.1.mlp.experts.3.up_proj" not in told["layer_config"]
    assert (told["part"], told["experts"], told["iters"], len(told["rows"])) == ("quantize", 3, 0, 1)
    assert not list(tmp_path.iterdir())


def test_errors_are_those_of_what_a_module_makes() -> None:
    linear = torch.nn.Linear(8, 6)
    weight = linear.weight.detach().clone()
    assert job._error(linear, weight, "cpu") == pytest.approx(0, abs=1e-6)
    assert job._error(linear, 2 * weight, "cpu") == pytest.approx(0.5, abs=1e-6)
    assert job._error(None, weight, "cpu") is None


def test_what_was_seen_is_judged(model: tuple[Any, Path]) -> None:
    what = widths(source(model[0]))
    names = {
        f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj": (8, 4, 2)[expert]
        for layer in (0, 1) for expert in range(3) for part in ("gate", "up", "down")
    }  # fmt: skip
    errors: dict[str, float | None] = {name: {8: 0.005, 4: 0.09, 2: 0.45}[bits] for name, bits in names.items()}
    ids = torch.arange(64)
    with torch.no_grad(), edited(model[0], what):
        logits = model[0](ids[None]).logits[0]
    right = Report((), (), errors, names, ids, logits, tuned=False)
    found = judged(what, right, model[0])
    assert found.passed and found.logits is not None and found.logits.relative < 1e-6
    assert found.weights is not None and len(found.weights.rows) == len(names)
    assert any("routers" in sentence for sentence in found.not_checked)
    wrong = "model.layers.1.mlp.experts.2.down_proj"
    for error, words in ((0.0, "skipped"), (1.4, "wrong decode"), (0.2, "outside band")):
        failure = judged(what, replace(right, errors={**errors, wrong: error})).failure
        assert words in failure and "down projection of routed expert 2 of layer 1" in failure
    rough = {name: {8: 0.08, 4: 0.14, 2: 0.55}[bits] for name, bits in names.items()}
    assert judged(what, replace(right, errors=rough, tuned=True)).passed
    assert not judged(what, replace(right, errors=rough)).passed
    assert "no such module" in judged(what, replace(right, errors={**errors, wrong: None})).failure
    assert judged(what, replace(right, missing=("lm_head.weight",))).failure == "the result lacks lm_head.weight"
    assert any("pydantic" in sentence for sentence in judged(what, replace(right, errors={})).not_checked)


def test_a_failure_ends_with_its_last_line(
    model: tuple[Any, Path], stand_in: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAND_IN", "fails")
    with pytest.raises(RunError, match="^AutoRound failed: ValueError: out of luck$"):
        apply(widths(source(model[0])), source=model[1], destination=tmp_path / "out", tuning=Tuning(iters=0))
    assert not list(tmp_path.glob("*out*"))


def test_what_cannot_be_is_refused_before_anything_runs(model: tuple[Any, Path], tmp_path: Path) -> None:
    known = source(model[0])
    fine = {"source": model[1], "destination": tmp_path / "out"}
    with pytest.raises(InputError, match=r"pip install 'moescope\[quantize\]'"):
        apply(widths(known), tuning=Tuning(iters=0), python=_bare_python(tmp_path), **fine)
    with pytest.raises(InputError, match="tuning needs text, at least 512 tokens, and got 0"):
        apply(widths(known), **fine)
    with pytest.raises(InputError, match="5 steps make weights worse"):
        apply(widths(known), tuning=Tuning(iters=5), **fine)
    bare = tmp_path / "bare"
    shutil.copytree(model[1], bare, ignore=shutil.ignore_patterns("tokenizer*"))
    with pytest.raises(InputError, match="has no tokenizer"):
        apply(widths(known), tuning=Tuning(iters=0), source=bare, destination=tmp_path / "out")
    ternary = plan(known, quantize(known, lambda *_: "ternary", form="dense"))
    with pytest.raises(PlanError, match="AutoRound has no such width"):
        apply(ternary, tuning=Tuning(iters=0), **fine)
    with pytest.raises(PlanError, match="gpt_oss is not for AutoRound"):
        apply(quantizing("gpt_oss", lambda *_: 4), tuning=Tuning(iters=0), **fine)
    mixed = plan(known, quantize(known, lambda layer, expert, part: 1 if expert == 2 else 4, form="dense"))
    with pytest.raises(PlanError, match="AutoRound cannot do all of the plan: layer 0 expert 2"):
        apply(mixed, tuning=Tuning(iters=0), **fine)


def _bare_python(folder: Path) -> str:
    """A Python that finds no packages."""
    script = folder / "python"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -S -I "$@"\n')
    script.chmod(0o755)
    return str(script)


def test_ctrl_c_ends_the_process_too(
    model: tuple[Any, Path], stand_in: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = tmp_path / "started"
    monkeypatch.setenv("STAND_IN", "waits")
    monkeypatch.setenv("STARTED", str(started))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it

    def interrupt() -> None:
        end = time.monotonic() + 60
        while not (started.exists() and started.read_text()) and time.monotonic() < end:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        apply(widths(source(model[0])), source=model[1], destination=tmp_path / "out", tuning=Tuning(iters=0))
    thread.join()
    with pytest.raises(ProcessLookupError):
        os.kill(int(started.read_text()), 0)
    assert not list(tmp_path.glob("*out*"))


def test_the_real_one_makes_what_was_planned(model: tuple[Any, Path], tmp_path: Path) -> None:
    pytest.importorskip("auto_round")
    _, report = apply(widths(source(model[0])), source=model[1], destination=tmp_path / "out", tuning=Tuning(iters=0))
    assert report.missing == () and report.errors
    bands = {8: (1e-4, 0.02), 4: (0.06, 0.2), 2: (0.28, 0.7)}
    for name, error in report.errors.items():
        low, high = bands[report.widths[name]]
        assert error is not None and low <= error <= high, name


def test_the_job_reads_without_its_packages() -> None:
    job = Path(__file__).parents[2] / "compressor" / "autoround" / "job.py"
    done = subprocess.run(
        [sys.executable, "-S", "-I", "-c", f"import runpy; runpy.run_path({str(job)!r})"], check=False
    )
    assert done.returncode == 0
