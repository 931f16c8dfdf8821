"""Law 1 at full strength, and every way a round can end, on whole runs: what moves, who vanishes and when merges happen."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from splitft import catalog
from splitft.adapt.base import Policy, State
from splitft.adapt.cost import CostModel
from splitft.apps.export import export
from splitft.apps.session import FederatedRun
from splitft.config import RunConfig
from splitft.engine import checkpoint
from splitft.errors import ConfigError, ResourceError
from splitft.rng import numpy_stream
from splitft.types import ModelShape, Observation, Profile

from ..tiny_run import tiny_config
from .test_resume import same, train

EXACT = {"uplink": {"name": "identity"}, "downlink": {"name": "identity"}}


@dataclass(frozen=True)
class Wandering(Policy):
    """Another cut for every client in every round."""

    references: ClassVar[tuple[str, ...]] = ()

    def init(self, shape: ModelShape, profiles: Sequence[Profile], costs: Sequence[CostModel]) -> State:
        return {"cuts": [1] * len(profiles), "deepest": costs[0].deepest_cut}

    def plan(
        self, round_index: int, participants: Sequence[int], observations: Sequence[Observation], state: State
    ) -> tuple[dict[int, int], State]:
        deepest = state["deepest"]
        assert isinstance(deepest, int)
        return {client: 1 + (round_index + client) % deepest for client in participants}, state


@pytest.fixture(autouse=True)
def wandering(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(catalog.POLICIES, "wandering", Wandering)  # type: ignore[arg-type]


def configured(folder: Path, **changes: Any) -> RunConfig:
    return tiny_config(folder, **{**EXACT, "rounds": 4, "policy": {"name": "fixed", "cuts": [2]}, **changes})


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [one for one in map(json.loads, (folder / "journal.jsonl").read_text().splitlines()) if one["event"] == kind]


def adapters(folder: Path) -> torch.Tensor:
    return checkpoint.load(checkpoint.newest(folder)).adapters


def moved(folder: Path, other: Path, config: RunConfig) -> float:
    """Largest difference of two runs' adapters, relative to how far training moved them."""
    run = FederatedRun(config.model_copy(update={"name": "start"}))
    start = run.state.adapters
    run.close()
    found, expected = adapters(folder), adapters(other)
    size = float((expected - start).abs().max())
    assert size > 1e-3, "nothing was trained"
    return float((found - expected).abs().max()) / size


@pytest.mark.parametrize("engine", ["cohort", "workers"])
@pytest.mark.parametrize("losses", [{}, {"dropout": 0.35, "availability": 0.8, "count": 4}])
def test_moving_every_cut_in_every_round_trains_the_same_adapters(tmp_path: Path, engine: str, losses: dict[str, Any]) -> None:
    common: dict[str, Any] = {"engine": {"name": engine}, "clients": {"count": 3, **losses}, "train": {"moments": "keep"}}
    fixed = train(configured(tmp_path, name="fixed", policy={"name": "fixed", "cuts": [2]}, **common))
    config = configured(tmp_path, name="wandering", policy={"name": "wandering"}, **common)
    moving = train(config)
    assert moved(moving, fixed, config) < 1e-3
    cuts = [[one["cut"] for one in event["clients"]] for event in events(moving, "round")]
    assert len({tuple(one) for one in cuts}) > 1
    status = [[(one["client"], one["status"]) for one in event["clients"]] for event in events(moving, "round")]
    assert status == [[(one["client"], one["status"]) for one in event["clients"]] for event in events(fixed, "round")]
    assert any(state == "lost" for one in status for _, state in one) == bool(losses)


def test_whole_clients_train_what_split_ones_do(tmp_path: Path) -> None:
    split = train(configured(tmp_path, name="split", policy={"name": "fixed", "cuts": [1]}))
    config = configured(tmp_path, name="whole", policy={"name": "whole"}, split={"labels": "client"})
    whole = train(config)
    assert moved(whole, split, config) < 1e-3
    counts = [one["bytes"] for event in events(whole, "round") for one in event["clients"]]
    assert all(one["up"]["activations"] == one["down"]["gradients"] == 0 for one in counts)


