"""The workers of a collection: hired, watched, and replaced when they are lost."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from moescope import cluster
from moescope.errors import MoescopeError, RunError
from profiler.workers.parts import Part
from profiler.workers.worker import Order, Ready, Report, Work, Worker

if TYPE_CHECKING:
    from moescope.cluster import Cluster

LOOK_SECONDS = 10.0
"""While no worker is there, the cluster is asked so often whether one can still come."""

IN_VAIN = 3
"""Workers that may be lost one after the other while they load the model."""


@dataclass(frozen=True)
class Lost:
    """A worker is gone, with Ray's words for it."""

    reason: str

    @property
    def for_memory(self) -> bool:
        """Whether Ray says that its machine was short of memory."""
        words = self.reason.lower()
        return "oom" in words or "out of memory" in words or "memory pressure" in words or "low memory" in words


@dataclass(eq=False)
class Member:
    """One worker.

    Attributes:
        owed: what Ray owes for the call under way.
        part: what it works on; None while it loads the model.
        tokens: of its part so far.
        heard: when it last said something, or was given something to do.
        checks: its verdicts when it last finished a part.
    """

    actor: Any
    owed: Any
    ready: bool = False
    part: Part | None = None
    tokens: int = 0
    heard: float = field(default_factory=time.monotonic)
    checks: list[dict[str, Any]] = field(default_factory=list)


class Crew:
    """Workers that run, or are on their way.

    Attributes:
        members: of them.
        past: verdicts of workers that are gone.
    """

    def __init__(self, joined: Cluster, order: Order) -> None:
        self._cluster, self._ray = joined, joined.ray
        self._order = self._ray.put(order)
        self.members: list[Member] = []
        self.past: list[list[dict[str, Any]]] = []
        self._in_vain = 0
        self._looked = time.monotonic()

    @property
    def at_work(self) -> int:
        """Workers that have loaded the model."""
        return sum(member.ready for member in self.members)

    @property
    def silent_seconds(self) -> float:
        """For how long the most silent of the workers at work has said nothing: each says every batch."""
        now = time.monotonic()
        return max((now - member.heard for member in self.members if member.ready), default=0.0)

    @property
    def verdicts(self) -> list[list[dict[str, Any]]]:
        """Of all workers, those that are gone too."""
        return [*self.past, *(member.checks for member in self.members if member.checks)]

    def hire(self) -> None:
        """One more worker, which begins by loading the model."""
        actor = self._cluster.actor(Worker, self._order)
        self.members.append(Member(actor, actor.load.remote()))

    def give(self, member: Member, part: Part, work: Work) -> None:
        """Let a worker record a part."""
        member.part, member.tokens, member.heard = part, 0, time.monotonic()
        member.owed = member.actor.record.options(num_returns="streaming").remote(work)

    def dismiss(self, member: Member) -> None:
        """End a worker, whether it is alive or not."""
        with suppress(Exception):
            self._ray.kill(member.actor)
        if member.checks:
            self.past.append(member.checks)
        if member in self.members:
            self.members.remove(member)

    def dismiss_all(self) -> None:
        """End all of them."""
        for member in list(self.members):
            self.dismiss(member)

    def news(self, seconds: float) -> Iterator[tuple[Member, Ready | Report | Lost]]:
        """What workers say within so many seconds; one that is lost has been dismissed.

        Raises:
            MoescopeError: what a worker refused or could not do.
            RunError: workers are lost again and again while they load the model, or no worker can come any more.
        """
        waiting = {member.owed: member for member in self.members}
        found, _ = self._ray.wait(list(waiting), num_returns=1, timeout=seconds) if waiting else ([], [])
        for owed in found:
            member = waiting[owed]
            member.heard = time.monotonic()
            try:
                said = self._ray.get(next(owed) if member.part is not None else owed)
            except (self._ray.exceptions.RayTaskError, MoescopeError) as error:
                raise cluster.failure(error, "a worker") from error
            except self._ray.exceptions.RayError as error:
                lost = Lost(" ".join(str(error).split()))
                self._count_loss(member, lost)
                self.dismiss(member)
                yield member, lost
                continue
            if isinstance(said, Ready):
                member.ready, self._in_vain = True, 0
            elif said.checks:
                member.checks = said.checks
            yield member, said
        self._look()

    def _count_loss(self, member: Member, lost: Lost) -> None:
        self._in_vain += not member.ready
        if self._in_vain >= IN_VAIN:
            memory = "Ray ended them because the machine was short of memory" if lost.for_memory else lost.reason[:200]
            raise RunError(
                f"{IN_VAIN} workers in a row were lost while they loaded the model ({memory}): the machine may be too"
                " small for them: give fewer --workers, or larger --cpus-per-worker so that fewer share a node"
            )

    def _look(self) -> None:
        """Where nobody is there, ask whether anybody can come."""
        now = time.monotonic()
        if self.at_work or now - self._looked < LOOK_SECONDS:
            return
        self._looked = now
        if not self._cluster.room():
            raise RunError(
                f"no node of the cluster is left with {self._cluster.cpus:g} CPUs and {self._cluster.gpus:g} GPUs for a"
                " worker"
            )
