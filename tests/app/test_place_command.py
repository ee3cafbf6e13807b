"""``moescope place``: what it prints and keeps, counts alone, unequal devices, adapters, and mistakes in one line."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import place_runs
import pytest

import store
from app.cli import main, parser
from app.commands.place_adapters import adapters_of
from app.frames import compress_measured
from compressor.plan import Plan
from moescope.errors import PlanError
from planner.place.lpt import lpt
from planner.place.score import score
from planner.place.verdict import verdict
from planner.placing import place, placement_of, text_of
from sample_data import RUN

ROOT = Path(__file__).parents[2]
DOCS = (ROOT / "docs" / "placement.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with the bundled run and one of counts alone."""
    folder = tmp_path_factory.mktemp("store")
    for source in RUN.parent.glob("sample*.duckdb"):
        shutil.copyfile(source, folder / source.name)
    path, _ = place_runs.counts(folder / "imported")
    for file in path.parent.glob("counts*.duckdb"):
        shutil.copyfile(file, folder / file.name)
    return folder


def ask(directory: Path, *more: str, run: str = "sample") -> list[str]:
    return ["place", run, "--store", str(directory), *more]


def test_a_placement_is_printed_and_kept_beside_the_run(
    directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "plan.json"
    assert main(ask(directory, "--devices", "4", "--redundant", "4", "-o", str(file))) == 0
    out = capsys.readouterr().out
    plan = Plan.load(file)
    with store.open_run(directory / "sample.duckdb") as run:
        assert plan == place(run, devices=4, redundant=4)
        told = verdict(run, plan)
        # A plan that changes no checkpoint is none of those that Compress compares with what was measured.
        assert plan.digest not in [one.digest for _, one in compress_measured._plans(run)]
    assert told.sentence in out
    kept = next(one for one in store.list_plans(directory / "sample.duckdb") if plan.digest[:12] in one.name)
    assert str(kept) in out and str(file) in out and store.read_plan(kept) == file.read_text()
    rows = {line[:28].strip(): line[28:].split() for line in out.splitlines() if re.search(r"\s0\.\d+\s", line)}
    assert float(rows["as experts lie"][0]) == pytest.approx(told.before.mean_balancedness, abs=1e-4)
    assert float(rows["this placement"][1]) == pytest.approx(told.after.pass_balancedness, abs=1e-4)
    assert float(rows["LPT with swaps, no replicas"][0]) == pytest.approx(told.packed.mean_balancedness, abs=1e-4)
    assert float(rows["uniformly random experts"][1]) == pytest.approx(told.chance.pass_balancedness, abs=1e-4)
    assert f"to be sent: {told.copied} experts" in out and f"{told.changed_slots} of 120 slots change" in out
    assert f"worst domain: {told.worst_domain}" in out


def test_options_reach_the_planner(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = ["--devices", "4", "--method", "affinity", "--option", "slack=0.2", "--option", "objective=balance"]
    chosen += ["--batch", "16", "--train-part", "0.4", "--domains", "c, german", "--nodes", "2", "--json"]
    assert main(ask(directory, *chosen)) == 0
    answer = json.loads(capsys.readouterr().out)
    asked = {"devices": 4, "nodes": 2, "batch": 16, "train_part": 0.4, "domains": ["c", "german"]}
    with store.open_run(directory / "sample.duckdb") as run:
        plan = place(run, method="affinity", slack=0.2, objective="balance", **asked)
        told = verdict(run, plan, train_part=0.4, batch=16)
        later = text_of(run, plan.source, domains=["c", "german"], train_part=0.4).later
        assert later is not None
        best = score(later, lpt(load=later.counts(), devices=4, nodes=2), batch=16)
    assert answer["digest"] == plan.digest and answer["plan"] == json.loads(plan.text())
    assert answer["verdict"] == told.sentence and answer["gain"] == pytest.approx(told.gain)
    rows = {row["name"]: row for row in answer["placements"]}
    assert rows["after"]["nodes"] == pytest.approx(told.after.mean_node_fan_out)
    assert rows["best"]["per_pass"] == pytest.approx(best.pass_balancedness)
    assert answer["movement"] == {
        "slots": 96, "changed": told.changed_slots, "copied": told.copied, "expert_bytes": told.expert_bytes,
        "bytes": told.bytes_copied,
    }  # fmt: skip
    assert [row["domain"] for row in answer["domains"]] == ["c", "german"]


def test_counts_alone(directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, used = place_runs.counts(tmp_path)
    assert main(ask(directory, "--devices", "2", "--method", "lpt", "--json", run="counts")) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["verdict"] is None and answer["domains"] == []
    rows = {row["name"]: row for row in answer["placements"]}
    halves = used.reshape(3, 2, 4).sum(-1)
    assert rows["before"]["balancedness"] == pytest.approx((halves.mean(1) / halves.max(1)).mean())
    own = placement_of(Plan.parse(json.dumps(answer["plan"]))).load(used)
    assert rows["after"]["balancedness"] == pytest.approx((own.mean(1) / own.max(1)).mean())
    assert rows["after"]["balancedness"] > rows["before"]["balancedness"] + 0.1
    assert rows["after"]["per_pass"] is None and rows["after"]["remote"] is None
    moved = answer["movement"]
    assert moved["expert_bytes"] == place_runs.EXPERT_BYTES
    assert moved["bytes"] == moved["copied"] * place_runs.EXPERT_BYTES
    assert main(ask(directory, "--devices", "2", run="counts")) == 0
    out = capsys.readouterr().out
    assert "Not known: whether moving experts is worth it" in out and "per pass" not in out.split("to be sent")[0]
    assert main(ask(directory, "--devices", "2", "--method", "moetuner", run="counts")) == 2
    assert "needs a trace and the run holds counts: use eplb or lpt" in capsys.readouterr().err
    assert main(ask(directory, "--devices", "2", "--ray", "local", run="counts")) == 2
    assert "holds counts and no trace: there is no text to share, leave out --ray" in capsys.readouterr().err


def test_the_list_says_what_the_run_suffices_for(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["place", "--list"]) == 0
    out = capsys.readouterr().out
    assert "attention*, bandwidth*" in out and "here" not in out
    assert main(ask(directory, "--list", "--json", run="counts")) == 0
    rows = {row["method"]: row for row in json.loads(capsys.readouterr().out)}
    assert [name for name, row in rows.items() if not row["here"]] == ["moetuner", "affinity"]
    assert all(f"`{name}`" in DOCS for name in rows)


def test_the_choices_of_the_documentation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    block = next(part for part in DOCS.split("```")[1::2] if part.startswith("json\n") and '"variants"' in part)
    file = tmp_path / "choices.json"
    file.write_text(block.removeprefix("json\n"))
    assert main(["place", "--choices", str(file)]) == 0
    printed = capsys.readouterr().out
    shown = next(part for part in DOCS.split("```")[1::2] if "nats per token over all domains" in part)
    assert printed.split() == shown.split()
    assert main(["place", "--choices", str(file), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    content = json.loads(block.removeprefix("json\n"))
    # Every assignment, by hand: the least loss among those within all limits.
    least, variants, devices, shares = np.inf, content["variants"], content["devices"], content["share"]
    for one in np.ndindex(*(len(variants) * len(devices),) * len(content["domains"])):
        pairs = [divmod(place, len(devices)) for place in one]
        times = [content["latency"][variant][device] for variant, device in pairs]
        limits = content["latency_limit"]
        fast = all(t is not None and (m is None or t <= m) for t, m in zip(times, limits, strict=True))
        fits = all(
            limit is None or sum(content["memory"][v] for v, d in set(pairs) if d == device) <= limit
            for device, limit in enumerate(content["memory_limit"])
        )
        spends = all(
            limit is None
            or sum(s * content["energy"][v][d] for s, (v, d) in zip(shares, pairs, strict=True) if d == device) <= limit
            for device, limit in enumerate(content["energy_limit"])
        )
        if fast and fits and spends:
            losses = [content["loss"][variant][domain] for domain, (variant, _) in enumerate(pairs)]
            least = min(least, float(np.dot(shares, losses) / np.sum(shares)))
    assert answer["loss"] == pytest.approx(least)


def test_memory_of_adapters(directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "adapters.json"
    esft = {"experts": {"0": [1], "1": [0, 1, 2]}, "shared_experts": False, "non_expert_modules": False}
    file.write_text(json.dumps({"law": {"0": [1, 2], "3": [4]}, "code": esft}))
    assert main(ask(directory, "--adapters", str(file), "--json")) == 0
    answer = json.loads(capsys.readouterr().out)
    # 6 layers of 16 experts and twice 3 slots; 96 experts and 3 + 4 that replace some of them
    assert answer["memory_factor"] == pytest.approx(6 * (16 + 2 * 3) / (96 + 7))
    assert (answer["slots"], answer["used"], answer["most"]) == (132, 103, 3)
    assert [row["experts"] for row in answer["adapters"]] == [3, 4]
    assert main(ask(directory, "--adapters", str(file))) == 0
    assert "memory factor 1.282" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "give {adapter: {layer"),
        ("{", "are no JSON"),
        ('{"a": 3}', "adapter 'a' is no object"),
        ('{"a": {"9": [1]}}', "names layer '9'; the MoE layers are 0, 1"),
        ('{"a": {"0": "x"}}', 'gives layer 0 "x": give a list of ids'),
        ('{"a": {"0": [8]}}', "of 0 to 7"),
    ],
)
def test_adapters_that_are_none(text: str, message: str) -> None:
    with pytest.raises(PlanError, match=re.escape(message)):
        adapters_of(text, labels=["0", "1"], num_experts=8)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ((), "on how many devices? give --devices 8"),
        (("--devices", "32"), "32 devices are more than the 16 slots of a layer: use at most 16 devices"),
        (("--devices", "5"), "20 slots would do"),
        (("--devices", "4", "--redundant", "3"), "16 or 20 slots would do"),
        (("--devices", "4", "--nodes", "3"), "2 or 4 nodes would do"),
        (("--devices", "4", "--method", "moetuna"), "did you mean 'moetuner'"),
        (("--devices", "4", "--option", "depth=3"), "has no option 'depth'"),
        (("--devices", "4", "--method", "hecate"), "needs attention and bandwidth"),
        (("--devices", "4", "--method", "affinity", "--redundant", "4"), "leave redundant out, or use eplb"),
        (("--devices", "4", "--method", "affinity", "--option", "slack=wide"), "cannot take slack='wide'"),
        (("--devices", "4", "--domains", "klingon"), "no domain 'klingon'"),
        (("--devices", "4", "--train-part", "1.5"), "outside (0, 1)"),
        (("--devices", "4", "--groups", "3"), "cannot be divided into 3 groups"),
        (("--devices", "4", "-o", "/nowhere/at/all/plan.json"), "cannot be written"),
        (("--ray", "local"), "give --devices too"),
        (("--devices", "4", "--workers", "2"), "give --ray local"),
        (("--adapters", "/nowhere/adapters.json"), "cannot be read"),
    ],
)
def test_mistakes_end_in_one_line_and_code_2(
    directory: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...], message: str
) -> None:
    assert main(ask(directory, *more)) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1 and captured.out == ""


def test_no_run_and_choices_that_cannot_be_met(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["place"]) == 2
    assert "of which run?" in capsys.readouterr().err
    file = tmp_path / "choices.json"
    content = {"variants": ["a"], "domains": ["x"], "devices": ["d"], "loss": [[1]], "latency": [[0.2]], "memory": [9]}
    file.write_text(json.dumps(content | {"memory_limit": [4]}))
    assert main(["place", "--choices", str(file)]) == 2
    assert "device 'd' has 4 bytes of memory, and with 9 there would be a solution" in capsys.readouterr().err
    file.write_text(json.dumps(content | {"latency_limit": [0.1]}))
    assert main(["place", "--choices", str(file)]) == 2
    assert "domain 'x' wants 0.1 seconds and the fastest variant takes 0.2" in capsys.readouterr().err


COMMANDS = [line for part in DOCS.split("```")[1::2] for line in part.splitlines() if line.startswith("moescope ")]


@pytest.mark.parametrize("line", COMMANDS)
def test_the_commands_of_the_documentation_parse(line: str) -> None:
    parser().parse_args(shlex.split(re.sub(r"\s+#.*", "", line))[1:])