def test_whole_needs_the_exit_on_the_client(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r'split\.labels is "server"'):
        FederatedRun(configured(tmp_path, policy={"name": "whole"}))


MODES: dict[str, dict[str, Any]] = {
    "shared": {"split": {"server": "shared"}},
    "alternating": {"split": {"server": "alternating"}, "train": {"gradient_accumulation": 2}, "work": {"name": "balanced"}},
    "sequential": {"split": {"server": "sequential"}},
    "unaveraged": {"split": {"server": "unaveraged"}},
    "product-budget": {"aggregator": {"name": "product"}, "ranks": {"name": "splitft", "rank_at_cut": 1}},
    "importance": {"aggregator": {"name": "product"}, "ranks": {"name": "importance", "share": 0.6}},
    "stack": {"aggregator": {"name": "stack"}, "train": {"moments": "reset"}},
    "residual": {"aggregator": {"name": "residual"}, "train": {"moments": "reset"}},
    "freeze-a": {"aggregator": {"name": "freeze_a"}, "train": {"weight_decay": 0.1}},
    "fed-adam-over-product": {"aggregator": {"name": "fed_adam", "rule": "product"}},
    "segments": {"aggregator": {"name": "segments", "count": 2}},
    "drift": {"synchronisation": {"name": "drift", "max_rounds": 2}},
    "asynchronous": {"clients": {"count": 4, "buffer": 2, "speed_jitter": 0.5, "dropout": 0.2}},
    "deadline": {"clients": {"count": 3, "fleet": "long_tail", "deadline_s": 0.1, "quorum": 0.3, "dropout": 0.2}},
    "balanced-work": {"work": {"name": "balanced"}, "clients": {"count": 4, "fleet": "long_tail"}, "train": {"moments": "keep"}},
    "combined": {"policy": {"name": "combined"}, "clients": {"count": 4, "fleet": "two_tier"}},
}


@pytest.mark.parametrize("mode", MODES)
def test_stopped_after_a_round_and_resumed_equals_uninterrupted(tmp_path: Path, mode: str) -> None:
    changes = {"policy": {"name": "fixed", "cuts": [2]}, **MODES[mode]}
    expected = train(configured(tmp_path, name="expected", **changes))
    config = configured(tmp_path, name="stopped", **changes)
    run = FederatedRun(config)
    for record in run.rounds():
        if record.round == 2:
            break
    run.close()
    folder = train(config, run.folder)
    same(folder, expected)
    assert all(event["virtual_end_s"] >= event["virtual_start_s"] for event in events(folder, "round"))
    assert not events(folder, "evaluation")[-1]["global"]["loss"] > events(folder, "evaluation")[0]["global"]["loss"]


def test_a_buffer_of_all_clients_is_a_synchronous_round(tmp_path: Path) -> None:
    same_time = train(configured(tmp_path, name="rounds", clients={"count": 3}))
    buffered = train(configured(tmp_path, name="buffer", clients={"count": 3, "buffer": 3}))
    torch.testing.assert_close(adapters(buffered), adapters(same_time), rtol=1e-5, atol=1e-6)
    assert [one["virtual_end_s"] for one in events(buffered, "round")] == [one["virtual_end_s"] for one in events(same_time, "round")]


def test_an_asynchronous_run_weighs_the_stale_and_ends_sooner(tmp_path: Path) -> None:
    clients = {"count": 4, "profiles": ["desktop", "desktop", "desktop", "phone"]}
    rounds = train(configured(tmp_path, name="rounds", clients=clients))
    folder = train(configured(tmp_path, name="stale", clients={**clients, "buffer": 3}))
    assert events(folder, "round")[-1]["virtual_end_s"] < events(rounds, "round")[-1]["virtual_end_s"]
    stale = [one["staleness"] for event in events(folder, "round") for one in event["clients"]]
    assert max(stale) >= 1
    assert all(len(event["clients"]) == 3 for event in events(folder, "round"))


