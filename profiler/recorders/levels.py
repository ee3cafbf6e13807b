"""The probe of each level beyond routing and activations."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from profiler.recorders.attention import AttentionRecorder
from profiler.recorders.expert_errors import ExpertErrorRecorder
from profiler.recorders.gradients import GradientRecorder
from profiler.recorders.lookahead import LookaheadRecorder
from profiler.recorders.moments import MomentRecorder
from profiler.recorders.predictions import PredictionRecorder
from profiler.recorders.similarity import SimilarityRecorder

if TYPE_CHECKING:
    from profiler.capture.levels import RecordingOptions
    from profiler.capture.probes import Probe


PROBES: dict[str, Callable[[RecordingOptions], Probe]] = {
    "attention": lambda options: AttentionRecorder(),
    "similarity": lambda options: SimilarityRecorder(options.similarity_every, options.vectors_per_domain),
    "moments": lambda options: MomentRecorder(options.vectors_per_domain),
    "errors": lambda options: ExpertErrorRecorder(options.errors_every, options.vectors_per_domain),
    "lookahead": lambda options: LookaheadRecorder(),
    "predictions": lambda options: PredictionRecorder(),
    "gradients": lambda options: GradientRecorder(options.vectors_per_domain),
}
"""Level -> what makes its probe."""


def level_probes(options: RecordingOptions) -> list[Probe]:
    """The probes that the levels ask for, in the order of the levels."""
    return [PROBES[level](options) for level in options.levels if level in PROBES]
