"""Oracle 5: clients and server that exchange messages over gRPC give the adapters of one process, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from .federation_scenes import adapters_of, events_of, scene, simulated

pytestmark = pytest.mark.timeout(120)

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "u-shape": {"split": {"labels": "client", "tail_blocks": 1}, "policy": {"name": "fixed", "cuts": [1, 2, 1]}},
    "accumulation": {"train": {"gradient_accumulation": 3}},
    "unequal ranks": {"ranks": {"name": "splitft", "rank_at_cut": 1}, "aggregator": {"name": "product"}, "train": {"moments": "reset"}},
    "caches": {"uplink": {"name": "residual"}, "downlink": {"name": "residual"}, "train": {"local_steps": 6}},
    "lossy adapters": {"adapter_uplink": {"name": "feedback", "inner": {"name": "quantize", "bits": 8}}},
    "freeze a": {"aggregator": {"name": "freeze_a"}},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_grpc_gives_the_bits_of_one_process(tmp_path: Path, variant: str) -> None:
    changes = VARIANTS[variant]
    reference = simulated(tmp_path, **changes)
    with scene(tmp_path, **changes) as fed:
        folder = fed.all_clients(window=2).end()
    assert torch.equal(adapters_of(folder), adapters_of(reference))
    ours, theirs = events_of(folder), events_of(reference)
    for event, expected in zip(ours, theirs, strict=True):
        for one, other in zip(event["clients"], expected["clients"], strict=True):
            for name in ("cut", "steps", "status", "tokens", "targets", "loss_first", "loss_mean", "loss_last"):
                assert one[name] == other[name], name
            for direction in ("up", "down"):
                for kind in ("activations", "gradients", "labels", "adapters"):
                    assert one["bytes"][direction][kind] == other["bytes"][direction][kind], (direction, kind)
    for one, other in zip(events_of(folder, "evaluation"), events_of(reference, "evaluation"), strict=True):
        assert one["global"]["loss"] == pytest.approx(other["global"]["loss"], rel=1e-4)
        assert one["global"]["tokens"] == other["global"]["tokens"]
    name = "adapter/adapter_model.safetensors"
    assert (folder / name).read_bytes() == (reference / name).read_bytes()
    assert (tmp_path / "home-0" / "adapter" / "adapter_model.safetensors").read_bytes() == (reference / name).read_bytes()


@pytest.mark.parametrize("labels", ["server", "client"])
def test_batched_passes_agree_to_float_tolerance(tmp_path: Path, labels: str) -> None:
    """Sessions that wait together share a ragged pass: another shape of the same products, so another rounding, and nothing else."""
    changes: dict[str, Any] = {
        "uplink": {"name": "identity"},
        "downlink": {"name": "identity"},
        "split": {"labels": labels},
        # Plain steps of equal size: AdamW's first ones are signs, which magnify a rounding without end.
        "train": {"local_steps": 2, "epsilon": 1e-2},
    }
    reference = simulated(tmp_path, **changes)
    batched = {"engine": {"deterministic": False}, "federation": {"gather_s": 0.3}}
    with scene(tmp_path, **{**changes, **batched}) as fed:
        folder = fed.all_clients().end()
        text = fed.house.metrics.text().decode()
    passes = [line for line in text.splitlines() if "pass" in line and "bucket" in line]
    alone = next(float(line.split()[-1]) for line in passes if 'le="1.0"' in line)
    every = next(float(line.split()[-1]) for line in passes if 'le="+Inf"' in line)
    assert alone < every / 2, "most passes have company"
    ours, theirs = adapters_of(folder), adapters_of(reference)
    assert float((ours - theirs).norm() / (theirs - ours.mean()).norm()) < 1e-4
