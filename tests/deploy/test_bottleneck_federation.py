"""A bottleneck in a real federation: the bits of one process, narrow tensors on the wire, and nothing measured around it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from splitft.apps.server_setup import assemble_server
from splitft.data.base import FederatedData
from splitft.data.federate import federate
from splitft.errors import ConfigError, PolicyError
from splitft.messages import ScoreStart

from ..tiny_run import text_file
from .federation_scenes import adapters_of, events_of, federation_config, scene, simulated

pytestmark = pytest.mark.timeout(120)

VARIANTS: dict[str, dict[str, Any]] = {
    "mixed cuts": {},
    "one cut, kept moments, accumulated": {
        "policy": {"name": "fixed", "cuts": [2, 2, 2]},
        "train": {"gradient_accumulation": 2, "moments": "keep"},
    },
    "u-shape": {"split": {"labels": "client"}},
    "u-shape with a tail, and caches": {
        "split": {"labels": "client", "tail_blocks": 1},
        "policy": {"name": "fixed", "cuts": [1, 2, 1]},
        "uplink": {"name": "residual"},
        "downlink": {"name": "residual"},
        "train": {"local_steps": 6},
    },
    "kept as it begins": {"bottleneck": {"channels": 6, "clip": 2.0, "learning_rate": 0.0}},
    "changes of adapters up": {"adapter_uplink": {"name": "quantize", "bits": 8}, "adapter_downlink": {"name": "identity"}},
}


def changed(folder: Path, variant: dict[str, Any]) -> dict[str, Any]:
    """What a bottleneck needs of a federation: public text to measure on, nothing held out by clients."""
    public = folder / "public.txt"
    if not public.is_file():
        text_file(public, documents=6, seed=9)
    made = {
        "bottleneck": {"channels": 6, "clip": 2.0, "learning_rate": 0.5},
        **variant,
        "tokens": {"held_out": 0.0, "common_held_out": 1e-9},
        "federation": {"held_out": str(public)},
    }
    return made


def nothing_put_aside(*arguments: Any, **named: Any) -> FederatedData:
    """A simulation keeps documents from its clients to measure on; here they have the rows that a federation's have."""
    made = federate(*arguments[:8], 0.0, **named)
    return replace(made, common_held_out=made.clients[0].train.select(range(2)))


@pytest.mark.parametrize("variant", VARIANTS)
def test_grpc_gives_the_bits_of_one_process(tmp_path: Path, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = changed(tmp_path, VARIANTS[variant])
    monkeypatch.setattr("splitft.apps.assemble.federate", nothing_put_aside)
    reference = simulated(tmp_path, **changes)
    with scene(tmp_path, **changes) as fed:
        folder = fed.all_clients(window=2).end()
    assert torch.equal(adapters_of(folder), adapters_of(reference))
    for event, expected in zip(events_of(folder), events_of(reference), strict=True):
        for one, other in zip(event["clients"], expected["clients"], strict=True):
            for direction in ("up", "down"):
                for kind in ("activations", "gradients", "labels", "adapters"):
                    assert one["bytes"][direction][kind] == other["bytes"][direction][kind], (direction, kind)
    name = "bottleneck.safetensors"
    assert (folder / name).read_bytes() == (reference / name).read_bytes()


def test_held_out_rows_are_not_measured_around_the_bottleneck(tmp_path: Path) -> None:
    bare = {**changed(tmp_path, {}), "tokens": {"held_out": 0.1}}
    with pytest.raises(ConfigError) as refused:
        assemble_server(federation_config(tmp_path, **bare))
    assert "held-out rows are measured whole" in str(refused.value.problems)
    with scene(tmp_path, seats=1, **changed(tmp_path, {"policy": {"name": "fixed", "cuts": [2]}, "clients": {"minimum": 1}})) as fed:
        fed.all_clients()
        fed.end()
        workshop = fed.members[0][1].workshop
        with pytest.raises(PolicyError, match="without the run's bottleneck"):
            workshop.check_score(ScoreStart(1, 0, 2, 0, False, 8, 2))
