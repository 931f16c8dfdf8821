"""Quantised tensors at every cut: all executors train alike, to the random numbers of stochastic rounding, and close to the exact run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from splitft.apps.session import FederatedRun
from splitft.compress.base import Codec
from splitft.compress.quantize import Quantize

from ..support import federation
from ..tiny_run import tiny_config
from .test_federation import SHAPES, plans, run

CODECS: dict[str, Codec] = {
    "int8": Quantize(),
    "int8-stochastic": Quantize(rounding="stochastic"),
    "int4-stochastic": Quantize(bits=4, per="channel", symmetric=False, rounding="stochastic", outliers=0.1),
}


def losses(codec: Codec | None, name: str, shape: str = "exit-on-server", seed: int = 3) -> torch.Tensor:
    """Two rounds of three clients with mixed cuts and ragged batches; every loss [round client step]."""
    fed = federation(length=(5, 12), gradient_accumulation=2, **({} if codec is None else {"uplink": codec, "downlink": codec}))
    object.__setattr__(fed.settings, "seed", seed)  # of the codecs' streams; data and order are made
    cuts = [1, 2, 3] if shape != "u-shape-tail-1" else [1, 2, 2]
    return torch.tensor(run(fed, name, fed.layout.initial_row(1), [plans(cuts, **SHAPES[shape]) for _ in range(2)])[1])


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("shape", SHAPES)
def test_cohort_and_workers_train_alike(codec: str, shape: str) -> None:
    """A value at the border of two levels may fall to either side where a matrix product rounds otherwise, and then the client's later
    losses move: so most losses agree to the last digits and none is far off, while other random numbers change them all."""
    expected = losses(CODECS[codec], "workers", shape)
    for name in ("cohort", "cohort-of-two", "workers-ragged"):
        difference = (losses(CODECS[codec], name, shape) - expected).abs()
        assert float(difference.median()) < 1e-5, name
        assert float(difference.max()) < 0.05, name
    if CODECS[codec].draws:
        assert float((losses(CODECS[codec], "workers", shape, seed=4) - expected).abs().median()) > 1e-4


@pytest.mark.parametrize("codec", CODECS)
def test_rounding_shows_and_stays_small(codec: str) -> None:
    difference = float((losses(CODECS[codec], "workers") - losses(None, "workers")).abs().max())
    assert 0 < difference < 0.1


@pytest.mark.parametrize(
    "fields", [{}, {"bits": 4, "per": "channel", "symmetric": False}, {"bits": 2, "per": "block", "block": 10, "outliers": 0.1}], ids=str
)
def test_the_cost_model_predicts_the_counted_bytes(fields: dict[str, Any], tmp_path: Path) -> None:
    """Exactly, where all rows are full: what is sent once for a packet is sent once for all rows of the batch."""
    codec = {"name": "quantize", **fields}
    config = tiny_config(tmp_path, rounds=1, uplink=codec, downlink=codec, tokens={"packing": "blocks"}, partition={"name": "iid"})
    run = FederatedRun(config)
    list(run.rounds())
    costs = run.assembly.costs
    run.close()
    journal = [json.loads(line) for line in (run.folder / "journal.jsonl").read_text().splitlines()]
    [counted] = [[one["bytes"] for one in event["clients"]] for event in journal if event["event"] == "round"]
    for cost, counts, cut in zip(costs, counted, (1, 2, 3), strict=True):
        predicted = cost.cost(cost.plan(cut)).round_bytes()
        assert predicted["up"]["activations"] == pytest.approx(counts["up"]["activations"], rel=1e-9)
        assert predicted["down"]["gradients"] == pytest.approx(counts["down"]["gradients"], rel=1e-9)
