"""Why a plan decides as it does: the scores, what is protected, and what the plan is expected to save and to cost."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from compressor.plan.steps import Record, Role, Row


class Provenance(Record):
    """Where a plan comes from.

    Attributes:
        run: name of the run.
        corpus: SHA-256 of the text it was recorded on; empty = unknown.
        tokens: tokens of the run.
        domains: whose text counted; all of the run's, or the ones asked for.
        badge: verdict of the run's checks.
        tool_version: of the planner.
    """

    run: str
    corpus: str = ""
    tokens: int = Field(default=0, ge=0)
    domains: Row[str] = ()
    badge: str = ""
    tool_version: str


class Target(Record):
    """What was asked for.

    Attributes:
        share: part of the routed experts, neurons or layers to remove, 0..1; null where nothing is cut, or bytes were
            asked for.
        memory: bytes that the weights may take; null where a share or bits were asked for.
        bits: effective bits that a weight of the experts that stay may take, scales and zero points counted; null where
            nothing is quantized, or memory was asked for.
        machine: name of the machine it is for; null where none was named.
        vram: bytes of the device that experts, keys, values and activations may take; null where none were named.
        ram: bytes of host memory for experts; null where none were named.
        devices: of an expert-parallel group; null where nothing is placed.
        engine: ``any`` = what every engine loads; ``transformers`` = through compressor.load.
        preset: named preset whose defaults were taken.
    """

    share: float | None = Field(default=None, gt=0, lt=1)
    memory: int | None = Field(default=None, ge=1)
    bits: float | None = Field(default=None, gt=0)
    machine: str | None = None
    vram: int | None = Field(default=None, ge=1)
    ram: int | None = Field(default=None, ge=0)
    devices: int | None = Field(default=None, ge=1)
    engine: str = "any"
    preset: str


class LayerValues(Record):
    """The scores of one layer's experts: what the decision rests on.

    Attributes:
        layer: decoder layer.
        step: call of the layer's experts.
        values: per routed expert; larger = more important; null where there is none. One value where a plan decides on
            layers as a whole.
    """

    layer: int
    step: int = 0
    values: Row[float | None]


class Protected(Record):
    """A unit that no step may cut, and why."""

    layer: int
    step: int = 0
    expert: int
    role: Role = "routed"
    reason: str


class Evidence(Record):
    """What the decisions rest on.

    Attributes:
        score: name of the importance score or measure.
        unit: of its values.
        source: where it was published.
        layers: its values.
        protected: units that were kept whatever their value; empty where the guard was off or found none.
        guard: whether super experts were protected.
        notes: sentences for the reader: what the choice rests on, what it does not know.
    """

    score: str
    unit: str = ""
    source: str = ""
    layers: Row[LayerValues] = ()
    protected: Row[Protected] = ()
    guard: bool = True
    notes: Row[str] = ()


class Prediction(Record):
    """How far a plan is predicted to take the model from what it was.

    Attributes:
        kl: KL divergence from the model as it is, nats per token.
        low: lower end of its interval.
        high: upper end.
        coverage: part of measured values that such intervals hold.
        basis: ``sums`` = from the run's sums alone, with a factor that is typical of models; ``measured plans`` = with
            factors from plans of this model that were measured.
        plans: measured plans behind it; 0 with basis ``sums``.
    """

    kl: float = Field(ge=0)
    low: float = Field(ge=0)
    high: float = Field(ge=0)
    coverage: float = Field(gt=0, lt=1)
    basis: Literal["sums", "measured plans"]
    plans: int = Field(default=0, ge=0)


class Speed(Record):
    """How fast a plan is expected to run on a machine, from replaying a run's trace.

    Attributes:
        machine: its name.
        batch: sequences that are decoded together.
        context: tokens whose keys and values are kept per sequence.
        hit_rate: part of the expert uses that find their expert on the device.
        low: lower end of its interval over sequences.
        high: upper end.
        coverage: of that interval.
        loads_per_token: bytes over the link per token.
        ms_per_token: mean time of a forward pass, divided by the tokens that it decodes.
        p95_ms: 95th percentile of the time of a forward pass.
        stalled: part of the layers' steps that wait for an expert.
        bound_ms: what no policy can beat with as many slots.
        resident_ms: what it would be with all experts on the device.
        peak_bytes: of the device: weights, cache slots, keys and values, activations.
    """

    machine: str
    batch: int = Field(default=1, ge=1)
    context: int = Field(default=0, ge=0)
    hit_rate: float = Field(ge=0, le=1)
    low: float = Field(ge=0, le=1)
    high: float = Field(ge=0, le=1)
    coverage: float = Field(gt=0, lt=1)
    loads_per_token: float = Field(ge=0)
    ms_per_token: float = Field(ge=0)
    p95_ms: float = Field(ge=0)
    stalled: float = Field(ge=0, le=1)
    bound_ms: float = Field(ge=0)
    resident_ms: float = Field(ge=0)
    peak_bytes: int = Field(ge=0)


class Estimate(Record):
    """What the plan is expected to save and to cost; measured figures stand in receipts beside a plan, never in it.

    Attributes:
        expert_parameters: parameters of routed and shared experts before.
        expert_parameters_after: and after.
        active_parameters: expert parameters that one token uses, before.
        active_parameters_after: and after.
        bytes_saved: of the experts' weights, against the run's type; 0 where the form saves nothing.
        bits: effective bits of a weight of the experts that stay, mean, scales and zero points counted; null where
            nothing is quantized.
        kept_mass: part of the score that stays, over all layers, 0..1; null where the score does not add up.
        layer_error: predicted relative squared error of the MoE layers' outputs before anything is routed anew, mean
            over layers; null where the run cannot say.
        weighed_error: the same, layers weighed by how far their experts turn the residual stream; it compares plans
            that cut layers differently.
        prediction: predicted KL divergence, from the run's sums alone; null where the run cannot price the plan.
        speed: how fast it runs on the machine that was asked for; null where none was.
        balancedness: mean over largest load of a device, mean over layers and windows of the trace that the placement
            was not made from, 0..1; null where nothing is placed.
    """

    expert_parameters: int = Field(ge=0)
    expert_parameters_after: int = Field(ge=0)
    active_parameters: int = Field(ge=0)
    active_parameters_after: int = Field(ge=0)
    bytes_saved: int = Field(ge=0)
    bits: float | None = None
    kept_mass: float | None = None
    layer_error: float | None = None
    weighed_error: float | None = None
    prediction: Prediction | None = None
    speed: Speed | None = None
    balancedness: float | None = None
