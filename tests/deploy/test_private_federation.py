"""A private run over the network: the same adapters as in one process, and the check at its end, which must be able to fail."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from splitft.aggregate import private as rule
from splitft.apps import session
from splitft.apps.server_setup import assemble_server
from splitft.engine import checkpoint
from splitft.errors import AdapterError, ConfigError

from ..tiny_run import text_file
from .federation_scenes import adapters_of, events_of, federation_config, scene, simulated, wait_for

pytestmark = pytest.mark.timeout(60)

RULE: dict[str, Any] = {"name": "private", "noise_multiplier": 0.05, "clip": 0.05, "clients": 3}


def private(folder: Path, public: bool, **changes: Any) -> dict[str, Any]:
    """Changes for a private federation, measured on a public text or on its clients' rows."""
    section: dict[str, Any] = {"update_norm_factor": 0}
    if public:
        section["held_out"] = str(text_file(folder / "public.txt", documents=12, seed=9))
    return {"rounds": 2, "aggregator": RULE, "federation": section, **changes}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"federation": {"update_norm_factor": 100.0}}, "update_norm_factor: whose update counts"),
        ({"aggregator": {**RULE, "secret_seed": 4}}, "secret_seed is in the configuration, which clients are sent"),
        ({"aggregator": {"name": "fed_avgm", "rule": {**RULE, "secret_seed": 4}}}, "secret_seed is in the configuration"),
    ],
)
def test_what_would_break_the_claim_in_a_federation_is_refused(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError) as refused:
        assemble_server(federation_config(tmp_path, **{**private(tmp_path, public=False), **changes}))
    assert any(reason in line for line in refused.value.problems)


def test_a_release_measured_by_clients_before_a_crash_is_counted_though_others_come_back(tmp_path: Path) -> None:
    """The crash lies between the measurement of round 2, for which clients are sent the merged adapter, and its commit."""
    changes = private(tmp_path, public=False, clients={"count": 3, "minimum": 2})
    with scene(tmp_path, **changes) as fed:
        passed = Counter[str]()

        def reached(point: str) -> None:
            passed[point] += 1
            if passed[point] == 3 and point == "journal_written":  # of the base, of round 1, of round 2
                raise RuntimeError("power cut")

        fed.house.run.engine.reached = reached
        fed.all_clients()
        with pytest.raises(RuntimeError, match="power cut"):
            fed.thread.end(40)
    folder = tmp_path / "runs" / "fed"
    assert checkpoint.load(checkpoint.newest(folder)).round == 1
    changes["federation"] = {**changes["federation"], "absence_s": 1.0}  # the third does not come back, and is not waited for long
    with scene(tmp_path, **changes) as fed:
        for number in range(2):
            fed.client(number)
            wait_for(lambda number=number: number in fed.house.host.seats)  # type: ignore[misc]
        folder = fed.end()
    merges = [event["metrics"]["privacy_merges"] for event in events_of(folder)]
    participants = [event["metrics"]["privacy_participants"] for event in events_of(folder)]
    assert participants == [3, 2] or participants == [2, 2], participants
    assert merges == [1, 3]


@pytest.mark.parametrize("public", [False, True], ids=["clients' rows", "public text"])
def test_the_end_of_a_private_federation_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, public: bool) -> None:
    monkeypatch.setattr(rule, "fresh_bytes", lambda count: bytes(range(count)))  # one key for both runs
    changes = private(tmp_path, public)
    with scene(tmp_path, **changes) as fed:
        folder = fed.all_clients().end()
    [event] = events_of(folder, "privacy_checked")
    assert (event["round"], event["updates"], event["moved"]) == (2, 6, 6)
    measured = events_of(folder, "evaluation")[-1]["global"]["loss"]
    assert event["loss"] == measured
    assert event["export_loss"] == (pytest.approx(measured, rel=1e-6) if public else None)
    reference = simulated(tmp_path, **{**changes, "federation": {}})
    assert torch.equal(adapters_of(folder), adapters_of(reference))


@pytest.mark.parametrize("public", [False, True], ids=["clients' rows", "public text"])
@pytest.mark.parametrize("what", ["nothing is trained", "another adapter is written"])
def test_a_private_federation_that_went_wrong_is_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, public: bool, what: str
) -> None:
    more: dict[str, Any] = {"train": {"learning_rate": 1e-30}} if what == "nothing is trained" else {}
    if not more:
        write = session.write_adapter
        wrong = lambda folder, layout, row, *rest: write(folder, layout, row * 1.01, *rest)  # noqa: E731
        monkeypatch.setattr(session, "write_adapter", wrong)
    with scene(tmp_path, **private(tmp_path, public, **more)) as fed:
        fed.all_clients()
        with pytest.raises(AdapterError, match="none moved" if more else "differs from|the run measured"):
            fed.thread.end(40)