def test_drift_that_always_merges_is_every_round(tmp_path: Path) -> None:
    usual = train(configured(tmp_path, name="usual"))
    drift = train(configured(tmp_path, name="drift", synchronisation={"name": "drift", "max_rounds": 1}))
    assert torch.equal(adapters(drift), adapters(usual))


def test_between_merges_adapters_stay_where_they_are(tmp_path: Path) -> None:
    folder = train(configured(tmp_path, rounds=6, synchronisation={"name": "drift", "max_rounds": 4}))
    rounds = events(folder, "round")
    assert rounds[0]["aggregated"]
    assert rounds[-1]["aggregated"]
    assert {event["aggregated"] for event in rounds} == {True, False}
    for before, event in itertools.pairwise(rounds):
        for one in event["clients"]:
            assert (one["bytes"]["up"]["adapters"] > 0) == event["aggregated"]
            assert (one["bytes"]["down"]["adapters"] > 0) == before["aggregated"]


def test_unaveraged_fronts_are_the_clients_own(tmp_path: Path) -> None:
    folder = train(configured(tmp_path, policy={"name": "fixed", "cuts": [2]}, split={"server": "unaveraged"}))
    state = checkpoint.load(checkpoint.newest(folder))
    rows = [state.clients[client].adapter for client in range(3)]
    assert all(row is not None for row in rows)
    assert not torch.equal(rows[0][:50], rows[1][:50])  # type: ignore[index]
    assert all(sum(one["bytes"][way]["adapters"] for way in ("up", "down")) == 0 for e in events(folder, "round") for one in e["clients"])
    assert sorted(path.name for path in folder.glob("adapter-client-*")) == [f"adapter-client-{k}" for k in range(3)]
    assert not torch.equal(state.adapters, rows[0])  # type: ignore[arg-type]


@pytest.mark.parametrize("rule", ["stack", "residual"])
def test_what_was_folded_into_the_base_comes_out_as_a_stock_adapter(tmp_path: Path, rule: str) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    config = configured(tmp_path, aggregator={"name": rule}, tokens={"block_tokens": 16}, train={"moments": "reset"})
    run = FederatedRun(config)
    list(run.rounds())
    folder = run.finish()
    ids = torch.arange(3, 15)[None]
    split = run.assembly.federation.split
    run.close()
    from splitft.lora import AdapterBank
    from splitft.split import Route

    bank, exported_again = AdapterBank(run.assembly.federation.layout, 1), export(folder, tmp_path / "out")
    with torch.no_grad():
        bank.values[0] = run.state.adapters
        mine = split.logits(split.run(Route(1, bank=bank), ids, None))
        for exported in (folder / "adapter", exported_again):
            stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(config.model.path), exported).eval()
            torch.testing.assert_close(stock(ids).logits, mine, rtol=1e-4, atol=1e-5)
        plain = AutoModelForCausalLM.from_pretrained(config.model.path).eval()(ids).logits
    assert float((plain - mine).abs().max()) > 1e-4, "nothing was learned"
    weights = [one["bytes"]["down"]["weights"] for one in events(folder, "round")[-1]["clients"]]
    assert all(count > 0 for count in weights), "folded weights reach the clients as bytes"


def test_a_deadline_turns_a_straggler_into_a_partial_update(tmp_path: Path) -> None:
    clients = {"count": 3, "profiles": ["desktop", "desktop", "phone"], "quorum": 0.5}
    config = configured(tmp_path, name="all", clients=clients, train={"local_steps": 4})
    whole = events(train(config), "round")
    finishes = sorted(one["finish_s"] for one in whole[0]["clients"])
    assert finishes[-1] > 1.5 * finishes[0]
    deadline_s = (finishes[1] + finishes[2]) / 2
    for late, status in (("partial", "partial"), ("drop", "lost")):
        changed = {**clients, "deadline_s": deadline_s, "late": late}
        folder = train(configured(tmp_path, name=late, clients=changed, train={"local_steps": 4}))
        first = events(folder, "round")[0]
        assert [one["status"] for one in first["clients"]] == ["done", "done", status]
        assert 1 <= first["clients"][2]["steps"] < 4
        assert first["virtual_end_s"] < whole[0]["virtual_end_s"]
        assert first["clients"][2]["bytes"]["up"]["activations"] > 0, "a straggler's traffic is real"


