"""The base is evaluated after round 1 is trained and before it is merged: the numbers and their order are those of evaluating it first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from splitft.apps.session import FederatedRun
from splitft.config import RunConfig
from splitft.engine import checkpoint, rounds
from splitft.engine.rounds import RoundRecord
from splitft.errors import Interrupted

from ..tiny_run import tiny_config
from .test_resume import outcome, same, train

VARIANTS: dict[str, dict[str, Any]] = {
    "average": {},
    "workers": {"engine": {"name": "workers"}},
    "folding": {"aggregator": {"name": "stack"}, "train": {"moments": "reset"}},
    "asynchronous": {"clients": {"buffer": 1, "profiles": ["laptop", "phone", "tablet"]}},
    "unaveraged": {"split": {"server": "unaveraged"}},
    "quality": {"policy": {"name": "splitft"}, "clients": {"participation": 0.7}},
}


def evaluate_first(run: FederatedRun) -> RoundRecord:
    """Evaluate and commit the base before anything is trained, as a run did before and as the definition says."""
    inner = run._run
    scored = rounds.score(inner, 0, inner.state.adapters, inner.state.clients)
    inner.state.identity["evaluated"] = True
    inner.state.notes["base_loss"] = {str(one["client"]): one["loss"] for one in scored["clients"]}
    rounds.commit(inner, [scored])
    return RoundRecord(0, None, scored)


@pytest.fixture(scope="module", params=sorted(VARIANTS))
def variant(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, Path]:
    """A configuration, and the folder of its run with the base evaluated first."""
    config = tiny_config(tmp_path_factory.mktemp("variant"), rounds=2, **VARIANTS[request.param])
    run = FederatedRun(config)
    evaluate_first(run)
    records = list(run.rounds())
    assert [record.round for record in records] == [1, 2]
    run.finish()
    run.close()
    return config, run.folder


def elsewhere(config: RunConfig, folder: Path) -> RunConfig:
    return config.model_copy(update={"run": config.run.model_copy(update={"folder": str(folder)})})


def test_the_journal_is_that_of_evaluating_the_base_first(variant: tuple[RunConfig, Path], tmp_path: Path) -> None:
    config, expected = variant
    heard: list[str] = []
    run = FederatedRun(elsewhere(config, tmp_path), None, lambda event, facts: heard.append(str(facts.get("name", event))))
    assert [record.round for record in run.rounds()] == [0, 1, 2]
    run.finish()
    run.close()
    same(run.folder, expected)
    kept = [name for name in heard if name in ("train", "evaluate the base", "aggregate", "evaluate", "round")]
    assert kept[:6] == ["train", "evaluate the base", "round", "aggregate", "evaluate", "round"]
    assert kept[6:] == ["train", "aggregate", "evaluate", "round"]


@pytest.mark.parametrize("stage", ["train", "evaluate the base", "aggregate"])
def test_stopped_at_any_stage_of_the_first_round(variant: tuple[RunConfig, Path], tmp_path: Path, stage: str) -> None:
    config, expected = variant

    def listen(event: str, facts: dict[str, Any]) -> None:
        if event == "stage" and facts["name"] == stage:
            raise Interrupted("stopped")

    run = FederatedRun(elsewhere(config, tmp_path), None, listen)
    with pytest.raises(Interrupted):
        list(run.rounds())
    run.close()
    state = checkpoint.load(checkpoint.newest(run.folder))
    assert state.round == 0
    assert state.identity.get("evaluated", False) is (stage == "aggregate")
    same(train(elsewhere(config, tmp_path), run.folder), expected)


def test_leaving_after_the_record_before_training(variant: tuple[RunConfig, Path], tmp_path: Path) -> None:
    """Who takes record 0 only finds the state untouched by round 1, and goes on from it in the same process."""
    config, expected = variant
    run = FederatedRun(elsewhere(config, tmp_path))
    before = run.state.adapters.clone()
    record = next(iter(run.rounds()))
    assert (record.round, record.training) == (0, None)
    assert (run.state.round, run.state.virtual_s, run.state.clients, run.state.pending) == (0, 0.0, {}, {})
    assert torch.equal(run.state.adapters, before)
    assert [one.round for one in run.rounds()] == [1, 2]
    run.finish()
    run.close()
    same(run.folder, expected)


def test_failed_behind_the_first_merge_and_gone_on_in_the_same_process(variant: tuple[RunConfig, Path], tmp_path: Path) -> None:
    """What a rule has folded into the base by then comes out again before round 1 is repeated."""
    config, expected = variant
    stops = iter([True])

    def listen(event: str, facts: dict[str, Any]) -> None:
        if event == "stage" and facts["name"] == "evaluate" and next(stops, False):
            raise Interrupted("stopped")

    run = FederatedRun(elsewhere(config, tmp_path), None, listen)
    with pytest.raises(Interrupted):
        list(run.rounds())
    assert [one.round for one in run.rounds()] == [1, 2]
    run.finish()
    run.close()
    same(run.folder, expected)


def test_a_checkpoint_with_the_base_evaluated_and_nothing_trained_goes_on(variant: tuple[RunConfig, Path], tmp_path: Path) -> None:
    """What a version that evaluated first left behind when it was killed in round 1."""
    config, expected = variant
    run = FederatedRun(elsewhere(config, tmp_path))
    scored = evaluate_first(run).evaluation
    run.close()
    same(train(elsewhere(config, tmp_path), run.folder), expected)
    assert outcome(run.folder)[1][0] == scored
