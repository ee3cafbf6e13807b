"""The plan as one JSON document."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from compressor.plan import reading
from compressor.plan.bits import QuantizeStep
from compressor.plan.caching import CacheStep
from compressor.plan.evidence import Estimate, Evidence, Provenance, Target
from compressor.plan.factors import FactorStep
from compressor.plan.placement import PlaceStep
from compressor.plan.routing import RouteStep
from compressor.plan.source import Source
from compressor.plan.steps import DropStep, MergeStep, Record, Row, SlimStep
from moescope.errors import PlanError

VERSION = 1

CheckpointStep = DropStep | MergeStep | SlimStep | FactorStep | QuantizeStep
"""A step that changes a checkpoint."""

ServingStep = CacheStep | PlaceStep
"""A step that changes none: exporters write it for the engine that serves the checkpoint."""

Step = Annotated[CheckpointStep | RouteStep | ServingStep, Field(discriminator="step")]
"""One step of a plan. Cuts come first, then factors, then bits: what is left is what is put on grids. Then comes
another choice than the router's, which changes no weights; last come steps for the engine."""


class Plan(Record):
    """What to do to a checkpoint, and why. Made by a planner, or read with :meth:`load`.

    Attributes:
        version: of this format.
        provenance: the run it comes from.
        source: the model it is for.
        target: what was asked for.
        steps: what to do, in order.
        estimate: what it is expected to save and to cost.
        evidence: what each decision rests on.
    """

    version: Literal[1] = 1
    provenance: Provenance
    source: Source
    target: Target
    steps: Row[Step] = Field(min_length=1)
    estimate: Estimate
    evidence: Row[Evidence] = ()

    def text(self) -> str:
        """The document, the same for the same plan."""
        return json.dumps(self.model_dump(mode="json"), indent=1, sort_keys=True, ensure_ascii=False) + "\n"

    @property
    def for_checkpoint(self) -> tuple[CheckpointStep, ...]:
        """The steps that change the weights of a checkpoint."""
        return tuple(step for step in self.steps if not isinstance(step, RouteStep | ServingStep))

    @property
    def route(self) -> RouteStep | None:
        """The step that changes the choice of the routers, by the numbers of the source; None without."""
        return next((step for step in self.steps if isinstance(step, RouteStep)), None)

    @property
    def digest(self) -> str:
        """SHA-256 of the document."""
        return hashlib.sha256(self.text().encode()).hexdigest()

    def checked(self) -> Plan:
        """The plan itself.

        Raises:
            PlanError: it asks for what no checkpoint or engine could hold; the message names the layer.
        """
        from compressor.plan.rules import check

        check(self)
        return self

    def save(self, path: str | Path) -> None:
        """Write the document; a file of that name is replaced at once.

        Raises:
            PlanError: it cannot be written.
        """
        path = Path(path)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            temporary.write_text(self.text(), encoding="utf-8")
            os.replace(temporary, path)
        except OSError as error:
            raise PlanError(f"{path} cannot be written: {error.strerror or error}") from error

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read and check a document.

        Raises:
            PlanError: it cannot be read, is no plan, is of another version, or asks for what cannot be.
        """
        return cls.parse(reading.read(path), str(path))

    @classmethod
    def parse(cls, text: str, name: str = "the document") -> Plan:
        """A plan from its text.

        Raises:
            PlanError: as :meth:`load`.
        """
        content = reading.parsed(text, name)
        if not isinstance(content, dict) or "steps" not in content:
            raise PlanError(f"{name} is no plan of moescope: it has no steps")
        if content.get("version") != VERSION:
            stated = reading.in_a_line(repr(content.get("version")))
            raise PlanError(f"{name} has version {stated}; this moescope reads {VERSION}: plan again")
        del content
        try:
            # Of the text, not of what was parsed: only there a number must be one, and a list makes a tuple.
            return cls.model_validate_json(text, strict=True).checked()
        except ValidationError as error:
            raise PlanError(f"{name} is no plan that can be followed: {reading.first_mistake(error)}") from error


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a plan."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Plan.model_json_schema()}
