"""Codecs that remember: every executor sends the same, a resumed run goes on to the bit, and nothing is lost by a lossless stack."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from splitft.apps.session import FederatedRun
from splitft.catalog import build
from splitft.config import RunConfig
from splitft.engine import checkpoint
from splitft.engine.settings import TrainSettings
from splitft.engine.streams import open_step_streams
from splitft.errors import ConfigError
from splitft.types import Plan

from ..support import federation
from ..tiny_run import tiny_config
from .test_federation import SHAPES, plans, run

ABSOLUTE = {"name": "error_bounded", "bound": 0.05, "of": "absolute"}
RESIDUAL = {"name": "residual", "inner": ABSOLUTE, "cache_dtype": "float32"}
STACKS: dict[str, dict[str, Any]] = {
    "residual": RESIDUAL,
    "projection-residual": {"name": "projection", "inner": RESIDUAL},
    "temporal": {"name": "temporal", "threshold": 0.9, "inner": {"name": "quantize", "bits": 8}},
    "lowrank": {"name": "lowrank", "rank": 4, "bits": 8},
    "feedback-topk": {"name": "feedback", "inner": {"name": "topk", "share": 0.3}},
    "entropy": {"name": "entropy", "inner": {"name": "quantize", "bits": 4, "rounding": "stochastic"}},
    "residual-little-room": {**RESIDUAL, "cache_mb": 0.002, "evict": "oldest"},
    "residual-spilled": {**RESIDUAL, "cache_mb": 0.002, "spill": True},
}
GRADIENTS = {"name": "error_bounded", "bound": 0.2, "rounding": "stochastic"}
# Enough for every client's samples to come back in the third round.
OFTEN = {"train": {"batch_size": 8, "local_steps": 4}, "tokens": {"held_out": 0.6}}
ADAPTERS = {"name": "feedback", "inner": {"name": "error_bounded", "bound": 0.1}}


def codec(spec: dict[str, Any]) -> Any:
    return build("uplink", spec["name"], {name: value for name, value in spec.items() if name != "name"})


def losses(spec: dict[str, Any], name: str, shape: str) -> torch.Tensor:
    """Four rounds of three clients with mixed cuts and ragged batches, so that samples come back; every loss [round client step]."""
    fed = federation(
        length=(5, 12),
        gradient_accumulation=2,
        uplink=codec(spec),
        downlink=codec(GRADIENTS),
        adapter_uplink=codec(ADAPTERS),
        adapter_downlink=codec({"name": "error_bounded", "bound": 0.05}),
    )
    cuts = [1, 2, 3] if shape != "u-shape-tail-1" else [1, 2, 2]
    return torch.tensor(run(fed, name, fed.layout.initial_row(1), [plans(cuts, **SHAPES[shape]) for _ in range(4)])[1])


# Both U-shapes send the same tensors through the codecs, whoever computes the last block: each stack has one of them in turn.
@pytest.mark.parametrize(
    ("stack", "shape"),
    [pair for index, stack in enumerate(STACKS) for pair in ((stack, "exit-on-server"), (stack, list(SHAPES)[1 + index % 2]))],
)
def test_cohort_and_workers_train_alike(stack: str, shape: str) -> None:
    """The same samples are skipped, changed and remembered at both ends wherever they are.

    Where a matrix product rounds otherwise a value at the border of two levels falls to the other side, and from then on all numbers differ
    by what a level is; a cache out of step would be off by whole activations.
    """
    expected = losses(STACKS[stack], "workers", shape)
    difference = (losses(STACKS[stack], "cohort-of-one", shape) - expected).abs()
    assert float(difference[0].median()) < (1e-2 if stack.startswith("projection") else 1e-5)
    assert float(difference.max()) < 0.05
    assert float((losses(STACKS[stack], "cohort", shape) - expected).abs().max()) < 0.1


def config_of(folder: Path, stack: str, **more: Any) -> RunConfig:
    shape: dict[str, Any] = {"labels": "client"} if stack in ("residual", "temporal") else {}
    return tiny_config(
        folder,
        rounds=4,
        uplink=STACKS[stack],
        downlink=GRADIENTS,
        adapter_uplink=ADAPTERS,
        split=shape,
        **OFTEN,
        **more,
    )


def events(folder: Path) -> list[dict[str, Any]]:
    """The journal without what differs from run to run by nature."""
    lines = [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "wall_s"} for line in lines if line["event"] in ("round", "evaluation")]


@pytest.mark.parametrize("stack", ["projection-residual", "temporal", "lowrank", "feedback-topk", "residual-spilled"])
@pytest.mark.parametrize("engine", ["cohort", "workers"])
def test_a_resumed_run_is_the_uninterrupted_one(stack: str, engine: str, tmp_path: Path) -> None:
    """Losses, bytes and what codecs say of every round, to the bit; the caches come from the checkpoint."""
    controller = {"name": "bang_bang"} if engine == "cohort" else {"name": "energy"}
    whole_config = config_of(tmp_path, stack, engine={"name": engine}, controller=controller, run={"folder": str(tmp_path / "whole")})
    whole = FederatedRun(whole_config)
    list(whole.rounds())
    whole.close()
    broken_config = config_of(tmp_path, stack, engine={"name": engine}, controller=controller, run={"folder": str(tmp_path / "broken")})
    broken = FederatedRun(broken_config)
    rounds: Iterator[Any] = broken.rounds()
    for _ in range(3):
        next(rounds)
    broken.close()
    again = FederatedRun(broken_config, broken.folder)
    list(again.rounds())
    again.close()
    assert events(again.folder) == events(whole.folder)
    assert torch.equal(again.state.adapters, whole.state.adapters)


def test_samples_that_come_back_cost_less(tmp_path: Path) -> None:
    """Later rounds send changes: fewer bytes of activations than the first one, and labels once only."""
    made = FederatedRun(tiny_config(tmp_path, rounds=6, uplink=STACKS["residual"], **OFTEN))
    list(made.rounds())
    made.close()
    up = [event["clients"][0]["bytes"]["up"] for event in events(made.folder) if event["event"] == "round"]
    assert up[-1]["activations"] < 0.6 * up[0]["activations"]
    assert up[-1]["labels"] < 0.2 * up[0]["labels"]
    facts = [event["clients"][0]["codec"]["up activations"] for event in events(made.folder) if event["event"] == "round"]
    assert facts[-1]["residual_squared"] < 0.2 * facts[-1]["known_squared"]
    for round_facts in facts:
        assert round_facts["squared_error"] <= 0.05**2 * round_facts["squared"] * 1.001


def test_another_codec_or_cut_begins_with_empty_caches(tmp_path: Path) -> None:
    """What a checkpoint holds for another codec or cut is dropped, not misread."""
    made = FederatedRun(tiny_config(tmp_path, rounds=3, uplink=STACKS["residual"], **OFTEN))
    list(made.rounds())
    made.close()
    settings = made.assembly.federation.settings
    loaded = checkpoint.load(checkpoint.newest(made.folder)).clients[0].streams
    plan = Plan(0, 1, 1, 3)

    def held(settings: TrainSettings, plan: Plan) -> int:
        state = open_step_streams(settings, plan, 4, loaded)[0].sender
        return len(state.own.entries) if hasattr(state, "own") else -1

    assert held(settings, plan) > 5
    assert held(replace(settings, uplink=settings.uplink.scaled(2.0)), plan) == 0
    assert held(replace(settings, uplink=codec({**RESIDUAL, "cache_dtype": "float16"})), plan) == 0
    assert held(settings, replace(plan, cut=2)) == 0
    assert held(settings, replace(plan, exit_on_client=True)) == 0
    assert held(settings, replace(plan, dial=(2.0, 1.0))) > 5, "a controller's dial leaves caches alone"


def test_a_lossless_stack_changes_no_number(tmp_path: Path) -> None:
    """Entropy over identity: other bytes, the same run to the bit."""
    found = []
    for name, spec in (("plain", {"name": "identity"}), ("entropy", {"name": "entropy", "inner": "identity"})):
        made = FederatedRun(tiny_config(tmp_path, rounds=2, uplink=spec, downlink=spec, run={"folder": str(tmp_path / name)}))
        list(made.rounds())
        made.close()
        found.append(made.state.adapters)
    assert torch.equal(*found)


def test_what_cannot_work_is_refused_by_name(tmp_path: Path) -> None:
    lossy = {"name": "quantize", "bits": 8}
    with pytest.raises(ConfigError, match=r"temporal") as refused:
        FederatedRun(tiny_config(tmp_path, uplink={"name": "residual", "inner": {"name": "temporal"}}))
    assert "choose an inner codec" in str(refused.value) or any("residual" in line for line in refused.value.problems)
    with pytest.raises(ConfigError) as refused:
        FederatedRun(tiny_config(tmp_path, synchronisation={"name": "drift"}, adapter_uplink=lossy))
    assert any("adapter_uplink" in line for line in refused.value.problems)
