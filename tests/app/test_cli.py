"""The command line: answers, exit codes, and one-line errors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest

from app.cli import main, parser
from app.commands import COMMANDS, options
from app.text import duration, table
from moescope.errors import InputError
from store import RunInfo, RunWriter


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A store with one finished run and one that was interrupted."""
    for name in ("done", "broken-off"):
        writer = RunWriter.create(tmp_path, name, RunInfo(model="toy", num_layers=2))
        load = {
            "layer": [1, 1], "step": [0, 0], "expert": [0, 1], "kind": ["routed"] * 2, "domain": ["code"] * 2,
            "phase": ["prompt"] * 2, "tokens": [60, 40], "first_choices": [60, 40],
        }  # fmt: skip
        layer = {"layer": [1], "step": [0], "num_experts": [2], "top_k": [1], "module": ["layers.1.mlp.experts"]}
        sequence = {"sequence": [0], "domain": ["code"], "tokens": [100], "prompt_tokens": [100]}
        writer.write_shard({"expert_load": load, "layer": layer, "sequence": sequence})
        if name == "done":
            writer.finish()
    return tmp_path


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert all(command.NAME in text for command in COMMANDS)
    assert all(command.SUMMARY.split(",")[0][:20] in text for command in COMMANDS)


def test_runs_lists_finished_and_unfinished(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", "--store", str(runs), "--json"]) == 0
    rows = {row["run"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["done"]["state"] == "finished"
    assert rows["done"]["tokens"] == 100
    assert rows["broken-off"]["state"] == "starting"
    assert main(["runs", "--store", str(runs)]) == 0
    assert "broken-off" in capsys.readouterr().out


def test_an_unreadable_file_does_not_hide_the_others(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (runs / "junk.duckdb").write_text("no database")
    assert main(["runs", "--store", str(runs), "--json"]) == 0
    states = {row["run"]: row["state"] for row in json.loads(capsys.readouterr().out)}
    assert states == {"broken-off": "starting", "done": "finished", "junk": "unreadable"}


def test_runs_rename_and_delete(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", "rename", "done", "kept", "--store", str(runs)]) == 0
    assert main(["runs", "delete", "broken-off", "--store", str(runs)]) == 0
    capsys.readouterr()
    assert main(["runs", "--store", str(runs), "--json"]) == 0
    assert [row["run"] for row in json.loads(capsys.readouterr().out)] == ["kept"]


def test_runs_compute(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", "compute", "done", "--store", str(runs)]) == 0
    assert "done.derived.duckdb" in capsys.readouterr().out
    assert main(["show", "done", "metrics", "--store", str(runs), "--json"]) == 0
    values = {row["metric"]: row["value"] for row in json.loads(capsys.readouterr().out)}
    assert values["max_violation"] == pytest.approx(0.2)  # 60 of 100 tokens on one of two experts
    assert main(["runs", "compute", "broken-off", "--store", str(runs)]) == 2


def test_show(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "done", "--store", str(runs), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["capture"]["status"] == "unchecked"
    assert answer["layers"][0]["num_experts"] == 2
    assert main(["show", str(runs / "done.duckdb"), "expert_load", "--json"]) == 0
    assert [row["tokens"] for row in json.loads(capsys.readouterr().out)] == [60, 40]
    assert main(["show", "done", "--store", str(runs)]) == 0
    assert "capture unchecked" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "dune"], "did you mean done"),
        (["show", "done", "expert_lode"], "did you mean expert_load"),
        (["runs", "rename", "done"], "takes 2 names, not 1"),
        (["runs", "rename", "done", "../up"], "cannot name a run"),
        (["runs", "delete", "nothing"], "no run 'nothing'"),
    ],
)
def test_mistakes_end_in_one_line_and_code_2(
    runs: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main([*arguments, "--store", str(runs)]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


@pytest.mark.parametrize("text", ["0", "-5", "many", "1.5", "k"])
def test_budgets_that_are_none(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["collect", "model", "--tokens", text])
    assert stopped.value.code == 2
    assert "number" in capsys.readouterr().err


def test_budgets() -> None:
    assert [options.positive(text) for text in ("7", "100k", "1.5M", "2g")] == [7, 100_000, 1_500_000, 2_000_000_000]


def test_options_from_a_file(tmp_path: Path) -> None:

    file = tmp_path / "options.toml"
    file.write_text('tokens = "20k"\nlevel = "routing"\ndata = ["a.txt", "b.txt"]\nbos = false\nno-text = true\n')
    given = ["collect", "some-model", "--config", str(file), "--level", "activations"]
    merged = options.apply_config(parser(), parser().parse_args(given), given)
    assert (merged.tokens, merged.level, merged.data) == (20_000, "activations", ["a.txt", "b.txt"])
    assert merged.bos is False
    assert merged.no_text is True
    given += ["--data", "c.txt"]
    assert options.apply_config(parser(), parser().parse_args(given), given).data == ["c.txt"]
    file.write_text('data = ["only.txt"]\n')
    given = ["collect", "--config", str(file), "some-model"]
    assert options.apply_config(parser(), parser().parse_args(given), given).data == ["only.txt"]
    file.write_text("tokenz = 3\n")
    with pytest.raises(InputError, match="no option 'tokenz'"):
        options.apply_config(parser(), parser().parse_args(given), given)
    file.write_text("tokens = [\n")
    with pytest.raises(InputError, match="--config"):
        options.apply_config(parser(), parser().parse_args(given), given)


def test_a_missing_extra_is_named() -> None:
    code = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'streamlit'): sys.modules[name] = None\n"
        "from app.cli import main\n"
        "sys.exit(main(['collect', 'model', '--data', 'x.txt']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "moescope[torch]" in done.stderr
    assert "Traceback" not in done.stderr


def test_tables_for_a_terminal() -> None:
    frame = pl.DataFrame({"name": ["a", "long name"], "count": [5, 123456], "share": [0.123456, None]})
    lines = table(frame).splitlines()
    assert lines[2] == "a                5  0.1235"
    assert lines[3] == "long name  123,456       –"
    assert table(frame, rows=1).endswith("1 more rows; --json prints all")
    assert [duration(value) for value in (None, 45.2, 200, 7500)] == ["–", "45 s", "3 min 20 s", "2 h 05 min"]


def test_a_killed_demo_takes_its_dashboard_along(tmp_path: Path) -> None:
    import os
    import signal
    import socket
    import time
    import urllib.error
    import urllib.request

    with socket.socket() as probe:  # a port of its own: dashboards of other tests would take the one that gets free
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, "-m", "app.cli", "demo", "--no-browser", "--port", port]
    command += ["--store", str(tmp_path / "runs")]
    root = Path(__file__).parents[2]
    demo = subprocess.Popen(
        command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=dict(os.environ)
    )
    try:
        assert demo.stdout is not None
        url = demo.stdout.readline().split()[-1]
        assert urllib.request.urlopen(f"{url}/_stcore/health", timeout=10).read() == b"ok"
        demo.send_signal(signal.SIGTERM)
        assert demo.wait(timeout=30) == 128 + signal.SIGTERM
    finally:
        demo.kill()
    time.sleep(0.5)
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(f"{url}/_stcore/health", timeout=3)


@pytest.mark.parametrize(
    "words",
    [
        ["show", "NAME", "figures", "--store", "DIR"],
        ["show", "NAME", "--store", "DIR", "figures"],
        ["show", "--store", "DIR", "NAME", "figures"],
    ],
)
def test_options_may_stand_between_positional_arguments(words: list[str]) -> None:
    given = parser().parse_args(words)
    assert (given.target, given.view, str(given.store)) == ("NAME", "figures", "DIR")
