"""The probe of each level beyond routing and activations."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from profiler.capture.levels import RecordingOptions
    from profiler.capture.probes import Probe


PROBES: dict[str, Callable[[RecordingOptions], Probe]] = {}
"""Level -> what makes its probe."""


def level_probes(options: RecordingOptions) -> list[Probe]:
    """The probes that the levels ask for, in the order of the levels."""
    return [PROBES[level](options) for level in options.levels if level in PROBES]
