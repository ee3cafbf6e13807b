"""Machines by name and from files, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moescope.errors import PlanError
from planner.machine import EFFICIENCY, GIB, Link, Processor
from planner.machines import DISKS, LINKS, MACHINES, as_json, load, machine


def test_presets_are_the_data_sheets_times_the_efficiency() -> None:
    found = machine("rtx4090")
    assert found.device.bandwidth == pytest.approx(1008e9 * EFFICIENCY)
    assert found.link.bandwidth == pytest.approx(31.5e9 * EFFICIENCY)
    assert found.measured == () and "not measured here" in found.note
    assert 20 * GIB < found.vram < 24 * GIB
    for one in MACHINES.values():
        assert one.name in MACHINES and "not measured here" in one.note and one.device.bandwidth <= 4.8e12
        assert one.device.flops > one.cpu.flops or one.name.startswith("cpu")
    assert LINKS["pcie5x16"].bandwidth == 2 * LINKS["pcie4x16"].bandwidth == 4 * LINKS["pcie3x16"].bandwidth
    assert LINKS["unified"].seconds(1e12) == 0


def test_what_is_said_replaces_the_preset() -> None:
    found = machine("rtx4090", vram=12 * GIB, ram=16 * GIB, link="pcie3x16", disk="sata")
    assert (found.vram, found.ram) == (12 * GIB, 16 * GIB)
    assert found.link == LINKS["pcie3x16"] and found.disk == DISKS["sata"]
    assert machine("rtx4090", disk="none").disk is None
    own = Link("mine", 1e9, 0.0)
    assert machine("rtx4090", link=own).link is own
    assert machine("H100_80G") == machine("h100-80g")


@pytest.mark.parametrize("name", MACHINES)
def test_files_give_back_what_was_written(name: str, tmp_path: Path) -> None:
    path = tmp_path / "machine.json"
    path.write_text(as_json(MACHINES[name]))
    assert load(path) == MACHINES[name] == machine(file=path)


def test_measured_parts_replace_those_of_a_preset(tmp_path: Path) -> None:
    path = tmp_path / "machine.json"
    mine = replace(
        MACHINES["cpu-desktop"], cpu=Processor(20e9, 1e11, 2e-6), disk=Link("nvme here", 1.5e9, 1e-4),
        measured=("cpu", "disk"),
    )  # fmt: skip
    path.write_text(as_json(mine))
    found = machine("rtx4090", file=path)
    assert found.cpu == mine.cpu and found.disk == mine.disk and found.measured == ("cpu", "disk")
    assert found.device == MACHINES["rtx4090"].device and found.link == MACHINES["rtx4090"].link
    assert machine("rtx4090", file=path, disk="sata").measured == ("cpu",)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"device": {"bandwidth": 0, "flops": 1e12, "overhead": 0}}, "device.bandwidth"),
        ({"device": {"bandwidth": -5.0, "flops": 1e12, "overhead": 0}}, "device.bandwidth"),
        ({"device": {"bandwidth": "fast", "flops": 1e12, "overhead": 0}}, "device.bandwidth"),
        ({"cpu": {"bandwidth": 1e9, "flops": 1e30, "overhead": 0}}, "cpu.flops"),
        ({"link": {"name": "x", "bandwidth": 1e9, "latency": -1}}, "link.latency"),
        ({"disk": {"name": "x", "bandwidth": None, "latency": 0}}, "a disk needs a bandwidth"),
        ({"vram": 0}, "vram"),
        ({"vram": 1.5}, "vram"),
        ({"version": 2}, "version"),
        ({"format": "other"}, "format"),
        ({"measured": ["gpu"]}, "measured.0"),
        ({"wheels": 4}, "wheels"),
        ({"cpu": None}, "cpu"),
    ],
)
def test_files_that_are_no_machine_are_refused(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    path = tmp_path / "machine.json"
    path.write_text(json.dumps(json.loads(as_json(MACHINES["rtx4090"])) | change))
    with pytest.raises(PlanError, match=words) as refused:
        load(path)
    assert "\n" not in str(refused.value)


def test_nonsense_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="no machine 'rtx4080': did you mean rtx4090"):
        machine("rtx4080")
    with pytest.raises(PlanError, match="no link 'pcie6x16': did you mean pcie"):
        machine("rtx4090", link="pcie6x16")
    with pytest.raises(PlanError, match="no disk 'tape': there are nvme-gen3"):
        machine("rtx4090", disk="tape")
    with pytest.raises(PlanError, match="vram of 0 bytes"):
        machine("rtx4090", vram=0)
    with pytest.raises(PlanError, match="which machine"):
        machine()
    with pytest.raises(PlanError, match="cannot be read"):
        machine(file=tmp_path / "none.json")
    for text in ("", "{", "[]", "null", '{"format": "moescope machine", "vram": NaN}'):
        path = tmp_path / "bad.json"
        path.write_text(text)
        with pytest.raises(PlanError, match=r"bad\.json"):
            load(path)


def test_one_memory_is_not_counted_twice() -> None:
    with pytest.raises(PlanError, match="one memory for device and CPU, and no 64 GiB beside it"):
        machine("cpu-desktop", ram=64 * GIB)
    assert machine("cpu-desktop", vram=64 * GIB, ram=0).vram == 64 * GIB
    assert machine("rtx4090", link="unified").ram == 0