def test_a_client_refuses_a_cut_it_cannot_hold(tmp_path: Path) -> None:
    profiles = tmp_path / "profiles.toml"
    base = configured(tmp_path, name="probe", policy={"name": "fixed", "cuts": [3]})
    run = FederatedRun(base)
    costs = run.assembly.costs[0]
    run.close()
    holds = costs.cost(costs.plan(2)).client_memory.total_bytes
    profiles.write_text(f'[small]\nlike = "phone"\nmemory_bytes = {holds + 1}\n[tiny]\nlike = "phone"\nmemory_bytes = 1000.0\n')
    clients = {"count": 2, "profiles": ["small", "laptop"], "profiles_file": str(profiles)}
    folder = train(configured(tmp_path, name="refusing", policy={"name": "fixed", "cuts": [3]}, clients=clients))
    first = events(folder, "round")[0]["clients"]
    assert (first[0]["cut"], first[0]["refused_cut"], first[1]["cut"]) == (2, 3, 3)
    with pytest.raises(ResourceError, match=r"client 0 cannot hold any cut that is allowed: cut 1 needs \d+ bytes, 'tiny' has 1000"):
        train(configured(tmp_path, name="no", policy={"name": "fixed", "cuts": [3]}, clients={**clients, "profiles": ["tiny", "laptop"]}))


def test_a_deeper_cut_fetches_its_blocks_once(tmp_path: Path) -> None:
    folder = train(configured(tmp_path, rounds=6, policy={"name": "wandering"}, clients={"count": 1}))
    cuts = [event["clients"][0]["cut"] for event in events(folder, "round")]
    fetched = [event["clients"][0]["bytes"]["down"]["weights"] for event in events(folder, "round")]
    deepest = cuts[0]
    for cut, count in zip(cuts, fetched, strict=True):
        assert (count > 0) == (cut > deepest)
        deepest = max(deepest, cut)
    assert any(fetched)
    assert any("blocks_down" in event["clients"][0]["busy_s"] for event in events(folder, "round"))
    free = train(configured(tmp_path, name="free", rounds=6, policy={"name": "wandering"}, clients={"count": 1, "fetch_blocks": False}))
    assert not any(event["clients"][0]["bytes"]["down"]["weights"] for event in events(free, "round"))


def test_a_swinging_cut_is_reported_once(tmp_path: Path) -> None:
    folder = train(configured(tmp_path, rounds=8, policy={"name": "wandering"}, clients={"count": 1}))
    warnings = events(folder, "warning")
    assert len(warnings) == 1
    assert "goes back and forth" in warnings[0]["text"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ranks": {"name": "splitft"}}, 'makes unequal ranks, which aggregator "average" cannot merge'),
        ({"aggregator": {"name": "product"}, "split": {"server": "unaveraged"}}, 'which aggregator "product" cannot merge'),
        ({"split": {"server": "shared"}, "clients": {"count": 3, "buffer": 2}}, 'clients.buffer needs split.server = "per_client"'),
        ({"aggregator": {"name": "stack"}, "engine": {"name": "workers"}}, 'only engine.name = "cohort" does'),
        ({"synchronisation": {"name": "drift"}, "clients": {"count": 3, "participation": 0.5}}, "set clients.participation = 1.0"),
    ],
)
def test_methods_that_contradict_each_other_are_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        FederatedRun(configured(tmp_path, **changes))
    assert any(words in line for line in caught.value.problems)
    assert not (tmp_path / "runs" / "tiny").exists()


