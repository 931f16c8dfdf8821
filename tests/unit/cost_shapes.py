"""A small model shape and cost model for the tests of the planning code."""

from __future__ import annotations

from dataclasses import replace

from splitft.adapt.cost import CostModel
from splitft.types import BlockShape, ModelShape, Profile, Projection

BLOCK = BlockShape(
    parameters=13_000,
    active_parameters=13_000,
    projections=(
        Projection("attn.c_attn", 32, 96),
        Projection("attn.c_proj", 32, 32),
        Projection("mlp.c_fc", 32, 128),
        Projection("mlp.c_proj", 128, 32),
    ),
)
SHAPE = ModelShape(
    name="small",
    blocks=(BLOCK,) * 6,
    hidden_size=32,
    attention_width=32,
    vocabulary=100,
    embedding_parameters=3200,
    exit_parameters=64,
    head_parameters=3200,
    positions=64,
    tied=False,
)
SERVER = Profile("server", 1e9, 1e9, 1e9, 1e9, 0.0)
DEVICE = Profile("device", 1e8, 1e9, 1e6, 2e6, 0.01)


def cost_model(shape: ModelShape = SHAPE, **fields: object) -> CostModel:
    return replace(CostModel(shape, SERVER, batch_size=2, sequence_tokens=16, rank=4, modules=("attn.c_attn",)), **fields)  # type: ignore[arg-type]
