"""A pool of Ray actors that work off jobs: an idle actor takes the next one; what a lost actor had goes to another, and a fresh one starts.

Imports Ray, so only what runs on it may import this module.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import ray
from ray import exceptions

from splitft.errors import ResourceError, SplitftError

# Handles and references of Ray's, which does not type what they stand for.
Actor: TypeAlias = Any
Reference: TypeAlias = Any

# How long to wait for an answer before asking whether the user wants to stop.
PATIENCE_S = 0.25
# How often one job, or the setting-up of one actor, may meet an actor's end.
ATTEMPTS = 4
# What Ray raises when the process that should answer is gone.
LOST = (exceptions.RayActorError, exceptions.NodeDiedError, exceptions.WorkerCrashedError, exceptions.OutOfMemoryError)


@dataclass(frozen=True)
class Job:
    """`submit` hands the job to an actor and returns two references: one to wait for and fetch, one to an array that stays where it is.
    `near`: the actor to take it if idle, since what it needs lies there."""

    name: str
    submit: Callable[[Actor], Sequence[Reference]]
    near: Actor = None


@dataclass(frozen=True)
class Finished:
    """What a job gave, and which actor did it."""

    facts: Any
    array: Reference
    actor: Actor


@dataclass
class Pool:
    """`size` actors. `create` makes one; `build` starts its setting-up and returns a reference to what that gives (kept in `built`).

    `notices` are the losses since the last `take_notices`, in words.
    """

    create: Callable[[], Actor]
    build: Callable[[Actor], Reference]
    size: int
    idle: list[Actor] = field(default_factory=list)
    starting: dict[Reference, Actor] = field(default_factory=dict)
    built: list[Any] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    failed_starts: int = 0

    def open(self) -> None:
        """Start the actors that are missing; they set themselves up meanwhile."""
        for _ in range(self.size - len(self.idle) - len(self.starting)):
            self._start()

    def take_notices(self) -> list[str]:
        taken, self.notices = self.notices, []
        return taken

    def run(
        self, jobs: Sequence[Job], on_wait: Callable[[], None], on_done: Callable[[Finished], None] = lambda one: None
    ) -> list[Finished]:
        """All jobs, in their order. Raises what a job raises, errors of ours as they are; ResourceError for a job whose actors are lost
        time and again; Ray's ObjectLostError for one whose arguments are.

        `on_wait` is called several times a second and may raise: the jobs in progress are given up then, their actors with them.
        """
        self.open()
        found: dict[int, Finished] = {}
        attempts = [0] * len(jobs)
        todo, running = deque(range(len(jobs))), dict[Reference, tuple[int, Actor, Reference]]()
        try:
            while todo or running:
                while todo and self.idle:
                    number = todo.popleft()
                    actor = self._take(jobs[number].near)
                    first, array = jobs[number].submit(actor)
                    running[first] = (number, actor, array)
                ready, _ = ray.wait([*running, *self.starting], num_returns=1, timeout=PATIENCE_S)
                on_wait()
                for reference in ready:
                    if reference in self.starting:
                        self._started(reference)
                        continue
                    number, actor, array = running.pop(reference)
                    try:
                        found[number] = Finished(_fetched(reference), array, actor)
                    except LOST as problem:
                        attempts[number] += 1
                        self._lost(actor, jobs[number].name, attempts[number], problem)
                        todo.appendleft(number)
                        continue
                    except BaseException:
                        self.idle.append(actor)
                        raise
                    self.idle.append(actor)
                    on_done(found[number])
        finally:
            for _, actor, _ in running.values():
                ray.kill(actor)
        return [found[number] for number in range(len(jobs))]

    def close(self) -> None:
        """End all actors."""
        for actor in [*self.idle, *self.starting.values()]:
            ray.kill(actor)
        self.idle, self.starting = [], {}

    def _start(self) -> None:
        actor = self.create()
        self.starting[self.build(actor)] = actor

    def _started(self, reference: Reference) -> None:
        """An actor is set up, or has died of it: then another one is tried, a few times."""
        actor = self.starting.pop(reference)
        try:
            self.built.append(_fetched(reference))
        except LOST as problem:
            self.failed_starts += 1
            if self.failed_starts >= ATTEMPTS:
                raise ResourceError(
                    f"{self.failed_starts} Ray actors died while they were setting up: {_reason(problem)}.",
                    "look at the memory of the machines: lower engine.actors, or choose a smaller model.",
                ) from problem
            self._start()
            return
        self.idle.append(actor)

    def _take(self, near: Actor) -> Actor:
        return self.idle.pop(self.idle.index(near) if near in self.idle else 0)

    def _lost(self, actor: Actor, name: str, attempts: int, problem: Exception) -> None:
        """Put another actor in the place of one that is gone. Raises ResourceError when this happens to a job too often."""
        reason = _reason(problem)
        ray.kill(actor)  # it may only be out of reach
        if attempts >= ATTEMPTS:
            raise ResourceError(
                f"{name} met the end of its Ray actor {attempts} times: {reason}.",
                "look at the memory of the machines: lower engine.actors or engine.cohort_size; the run can be resumed.",
            ) from problem
        self.notices.append(f"{name} met the end of its Ray actor and was done again by another, with the same numbers: {reason}.")
        self._start()


def _fetched(reference: Reference) -> Any:
    """What a reference stands for; an error of ours without Ray's wrapping."""
    try:
        return ray.get(reference)
    except exceptions.RayTaskError as problem:
        cause = problem.cause
        if isinstance(cause, (SplitftError, exceptions.RayError)):
            raise cause from None
        raise


def _reason(problem: Exception) -> str:
    """The first line of Ray's explanation."""
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
    return (lines[0] if lines else type(problem).__name__).rstrip(".:")
