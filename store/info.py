"""What a run says about itself: provenance, layers, progress, and whether its capture proved itself right."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from numbers import Integral
from typing import Any, Literal

from moescope import __version__
from moescope.errors import StoreError
from store.schema import OLDEST_VERSION, SCHEMA_VERSION

BadgeStatus = Literal["valid", "warning", "invalid", "unchecked"]
ProgressState = Literal["collecting", "compacting", "interrupted", "failed"]


MOST = 65_536
"""Of what a model has: layers, experts of one layer."""

IMPORTED = "imported"
"""The check that every imported run carries as skipped: what the model did was not seen here."""


def _now() -> datetime:
    return datetime.now(UTC).replace(tzinfo=None)  # to the microsecond: it tells runs of one name apart


@dataclass
class RunInfo:
    """Where a run comes from; the fields are the columns of table ``run`` (``schema.sql`` documents them)."""

    model: str
    schema_version: int = SCHEMA_VERSION
    tool_version: str = __version__
    created_at: datetime = field(default_factory=_now)
    model_revision: str = ""
    model_fingerprint: str = ""
    model_class: str = ""
    model_type: str = ""
    model_config: dict[str, Any] = field(default_factory=dict)
    num_layers: int = 0
    hidden_size: int = 0
    dtype: str = ""
    device: str = ""
    backend: str = ""
    torch_version: str = ""
    transformers_version: str = ""
    origin: str = "watch"
    levels: str = "routing"
    settings: dict[str, Any] = field(default_factory=dict)
    text_kept: bool = True
    sequences: int = 0
    tokens: int = 0
    seconds: float = 0.0
    complete: bool = False

    def to_row(self) -> dict[str, Any]:
        """One row of table ``run``: dictionaries become JSON with sorted keys."""
        row = asdict(self)
        row["model_config"] = json.dumps(self.model_config, sort_keys=True, default=str)
        row["settings"] = json.dumps(self.settings, sort_keys=True, default=str)
        return row

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> RunInfo:
        """The reverse of :meth:`to_row`; columns of a newer version, and those without a value, are left aside.

        Raises:
            StoreError: a text that is not what its column holds.
        """
        known = {name.name for name in fields(cls)}
        values = {"model": "unknown"} | {
            name: value for name, value in row.items() if name in known and value is not None
        }
        try:
            for name in ("model_config", "settings"):
                values[name] = json.loads(values.get(name) or "{}")
            if isinstance(values.get("created_at"), str):
                values["created_at"] = datetime.fromisoformat(values["created_at"])
        except (ValueError, RecursionError) as error:
            raise StoreError(f"table run is damaged: {error}") from error
        return cls(**values)


@dataclass(frozen=True)
class LayerInfo:
    """One MoE layer (one call of its experts); the fields are the columns of table ``layer``."""

    layer: int
    step: int = 0
    module: str = ""
    experts_class: str = ""
    router_class: str = ""
    num_experts: int = 0
    top_k: int = 0
    num_shared: int = 0
    expert_width: int = 0
    stack: str = "decoder"
    granularity: str = "token"

    def __post_init__(self) -> None:
        for name in ("layer", "step", "num_experts", "top_k", "num_shared"):
            value = getattr(self, name)
            if not isinstance(value, Integral) or not 0 <= int(value) <= MOST:
                # Everything per expert is made for this many: a number out of a damaged file must not take the memory.
                raise StoreError(f"a layer with {name} {value!r} cannot be: 0 to {MOST:,}; the run is damaged")


@dataclass(frozen=True)
class Progress:
    """How far a collection is; ``token_budget`` 0 and ``seconds_left`` None mean unknown."""

    tokens: int = 0
    token_budget: int = 0
    tokens_per_second: float = 0.0
    seconds_left: float | None = None
    state: ProgressState = "collecting"
    detail: str = ""


@dataclass(frozen=True)
class Badge:
    """The verdict of a run's self-checks, the sentence that explains it, and one for every check that turned it."""

    status: BadgeStatus
    reason: str
    reasons: tuple[str, ...] = ()


def badge(checks: Sequence[Mapping[str, Any]]) -> Badge:
    """The verdict over rows of table ``check``: one failure makes a run invalid, one warning makes it doubtful."""
    if not checks:
        return Badge("unchecked", "no check has been recorded")
    for status, verdict in (("fail", "invalid"), ("warning", "warning")):
        found = [check for check in checks if check["status"] == status]
        if found:
            more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
            reason = f"{found[0]['name']}: {found[0]['detail']}{more}"
            return Badge(verdict, reason, _reasons(checks))  # type: ignore[arg-type]
    skipped = sum(check["status"] == "skipped" for check in checks)
    passed = len(checks) - skipped
    if any(check["name"] == IMPORTED for check in checks):
        return Badge(
            "unchecked",
            f"recorded by another engine: {_checks(passed)} of its files passed, the model was not seen",
        )
    return Badge("valid", f"{_checks(passed)} passed" + (f", {skipped} skipped" if skipped else ""))


def _checks(number: int) -> str:
    return f"{number} check{'s' if number != 1 else ''}"


def _reasons(checks: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """One sentence per check that failed or warns, failures first, whatever the number of its layers."""
    sentences = []
    for status in ("fail", "warning"):
        found: dict[str, list[str]] = {}
        for check in checks:
            if check["status"] == status:
                found.setdefault(check["name"], []).append(check["detail"])
        for name, details in found.items():
            more = f" (and {len(details) - 1} more)" if len(details) > 1 else ""
            sentences.append(f"{name}: {details[0]}{more}")
    return tuple(sentences)


def require_version(version: int, name: str) -> None:
    """Refuse a file of another schema.

    Raises:
        StoreError: the version is not one that this moescope reads.
    """
    if not OLDEST_VERSION <= version <= SCHEMA_VERSION:
        age = "an older" if version < SCHEMA_VERSION else "a newer"
        raise StoreError(
            f"{name} has schema {version}, this moescope reads schema {OLDEST_VERSION} to {SCHEMA_VERSION}: open it"
            f" with {age} moescope or collect the run again"
        )