def test_balanced_work_shortens_the_round_and_keeps_its_steps(tmp_path: Path) -> None:
    clients = {"count": 4, "profiles": ["desktop", "phone", "desktop", "phone"]}
    rounds = {}
    for work in ("equal", "balanced"):
        config = configured(tmp_path, name=work, work={"name": work}, clients=clients, train={"local_steps": 4, "batch_size": 4})
        rounds[work] = events(train(config), "round")
    steps = {work: [one["steps"] for one in found[-1]["clients"]] for work, found in rounds.items()}
    assert steps["equal"] == [4, 4, 4, 4]
    assert sum(steps["balanced"]) == 16
    assert steps["balanced"][0] > steps["balanced"][1]
    assert all(one["status"] == "done" for event in rounds["balanced"] for one in event["clients"])
    assert rounds["balanced"][-1]["virtual_end_s"] < 0.8 * rounds["equal"][-1]["virtual_end_s"]


@pytest.mark.parametrize("engine", ["cohort", "workers"])
def test_ragged_steps_are_the_same_in_one_pass_and_alone(tmp_path: Path, engine: str) -> None:
    found = []
    for size in (0, 1):
        config = configured(
            tmp_path,
            name=f"ragged-{size}",
            work={"name": "balanced"},
            clients={"count": 4, "fleet": "long_tail"},
            engine={"name": engine, "cohort_size": size},
            train={"local_steps": 3, "moments": "keep"},
        )
        found.append(train(config))
    assert moved(found[0], found[1], config) < 1e-3


def test_drop_outs_follow_the_seed_alone(tmp_path: Path) -> None:
    lost = []
    for seed in (1, 1, 2):
        folder = tmp_path / str(len(lost))
        folder.mkdir()
        status = events(train(configured(folder, seed=seed, rounds=6, clients={"count": 4, "dropout": 0.4})), "round")
        lost.append([[one["status"] for one in event["clients"]] for event in status])
    assert lost[0] == lost[1] != lost[2]
    assert numpy_stream(1, "a", 1).random() == numpy_stream(1, "a", 1).random()


def test_who_is_lost_uploads_no_adapters(tmp_path: Path) -> None:
    folder = train(configured(tmp_path, rounds=6, clients={"count": 4, "dropout": 0.4}))
    every = [one for event in events(folder, "round") for one in event["clients"]]
    assert {one["status"] for one in every} == {"done", "lost"}
    assert all((one["bytes"]["up"]["adapters"] > 0) == (one["status"] == "done") for one in every)


def test_asynchronous_times_are_the_clients_own(tmp_path: Path) -> None:
    clients = {"count": 4, "profiles": ["desktop", "desktop", "desktop", "phone"], "buffer": 2}
    folder = train(configured(tmp_path, clients=clients))
    for event in events(folder, "round"):
        for one in event["clients"]:
            whole = sum(one["busy_s"].values()) + one["server_wait_s"]
            assert one["finish_s"] - one["start_s"] == pytest.approx(whole)
            assert one["finish_s"] + one["barrier_wait_s"] == pytest.approx(event["virtual_end_s"])


def test_importance_sees_what_was_folded(tmp_path: Path) -> None:
    changes = {"ranks": {"name": "importance", "share": 0.5}, "train": {"moments": "reset"}}
    found = {}
    for rule in ("stack", "product"):
        folder = train(configured(tmp_path, name=rule, aggregator={"name": rule}, **changes))
        found[rule] = checkpoint.load(checkpoint.newest(folder)).notes["importance"]
        assert min(found[rule]) > 0


