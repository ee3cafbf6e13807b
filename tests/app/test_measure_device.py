"""``moescope measure-device``: figures against a clock that is known, files that are read back, and refusals."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from app import device_probe, disk_probe
from app.cli import main
from planner.machines import MACHINES, machine

COMMAND = ["measure-device", "--seconds", "1"]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small experts and a small file, and numpy alone."""
    monkeypatch.setattr(device_probe, "HIDDEN", 64)
    monkeypatch.setattr(device_probe, "INNER", 128)
    monkeypatch.setattr(device_probe, "SMALL", 8)
    monkeypatch.setattr(device_probe, "_torch", lambda: None)
    monkeypatch.setattr(disk_probe, "LARGEST", disk_probe.SMALLEST)
    monkeypatch.setattr(device_probe, "DEVICE_ROOM", 1 << 20)
    monkeypatch.setattr(device_probe, "HOST_ROOM", 1 << 20)
    monkeypatch.setattr(device_probe, "free_memory", lambda: 64 << 20)


@pytest.mark.usefixtures("quick")
def test_figures_are_printed_and_the_file_is_a_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "machine.json"
    assert main([*COMMAND, "--disk", str(tmp_path), "-o", str(path), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    figures = {figure["name"]: figure for figure in answer["figures"]}
    assert set(figures) == {"disk read", "disk latency", "cpu reads weights", "cpu products", "cpu start"}
    for figure in figures.values():
        assert 0 < figure["low"] <= figure["median"] <= figure["high"] and figure["repeats"] >= 3
    assert json.loads(path.read_text()) == answer["machine"]
    found = machine(file=path)
    assert found.measured == ("cpu", "disk") and found.link.seconds(1e9) == 0
    assert found.disk is not None and found.disk.bandwidth == figures["disk read"]["median"]
    assert found.device.flops == figures["cpu products"]["median"] and found.vram == int((64 << 20) * 0.9)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["machine.json"]  # the file that was read is gone
    mixed = machine("rtx4090", file=path)
    assert mixed.cpu == found.cpu and mixed.device == MACHINES["rtx4090"].device


@pytest.mark.usefixtures("quick")
def test_a_table_says_how_each_figure_was_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*COMMAND, "--disk", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert "disk read" in out and "32 MiB at a time" in out and "page cache" in out and "numpy" in out
    assert "measuring cpu" in err and len(list(tmp_path.iterdir())) == 0
    assert main([*COMMAND, "--no-disk"]) == 0
    assert "disk" not in capsys.readouterr().out


class Clock:
    """Time that passes when a library works."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


class Worker:
    """Takes 2 ms per expert, 1 ns per byte of weights or 2 ns per weight and token, whichever is more."""

    title, value_bytes = "worker", 2

    def __init__(self, clock: Clock, speed: float = 1.0) -> None:
        self.clock, self.speed = clock, speed

    def weights(self, rows: int, columns: int) -> Any:
        return SimpleNamespace(shape=(rows, columns))

    def tokens(self, columns: int, count: int) -> Any:
        return count

    def expert(self, parts: Any, tokens: int) -> None:
        weights = sum(part.shape[0] * part.shape[1] for part in parts)
        self.clock.now += 2e-3 + max(2e-9 * weights, 2e-9 * weights * tokens) / self.speed

    def wait(self) -> None:
        pass


def test_a_processor_is_what_its_clock_says(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(device_probe, "time", clock)
    figures: list[device_probe.Figure] = []
    workers: list[Any] = [Worker(clock), Worker(clock, speed=4.0)]
    found = device_probe._processor("cpu", workers, 1.0, 100 << 20, figures, lambda text: None)
    start = 2e-3 + 2e-9 * 3 * 64 * 64 / 4  # what the small expert takes counts as the cost of starting
    assert found.overhead == pytest.approx(start)
    weights = 3 * device_probe.HIDDEN * device_probe.INNER
    assert found.bandwidth == pytest.approx(2 * weights / (2e-3 + 2e-9 * weights / 4 - start))
    assert found.flops == pytest.approx(2 * weights * 512 / (2e-3 + 2e-9 * weights * 512 / 4 - start))
    assert found.bandwidth == pytest.approx(4e9, rel=0.01) and found.flops == pytest.approx(4e9, rel=0.01)
    assert [figure.name for figure in figures] == ["cpu reads weights", "cpu products", "cpu start"]


class Accelerator:
    """torch whose accelerator is the CPU: the path of the code, not its figures."""

    def __init__(self) -> None:
        self.cuda = SimpleNamespace(
            is_available=lambda: True, synchronize=lambda: None, get_device_name=lambda: "Test accelerator",
            mem_get_info=lambda: (1 << 30, 2 << 30),
        )  # fmt: skip

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def rand(self, *shape: Any, device: str) -> Any:
        return torch.rand(*shape)

    def empty(self, size: int, *, dtype: Any, device: str = "", pin_memory: bool = False) -> Any:
        return torch.empty(size, dtype=dtype)


@pytest.mark.usefixtures("quick")
def test_an_accelerator_is_measured_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(device_probe, "_torch", Accelerator)
    told: list[str] = []
    found, figures = device_probe.probe(folder=None, seconds=0.2, tell=told.append)
    assert found.measured == ("device", "cpu", "link") and found.disk is None
    assert found.vram == int((2 << 30) * 0.9) and found.ram == int((64 << 20) * 0.9)
    assert "Test accelerator in " in found.title
    names = [figure.name for figure in figures]
    assert names[-5:] == ["device reads weights", "device products", "device start", "link", "link latency"]
    assert found.link.bandwidth == figures[-2].median and any("accelerator" in text for text in told)


def test_a_file_system_that_refuses_direct_reads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    opened = os.open

    def refusing(path: Any, flags: int, *more: Any, **named: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return opened(path, flags, *more, **named)

    monkeypatch.setattr(os, "open", refusing)
    monkeypatch.setattr(disk_probe, "LARGEST", disk_probe.SMALLEST)
    reading = disk_probe.read_speed(tmp_path, seconds=0.5)
    assert "posix_fadvise" in reading.how and min(reading.bandwidths) > 1e6


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(arguments) == 2
    lines = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if line.strip()]
    return lines[-1]


@pytest.mark.usefixtures("quick")
def test_mistakes_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "is no folder" in refused([*COMMAND, "--disk", str(tmp_path / "none")], capsys)
    assert "cannot be written: give a file" in refused([*COMMAND, "-o", str(tmp_path / "no" / "m.json")], capsys)
    assert "cannot be written: give a file" in refused([*COMMAND, "-o", str(tmp_path)], capsys)
    full = shutil.disk_usage(tmp_path)._replace(free=100 << 20)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: full)
        assert "has 100 MiB free" in refused([*COMMAND, "--disk", str(tmp_path)], capsys)
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda path, mode: False)
        assert "cannot be written to" in refused([*COMMAND, "--disk", str(tmp_path)], capsys)
    with monkeypatch.context() as patch:
        patch.setattr(disk_probe, "_file_system", lambda folder: "tmpfs")
        assert "lies in memory (tmpfs)" in refused([*COMMAND, "--disk", str(tmp_path)], capsys)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
        assert "cannot be measured: No space left" in refused([*COMMAND, "--disk", str(tmp_path)], capsys)
    for seconds in ("0", "x", "nan", "1e9"):
        with pytest.raises(SystemExit):
            main(["measure-device", "--seconds", seconds])
    capsys.readouterr()


def test_the_file_system_of_a_folder_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    lines = f"a / ext4 rw 0 0\nb {tmp_path} xfs rw 0 0\nc {tmp_path}/in\\040side tmpfs rw 0 0\n"
    monkeypatch.setattr(Path, "read_text", lambda self, **named: lines)
    assert disk_probe._file_system(tmp_path / "deep") == "xfs"
    assert disk_probe._file_system(tmp_path / "in side" / "deep") == "tmpfs"
    assert disk_probe._file_system(tmp_path.parent) == "ext4"
