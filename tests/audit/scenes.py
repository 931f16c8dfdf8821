"""A really trained model, a client with text of its own, and taps that do what no codec does."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from splitft.audit.base import Case
from splitft.audit.public import notable_tokens, public_text
from splitft.audit.tap import Tap
from splitft.compress.identity import Identity
from splitft.data.base import ClientData, Document
from splitft.data.federate import public_rows
from splitft.data.order import BatchOrder
from splitft.data.python_docs import PythonDocs
from splitft.engine.cohort import CohortExecutor
from splitft.engine.settings import Federation, same_start
from splitft.lora import Layout
from splitft.models.load import load_model, load_model_config, load_tokenizer
from splitft.optimizer import AdamW, Schedule
from splitft.rng import torch_stream
from splitft.selfcheck import inspect_family
from splitft.split import SplitModel
from splitft.types import Plan, RoundPlan

from ..support import settings

TOKENS = 32
STORIES = Path(__file__).resolve().parents[3] / "shared" / "models" / "stories260K"


def model_path() -> str:
    """A quarter of a million parameters where that model lies beside the repository, else the embedded one."""
    return str(STORIES) if STORIES.is_dir() else "embedded"


@lru_cache(maxsize=1)
def documents() -> tuple[tuple[Document, ...], tuple[Document, ...]]:
    """The client's text and everybody's, of different files."""
    found = list(PythonDocs(max_documents=500).documents())
    own = {one.owner for one in found if len(one.owner) % 2}
    return tuple(one for one in found if one.owner in own)[:120], tuple(one for one in found if one.owner not in own)


class Everybodys(PythonDocs):
    """The public half."""

    def documents(self) -> Any:
        return iter(documents()[1])


@lru_cache(maxsize=2)
def scene(exit_on_client: bool = False) -> tuple[Federation, Plan, Case]:
    """A federation of one client cut at 2, float32, adapters on every projection, before training."""
    path = model_path()
    config = load_model_config(path)
    split = SplitModel(load_model(path, config, torch.float32), inspect_family(config, path, "sdpa"), "all")
    tokenizer, vocabulary = load_tokenizer(path), int(config.get_text_config().vocab_size)
    private, _ = documents()
    rows = public_rows(private, tokenizer, "blocks", TOKENS)
    layout = Layout.of(split.keys, 8, 2.0)
    chosen = settings(
        batch_size=4, schedule=Schedule(1e-3, 200, 5, "linear"), optimizer=AdamW(), clip_norm=1.0, uplink=Identity(), downlink=Identity()
    )
    client = ClientData(0, "client", len(private), rows, rows.select([0]))
    start = layout.initial_row(1)
    orders = (BatchOrder(len(rows), 4, 3, 0),)
    federation = Federation(split, layout, (client,), orders, chosen, vocabulary, torch.device("cpu"), start)
    plan = Plan(0, 2, 1, 8, exit_on_client)
    public = public_text(tokenizer, private, TOKENS, vocabulary, Everybodys())
    ids, _, trained = rows.batch([3, 11, 40])
    sample = torch.from_numpy(ids), torch.from_numpy(trained)
    case = Case(split, layout, chosen, plan, start, start, *sample, public, notable_tokens(tokenizer, vocabulary), vocabulary)
    return federation, plan, case


@lru_cache(maxsize=2)
def trained_row(steps: int = 100) -> Tensor:
    """The client's adapter after so many steps on its own text."""
    federation, plan, _ = scene()
    plans = RoundPlan(1, (replace(plan, local_steps=steps),))
    return CohortExecutor(federation, 1).train(plans, 0, same_start(federation.start), {}, lambda count: None).values[0].clone()


def adapted(case: Case, **changes: Any) -> Case:
    """The case with the trained adapter, and other changes."""
    return replace(case, adapters=trained_row(), **changes)


class Noisy(Tap):
    """Adds noise of so many standard deviations per channel to everything that crosses the cut."""

    def __init__(self, case: Case, cut: int, deviations: float) -> None:
        super().__init__(case.settings, case.plan, cut)
        self.deviations = deviations

    def private(self, hidden: Tensor, place: int = 0) -> Tensor:
        return self._noisy(super().private(hidden, place), 0)

    def public(self, hidden: Tensor, batch: int) -> Tensor:
        return self._noisy(super().public(hidden, batch), batch + 1)

    def _noisy(self, hidden: Tensor, number: int) -> Tensor:
        noise = torch.randn(hidden.shape, generator=torch_stream(7, "noise", number))
        return hidden + self.deviations * hidden.reshape(-1, hidden.shape[-1]).std(0) * noise


class NoiseOnly(Noisy):
    """Sends noise of the same mean and deviation per channel in place of the private text."""

    def private(self, hidden: Tensor, place: int = 0) -> Tensor:
        flat = hidden.reshape(-1, hidden.shape[-1])
        noise = torch.randn(hidden.shape, generator=torch_stream(9, "noise only"))
        return flat.mean(0) + flat.std(0) * noise