def test_a_client_s_own_model_has_the_server_s_part_as_it_is_now(tmp_path: Path) -> None:
    config = configured(tmp_path, split={"server": "unaveraged"}, clients={"count": 4, "participation": 0.5}, rounds=6)
    run = FederatedRun(config)
    list(run.rounds())
    layout = run.assembly.federation.layout
    back, front = layout.columns(2, 5), layout.columns(0, 2)
    rows = [one.adapter for client, one in run.state.clients.items() if client >= 0]
    assert len(rows) == 4
    for row in rows:
        assert row is not None
        assert torch.equal(row[back], run.state.adapters[back])
        assert not torch.equal(row[front], run.state.adapters[front])
    run.close()
    with pytest.raises(ConfigError, match="never averaged"):
        export(run.folder, tmp_path / "out")


@pytest.mark.parametrize("late", ["partial", "drop"])
def test_a_round_never_lasts_longer_than_its_deadline_for_who_is_lost(tmp_path: Path, late: str) -> None:
    (tmp_path / "profiles.toml").write_text('[snail]\nlike = "phone"\nflops_per_s = 1e5\n')
    clients = {"count": 3, "profiles": ["desktop", "desktop", "snail"], "profiles_file": str(tmp_path / "profiles.toml")}
    folder = train(configured(tmp_path, clients={**clients, "deadline_s": 0.5, "late": late}))
    for event in events(folder, "round"):
        assert [one["status"] for one in event["clients"]] == ["done", "done", "lost"]
        assert event["virtual_end_s"] - event["virtual_start_s"] == pytest.approx(0.5)
        for one in event["clients"]:
            assert one["finish_s"] <= event["virtual_end_s"] + 1e-9
            whole = sum(one["busy_s"].values()) + one["server_wait_s"] + one["barrier_wait_s"]
            assert whole == pytest.approx(0.5)


def test_a_refusal_keeps_to_the_minimum_cut_and_to_whole(tmp_path: Path) -> None:
    run = FederatedRun(configured(tmp_path, name="probe"))
    holds = run.assembly.costs[0].cost(run.assembly.costs[0].plan(2)).client_memory.total_bytes
    run.close()
    (tmp_path / "profiles.toml").write_text(f'[small]\nlike = "phone"\nmemory_bytes = {holds + 1}\n')
    clients = {"count": 1, "profiles": ["small"], "profiles_file": str(tmp_path / "profiles.toml")}
    for changes in ({"split": {"minimum_cut": 3}, "policy": {"name": "fixed", "cuts": [3]}}, {"policy": {"name": "whole"}}):
        split = {"labels": "client"} if changes["policy"]["name"] == "whole" else changes["split"]
        with pytest.raises(ResourceError, match="client 0 cannot hold any cut that is allowed"):
            train(configured(tmp_path, name=changes["policy"]["name"], clients=clients, **{**changes, "split": split}))


def test_too_few_updates_for_the_rule_change_nothing_and_are_said(tmp_path: Path) -> None:
    config = configured(tmp_path, rounds=6, aggregator={"name": "krum", "attackers": 0}, clients={"count": 3, "dropout": 0.5})
    folder = train(config)
    rounds = {event["round"]: event for event in events(folder, "round")}
    warned = [event["round"] for event in events(folder, "warning")]
    assert warned
    for event in rounds.values():
        came = sum(one["status"] == "done" for one in event["clients"])
        assert event["aggregated"] == (came >= 3)
        assert (event["round"] in warned) == (0 < came < 3)
    with pytest.raises(ConfigError) as caught:
        FederatedRun(configured(tmp_path, name="never", aggregator={"name": "krum"}, clients={"count": 3}))
    assert any("needs 5 updates at a time" in line for line in caught.value.problems)


@pytest.mark.parametrize(
    "change",
    [{"clients": {"count": 4, "buffer": 0}}, {"split": {"maximum_cut": 1}}, {"clients": {"count": 4, "fleet": "long_tail", "buffer": 2}}],
)
def test_a_resumed_run_refuses_what_its_state_contradicts(tmp_path: Path, change: dict[str, Any]) -> None:
    base: dict[str, Any] = {"clients": {"count": 4, "buffer": 2}}
    run = FederatedRun(configured(tmp_path, **base))
    next(run.rounds())
    run.close()
    with pytest.raises(ConfigError, match="cannot change when a run is resumed"):
        FederatedRun(configured(tmp_path, **{**base, **change}), run.folder)


