"""Seconds of a first round on the virtual clock, by fleet and server: what adaptive cuts and divided work save, and where they do not.

python experiments/adaptive/fleets.py        write experiments/results/fleets.json (no training, no data; under a minute)
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from splitft.adapt.combined import Combined
from splitft.adapt.schedule import step_seconds
from splitft.apps.assemble import build_components, cost_model, fleet_of, load_base
from splitft.apps.plan_command import planned_layout
from splitft.apps.plan_fleet import Manner, fleet_plan
from splitft.config import RunConfig, load_config
from splitft.models.anatomy import describe
from splitft.work.balanced import Balanced

HERE = Path(__file__).resolve().parent
TOKENS = 45  # mean length of the rows of time_to_target.toml
SERVERS = ("laptop", "desktop", "edge-gpu", "workstation-gpu")


def seconds(config: RunConfig) -> dict[str, float]:
    """Of one fleet and server: the round with the best uniform cut, and with each way to adapt."""
    components, base = build_components(config), load_base(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(base.config)
    shape = describe(model, config.model.path)
    layout = planned_layout(config, shape, base.anatomy.blocks_path, base.anatomy.bypassed)
    devices, server = fleet_of(config, config.clients.count)
    profiles = [device.profile for device in devices]
    costs = cost_model(config, shape, server, components, layout, base, TOKENS)
    equal = [config.train.local_steps] * len(profiles)

    def divided(cuts: list[int]) -> list[int]:
        alone = {k: step_seconds(costs.cost(costs.plan(cut)), profiles[k], server).total_s for k, cut in enumerate(cuts)}
        steps = Balanced().steps(alone, config.train.local_steps)
        return [steps[k] for k in range(len(profiles))]

    if config.split.labels == "client":  # the whole model on every client
        cuts = [len(shape.blocks)] * len(profiles)
        return {"whole model on every client": fleet_plan(costs, profiles, cuts, equal).round_s}
    best, shallow = (
        Combined(prefer=way, slack=slack).init(shape, profiles, [costs] * len(profiles))["cuts"]
        for way, slack in (("fastest", 0.1), ("shallowest", 0.25))
    )
    assert isinstance(best, list)
    assert isinstance(shallow, list)
    plain = fleet_plan(costs, profiles, best, equal)
    cut = min(range(len(plain.uniform_s)), key=plain.uniform_s.__getitem__)
    together = fleet_plan(costs, profiles, [3] * len(profiles), equal, Manner("shared"))
    return {
        "best uniform cut": plain.uniform_s[cut],
        "best cut": float(plain.shallowest + cut),
        "cut 3, shared server set": together.round_s,
        "combined": plain.round_s,
        "combined, work balanced": fleet_plan(costs, profiles, best, divided(best)).round_s,
        "adaptive": fleet_plan(costs, profiles, shallow, divided(shallow), Manner("alternating")).round_s,
    }


def main() -> None:
    found = []
    for fleet in ("two_tier", "long_tail", "cross_silo", "uniform"):
        for server in SERVERS:
            choice = [f"clients.fleet={fleet}", f"clients.server_profile={server}"]
            row = seconds(load_config(HERE / "time_to_target.toml", choice))
            row |= seconds(load_config(HERE / "time_to_target.toml", [*choice, "split.labels=client"]))
            found.append({"fleet": fleet, "server": server, **row})
    path = HERE.parent / "results" / "fleets.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
