"""What is measured: models, the federations over them, and the plans of a round. Torch is needed to import this.

Axes: n clients, t tokens of a client, d width.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from transformers import GPT2Config, PreTrainedModel

from splitft.compress.base import Codec
from splitft.compress.cast import Cast
from splitft.compress.identity import Identity
from splitft.compress.quantize import Quantize
from splitft.data.base import ClientData, TokenRows
from splitft.data.order import BatchOrder
from splitft.engine.settings import Federation, TrainSettings
from splitft.lora import Layout
from splitft.models.anatomy import without_dropout
from splitft.models.attention import register as register_attention
from splitft.models.load import load_model, load_model_config
from splitft.optimizer import AdamW, Schedule
from splitft.rng import numpy_stream
from splitft.selfcheck import build_random, inspect_family
from splitft.split import SplitModel
from splitft.types import Plan, RoundPlan

RANK, ALPHA, TARGETS = 8, 16.0, ("c_attn", "c_proj", "c_fc")
LEARNING_RATE, WEIGHT_DECAY, CLIP_NORM = 1e-4, 0.01, 1.0
CODECS: dict[str, Codec] = {"cast": Cast("bfloat16"), "identity": Identity(), "int8": Quantize(bits=8)}
Model = TypeVar("Model", bound=nn.Module)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MODELS = {
    "embedded": "the embedded model: GPT-2 layout, 8 blocks × 256, vocabulary 4,096",
    "gpt2-small": "GPT-2 small's shape with random weights: 12 blocks × 768, vocabulary 50,257",
    "tiny": "GPT-2 layout with random weights: 3 blocks × 32, vocabulary 96",
}
_SHAPES: dict[str, dict[str, int]] = {
    "gpt2-small": {},
    "tiny": {"n_layer": 3, "n_embd": 32, "n_head": 4, "vocab_size": 96, "n_positions": 256, "bos_token_id": 1, "eos_token_id": 2},
}


@dataclass(frozen=True)
class Case:
    """One setting in which all ways of training are compared: every client has one sequence of `tokens` tokens a step."""

    model: str
    dtype: str
    clients: int
    tokens: int
    steps: int

    @property
    def step_tokens(self) -> int:
        """Tokens of one optimizer step of all clients."""
        return self.clients * self.tokens

    def facts(self) -> dict[str, Any]:
        return {"model": self.model, "dtype": self.dtype, "clients": self.clients, "tokens": self.tokens, "steps": self.steps}


def with_steps(case: Case, steps: int) -> Case:
    return replace(case, steps=steps)


def with_dtype(case: Case, dtype: str) -> Case:
    return replace(case, dtype=dtype)


def model_config(name: str) -> Any:
    """The transformers configuration of one of MODELS, without dropout."""
    return load_model_config("embedded") if name == "embedded" else without_dropout(GPT2Config(**_SHAPES[name]))


def build_model(name: str, dtype: str, attention: str = "sdpa") -> PreTrainedModel:
    """One of MODELS with frozen weights, the same at every call."""
    config = model_config(name)
    if name == "embedded":
        return load_model("embedded", config, DTYPES[dtype], attention)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build_random(config, attention)
    return model.to(DTYPES[dtype]).requires_grad_(False)


def sharing(model: Model) -> Model:
    """A copy of `model` with modules of its own over the same frozen weights: a contestant may rebuild it, and weights are held once."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters() if not parameter.requires_grad})


def cohort_model(model: PreTrainedModel) -> SplitModel:
    """A copy of `model` over the same weights as the engine trains it on a CPU: with its attention, slots, adapters on all projections."""
    own = sharing(model)
    own.set_attn_implementation(register_attention())
    return split_model(own)


def split_model(model: PreTrainedModel, owned: list[int] | None = None) -> SplitModel:
    """`model`, in place, with slots and adapters on all projections."""
    return SplitModel(model, inspect_family(model.config, model.config.model_type), "all", owned)


def cuts(clients: int, blocks: int) -> list[int]:
    """Mixed cuts: 1, 2, .., blocks - 1, 1, ..; a single client is cut after a quarter of the blocks."""
    return [max(1, blocks // 4)] if clients == 1 else [1 + k % (blocks - 1) for k in range(clients)]


def round_plan(case: Case, blocks: int) -> RoundPlan:
    return RoundPlan(1, tuple(Plan(k, cut, case.steps, RANK) for k, cut in enumerate(cuts(case.clients, blocks))))


def settings(codec: Codec) -> TrainSettings:
    return TrainSettings(
        batch_size=1,
        gradient_accumulation=1,
        schedule=Schedule(LEARNING_RATE, 1, 0, "constant"),
        optimizer=AdamW(weight_decay=WEIGHT_DECAY),
        clip_norm=CLIP_NORM,
        keep_moments=False,
        uplink=codec,
        downlink=codec,
        adapter_uplink=Identity(),
        adapter_downlink=Identity(),
        seed=0,
    )


def client_data(case: Case, vocabulary: int) -> tuple[ClientData, ...]:
    """Random tokens: what they say does not change what they cost."""
    found = []
    for client in range(case.clients):
        draw = numpy_stream(0, "benchmark-tokens", client)
        rows = TokenRows.build(
            [(draw.integers(3, vocabulary, case.tokens).astype(np.int32), np.ones(case.tokens, np.bool_)) for _ in range(case.steps)]
        )
        found.append(ClientData(client, f"client-{client}", case.steps, rows, rows))
    return tuple(found)


def federation(case: Case, split: SplitModel, codec: Codec, layout: Layout | None = None) -> Federation:
    """A federation over `split`; the layout is that of its own keys unless given."""
    vocabulary = int(split.model.config.vocab_size)
    data = client_data(case, vocabulary)
    orders = tuple(BatchOrder(len(one.train), 1, 0, one.client) for one in data)
    chosen = Layout.of(split.keys, RANK, ALPHA / RANK) if layout is None else layout
    return Federation(split, chosen, data, orders, settings(codec), vocabulary, torch.device("cpu"), chosen.initial_row(0))


def with_codec(base: Federation, codec: Codec) -> Federation:
    """The same federation over another codec; model and data are shared."""
    return replace(base, settings=settings(codec))


def step_batches(base: Federation, steps: int) -> list[Tensor]:
    """The token ids [n t] that all clients train on in each step, in the order the federation draws them."""
    drawn = list(zip(base.clients, base.orders, strict=True))
    return [torch.from_numpy(np.concatenate([one.train.batch(order.indices(step))[0] for one, order in drawn])) for step in range(steps)]