def test_folded_weights_reach_a_client_for_every_block_it_has_had(tmp_path: Path) -> None:
    """Cuts go up and down; in all, each client is sent every fold of every block it has had, once."""
    clients = {"count": 1, "fetch_blocks": False}
    config = configured(
        tmp_path, rounds=7, policy={"name": "wandering"}, clients=clients, aggregator={"name": "stack"}, train={"moments": "reset"}
    )
    folder = train(config)
    state = checkpoint.load(checkpoint.newest(folder))
    folds, rounds = state.notes["folds"], events(folder, "round")
    sent = sum(event["clients"][0]["bytes"]["down"]["weights"] for event in rounds)
    had, due = 0, 0
    for index, event in enumerate(rounds):
        had = max(had, event["clients"][0]["cut"])
        if index:
            size = sum(count for block, count in folds[index - 1].items() if int(block) < had)
            due += 32 + 4 * size
    assert sent == due


def test_the_plan_of_a_fleet_is_the_first_round_of_the_run(tmp_path: Path) -> None:
    from splitft.apps.plan_fleet import Manner, fleet_plan

    for server in ("per_client", "shared", "alternating", "sequential"):
        config = configured(
            tmp_path,
            name=server,
            rounds=1,
            split={"server": server},
            clients={"count": 4, "fleet": "two_tier"},
            train={"gradient_accumulation": 2},
        )
        run = FederatedRun(config)
        list(run.rounds())
        built = run.assembly
        profiles = [device.profile for device in built.devices]
        plan = fleet_plan(built.costs[0], profiles, [2] * 4, [2] * 4, Manner(server, 2, config.seed))
        first = events(run.folder, "round")[0]
        run.close()
        assert plan.round_s == pytest.approx(first["virtual_end_s"], rel=0.02), server  # adapters' packet headers are not predicted


def test_moments_that_change_hosts_are_counted(tmp_path: Path) -> None:
    bytes_of = {}
    for moments in ("keep", "reset"):
        config = configured(
            tmp_path, name=moments, policy={"name": "wandering"}, clients={"count": 1, "fetch_blocks": False}, train={"moments": moments}
        )
        rounds = events(train(config), "round")
        bytes_of[moments] = [(e["clients"][0]["cut"], e["clients"][0]["bytes"]) for e in rounds]
    for (before, _), (cut, kept), (_, plain) in zip(bytes_of["keep"], bytes_of["keep"][1:], bytes_of["reset"][1:], strict=False):
        more_down = kept["down"]["adapters"] - plain["down"]["adapters"]
        more_up = kept["up"]["adapters"] - plain["up"]["adapters"]
        assert (more_down > 0) == (cut > before)
        assert (more_up > 0) == (cut < before)


def test_turns_are_those_of_the_clock() -> None:
    """A fast client has done all its steps before a slow one's first is through the server."""
    from splitft.adapt.fleets import Device
    from splitft.adapt.profiles import preset
    from splitft.engine.attendance import Attendance, Traffic, attend
    from splitft.types import Plan

    from ..unit.cost_shapes import cost_model

    rules = Attendance(0, 1.0, 1, 0.0, 0.5, True, "alternating")
    plans = [Plan(0, 1, 3, 2), Plan(1, 1, 2, 2)]
    devices = [Device(preset("server-a100")), Device(replace(preset("phone"), flops_per_s=1e6))]
    costs, traffic = [cost_model()] * 2, {client: Traffic(0.0, 0.0, 0.0) for client in range(2)}
    assert attend(plans, 1, devices, costs, traffic, rules, 1, 0.0).turns == (0, 0, 0, 1, 1)
    equal = attend(plans, 1, [devices[0]] * 2, costs, traffic, rules, 1, 0.0).turns
    assert equal == (0, 1, 0, 1, 0)
