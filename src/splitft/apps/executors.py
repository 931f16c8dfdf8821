"""What trains the rounds, by `engine.name`; and the model all of them build, cut and adapted as the configuration says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from transformers import PreTrainedModel

from splitft import catalog
from splitft.config import RunConfig
from splitft.engine.cohort import CohortExecutor
from splitft.engine.rounds import Executor
from splitft.engine.settings import Federation
from splitft.engine.workers import WorkersExecutor
from splitft.models.base import Anatomy
from splitft.split import SplitModel

if TYPE_CHECKING:
    from splitft.apps.assemble import Base, Components


def require_engine(config: RunConfig) -> None:
    """MissingExtraError when the engine needs a package that is not installed; asked before anything slow."""
    if config.engine.name == "ray":
        from splitft.apps.ray_engine import require_ray

        require_ray()


def in_slots(config: RunConfig, anatomy: Anatomy, model: PreTrainedModel, owned: Sequence[int] | None = None) -> SplitModel:
    """A model cut and adapted as the configuration says; its tensors may not be there yet (device "meta"). `owned`: the blocks it has, if
    not all."""
    targets = config.lora.targets if isinstance(config.lora.targets, str) else list(config.lora.targets)
    split = SplitModel(model, anatomy, targets, owned)
    split.set_checkpointing(config.model.gradient_checkpointing)
    if config.engine.compile:
        split.compile_blocks()
    return split


def executor_of(
    config: RunConfig, components: Components, base: Base, federation: Federation, largest: int, on_stage: Callable[[str], None]
) -> tuple[Executor, Callable[[], None]]:
    """What trains the rounds, at most `largest` clients at a time unless the configuration says, and what ends it."""
    if config.engine.name == "cohort":
        return CohortExecutor(federation, config.engine.cohort_size, largest), lambda: None
    if config.engine.name == "workers":
        transport = catalog.build("transport", "inproc", {})
        return WorkersExecutor(federation, transport, config.engine.deterministic), lambda: None
    from splitft.apps.ray_engine import Skeleton, ray_executor, versions

    on_stage("connect to Ray" if config.engine.address else "start Ray")
    rule = components.aggregator
    in_place = rule.linear and rule.segments == 1 and components.synchronisation.always and config.clients.buffer == 0
    in_place = in_place and config.split.server == "per_client"
    skeleton = Skeleton(config, base.config, base.anatomy, base.dtype, base.attention, in_slots, tuple(federation.split.keys), versions())
    return ray_executor(
        config, federation, skeleton, CohortExecutor(federation, config.engine.cohort_size, largest).size, in_place, rule.folds
    )
