"""Where a step's time goes: torch's profiler over the real engine, every operation given to a stage.

A stage is known by the part of the engine in which an operation ran (loss, wire, optimizer, the functions of the attention and of the
bank) and else by what it is: a product with an operand of a frozen weight's shape, attention, another tensor operation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from splitft import lora
from splitft.engine import cohort_round
from splitft.engine.cohort_round import Cohort
from splitft.models import attention
from splitft.wire import Wire

PREFIX = "stage "
# What is inside a step but belongs to no stage by itself; its operations are told apart by what they are.
STEP = f"{PREFIX}step"
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "addmm_", "baddbmm_", "_linear_pointwise", "linear", "matmul")
ATTENTION = ("scaled_dot_product", "_flash_attention")
BACKWARD = "autograd::engine::evaluate_function"
OWNERS: tuple[tuple[Any, str, str], ...] = (
    (cohort_round, "training_loss", "head"),
    (Wire, "carry", "wire"),
    (Cohort, "_optimize", "optimizer"),
    (Cohort, "_accumulate", "step"),
)


@contextmanager
def named_parts() -> Iterator[None]:
    """The parts of the engine announce themselves to the profiler."""

    def announced(run: Callable[..., Any], name: str) -> Callable[..., Any]:
        def named(*args: Any, **kwargs: Any) -> Any:
            with record_function(f"{PREFIX}{name}"):
                return run(*args, **kwargs)

        return named

    before = [(owner, name, getattr(owner, name)) for owner, name, _ in OWNERS]
    for owner, name, stage in OWNERS:
        setattr(owner, name, announced(getattr(owner, name), stage))
    try:
        yield
    finally:
        for owner, name, original in before:
            setattr(owner, name, original)


def stage_seconds(run: Callable[[], object], frozen: set[tuple[int, int]]) -> dict[str, float]:
    """Seconds by stage of what `run` does inside of steps. `frozen`: the shapes of the frozen weights."""
    shapes = frozen | {(b, a) for a, b in frozen}
    with named_parts(), profile(activities=[ProfilerActivity.CPU], record_shapes=True, acc_events=True) as profiler:
        run()
    found: dict[str, float] = {}
    for event in profiler.events() or ():
        stage = stage_of(event, shapes)
        if stage:
            found[stage] = found.get(stage, 0.0) + event.self_cpu_time_total / 1e6
    return found


def stage_of(event: Any, shapes: set[tuple[int, int]]) -> str:
    """The stage of a profiled event; empty outside of a step."""
    line = list(_ancestry(event))
    parts = [one.name.removeprefix(PREFIX) for one in line if one.name.startswith(PREFIX)]
    if not parts:
        return ""
    if parts[0] != "step":
        return str(parts[0])
    names = [one.name for one in line]
    functions = {name.removesuffix("Backward") for name in names}
    if functions & _functions_of(attention) or any(word in name for name in names for word in ATTENTION):
        return "attention"
    backward = any(name.startswith(BACKWARD) for name in names)
    if owner := next((one for one in line if _is_product(one.name) and len(one.input_shapes) > 1), None):
        kept = any(tuple(shape) in shapes for shape in owner.input_shapes)
        return ("frozen backward" if backward else "frozen forward") if kept else "low-rank"
    if functions & _functions_of(lora):
        return "low-rank"
    return "elementwise" if event.name.startswith("aten::") else "rest"


def _ancestry(event: Any) -> Iterator[Any]:
    while event is not None:
        yield event
        event = event.cpu_parent


def _is_product(name: str) -> bool:
    return name.rpartition("::")[2] in PRODUCTS and "::" in name


@cache
def _functions_of(module: ModuleType) -> frozenset[str]:
    """Names of a module's own autograd functions, as the profiler has them."""
    found = (value for value in vars(module).values() if isinstance(value, type) and issubclass(value, torch.autograd.Function))
    return frozenset(value.__name__ for value in found)
