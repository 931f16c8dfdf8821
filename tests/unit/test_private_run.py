"""A private run from start to end: its journal, its claim, and the check after it, which must be able to fail."""

from __future__ import annotations

import json
import re
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from splitft.aggregate.private import MERGES, STILL, UPDATES
from splitft.apps.private_check import verify_after
from splitft.apps.session import FederatedRun
from splitft.engine import releases, rounds
from splitft.engine.record import Trained
from splitft.engine.rounds import Run
from splitft.errors import AdapterError, CheckpointError
from splitft.peft_format import WEIGHTS
from splitft.privacy.accountant import Mechanism, Spent
from splitft.privacy.claim import claim_of
from splitft.privacy.gaussian import epsilon_of

from ..tiny_run import tiny_config

RULE: dict[str, Any] = {"name": "private", "noise_multiplier": 0.05, "clip": 0.05, "clients": 3}


def trained(folder: Path, **changes: Any) -> FederatedRun:
    run = played(folder, **changes)
    run.finish()
    return run


def played(folder: Path, **changes: Any) -> FederatedRun:
    """All rounds, and not yet the end."""
    run = FederatedRun(tiny_config(folder, **{"aggregator": RULE, **changes}))
    for _ in run.rounds():
        pass
    return run


def test_weights_move_and_the_export_gives_the_loss_of_the_run(tmp_path: Path) -> None:
    with closing(trained(tmp_path)) as run:
        found = verify_after(run)
        assert found["moved"] == found["updates"] == 9
        assert found["export_loss"] == pytest.approx(found["loss"], rel=1e-6)
        events = [json.loads(line) for line in (run.folder / "journal.jsonl").read_text().splitlines()]
        said = [claim_of(event["metrics"]) for event in events if event["event"] == "round"]
        assert len(said) == 3
        assert all(said)
        masked = run.assembly.federation.trained
        assert masked is not None
        assert torch.equal(run.state.adapters[~masked], run.assembly.start[~masked]), "A stays frozen"


def test_a_run_with_noise_from_a_seed_claims_nothing_and_says_why(tmp_path: Path) -> None:
    said: list[str] = []
    seeded = tiny_config(tmp_path, aggregator={**RULE, "secret_seed": 4})
    with closing(FederatedRun(seeded, listen=lambda event, facts: said.append(facts["text"]) if event == "told" else None)) as run:
        list(run.rounds())
        run.finish()
        assert any("no epsilon: the noise can be taken off by whoever knows the seed" in line for line in said)
        assert "epsilon" not in "".join(line for line in said if "no epsilon" not in line)
        for file in ("journal.jsonl", "report.html"):
            assert not re.search(r"privacy_epsilon|epsilon \d", (run.folder / file).read_text(encoding="utf-8")), file


def test_what_noise_there_will_be_is_told_before_the_first_round(tmp_path: Path) -> None:
    said: list[tuple[str, str]] = []
    noisy = {"name": "noise", "clip": 3.0, "multiple": 8.0}
    config = tiny_config(tmp_path, aggregator={**RULE, "noise_multiplier": 4.0, "most_noise": 1e6}, uplink=noisy)
    with closing(FederatedRun(config, listen=lambda event, facts: said.append((event, str(facts.get("text", "")))))) as run:
        told = [text for event, text in said if event == "told"]
        width = run.assembly.shape.hidden_size
        list(run.rounds())
        last = [json.loads(line) for line in (run.folder / "journal.jsonl").read_text().splitlines()]
        epsilon = [event["metrics"]["privacy_epsilon"] for event in last if event["event"] == "round"][-1]
    [rows] = [text for text in told if text.startswith("noise on uplink: ")]
    assert f"{8 * width**0.5:.3g} times the root mean square of a row at the clip" in rows
    assert f"epsilon {epsilon_of(2 / 8.0, 1e-5):.3g} at delta 1e-05 for one row (the vector of one position) sent once" in rows
    [forecast] = [text for text in told if text.startswith("aggregator private: ")]
    assert "3 merges of 3 participants, noise multiplier 4 (clips on the sum)" in forecast
    assert f"epsilon {epsilon:.3g} at delta 1e-05 for one client's data replaced by anything" in forecast, "what the last round will say"


@pytest.mark.parametrize("same", [True, False], ids=["the same clients", "another roster"])
def test_a_merge_that_was_shown_and_never_committed_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, same: bool) -> None:
    """Measured, then cut off before the commit: with the same clients the second merge is the first, to the bit; with others it is one more
    release, and both have been seen."""
    config = tiny_config(tmp_path, aggregator={**RULE, "noise_multiplier": 4.0, "most_noise": 1e6})
    shown: list[torch.Tensor] = []
    score = rounds.score

    def cut_off(run: Run, index: int, adapters: torch.Tensor, *rest: Any) -> dict[str, Any]:
        found = score(run, index, adapters, *rest)
        if index == 2:
            shown.append(adapters.clone())
            if len(shown) == 1:
                raise KeyboardInterrupt
        return found

    monkeypatch.setattr(rounds, "score", cut_off)
    with closing(FederatedRun(config)) as run, pytest.raises(KeyboardInterrupt):
        list(run.rounds())
    if not same:
        whole = rounds.synchronous_round

        def without_one(run: Run, index: int) -> Trained:
            trained = whole(run, index)
            if index == 2:
                trained.attended = replace(trained.attended, lost=frozenset({0}))
            return trained

        monkeypatch.setattr(rounds, "synchronous_round", without_one)
    with closing(FederatedRun(config, resume=tmp_path / "runs" / "tiny")) as run:
        list(run.rounds())
        state, journal = run.state.aggregator, (run.folder / "journal.jsonl").read_text()
    assert torch.equal(*shown) == same
    merges = 3 if same else 4
    assert int(state[MERGES]) == merges
    last = [json.loads(line) for line in journal.splitlines() if '"event":"round"' in line][-1]["metrics"]
    assert last["privacy_merges"] == merges
    assert last["privacy_epsilon"] == pytest.approx(Spent().after(Mechanism(4.0), merges).epsilon(1e-5))


def test_a_round_run_again_after_its_checkpoint_was_lost_is_counted_twice_if_it_differs(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, aggregator={**RULE, "noise_multiplier": 4.0, "most_noise": 1e6})
    folder = tmp_path / "runs" / "tiny"
    with closing(FederatedRun(config)) as run:
        list(run.rounds())
    known = json.loads((folder / releases.FILE).read_text())
    assert [len(known[str(index)]) for index in (1, 2, 3)] == [1, 1, 1]
    assert releases.others(folder, 3, known["3"][0]) == 0
    assert releases.others(folder, 3, "another") == 1
    (folder / releases.FILE).write_text("torn")
    with pytest.raises(CheckpointError, match=r"releases.json.*cannot be read"):
        releases.others(folder, 3, "another")


def test_a_run_whose_clients_train_nothing_is_found_out_though_noise_moves_the_adapter(tmp_path: Path) -> None:
    with closing(played(tmp_path, train={"learning_rate": 1e-30})) as run:
        assert not torch.equal(run.state.adapters, run.assembly.start)
        assert int(run.state.aggregator[STILL]) == int(run.state.aggregator[UPDATES]) == 9
        with pytest.raises(AdapterError, match="of 9 private updates none moved"):
            run.finish()  # which asks for the check


def test_an_export_that_is_not_what_was_measured_is_found_out(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    with closing(trained(tmp_path)) as run:
        file = run.folder / "adapter" / WEIGHTS
        tensors = load_file(file)
        save_file({name: tensor if "lora_A" in name else tensor + 0.5 for name, tensor in tensors.items()}, file)
        with pytest.raises(AdapterError, match="the run measured"):
            verify_after(run)


def test_the_report_tells_the_whole_claim_and_the_key_is_nobody_elses(tmp_path: Path) -> None:
    with closing(trained(tmp_path)) as run:
        page = (run.folder / "report.html").read_text(encoding="utf-8")
        assert "Client-level differential privacy, epsilon" in page
        assert "It does not cover what the server sees" in page
        assert "losses measured on clients&#x27; own held-out rows" in page
        assert "Mironov 2012" in page
        for path in (run.folder / "checkpoints").glob("round-*/*"):
            assert path.stat().st_mode & 0o077 == 0, path
    plain = tmp_path / "plain"
    plain.mkdir()
    with closing(FederatedRun(tiny_config(plain))) as run:
        list(run.rounds())
        assert "epsilon" not in (run.finish() / "report.html").read_text(encoding="utf-8").split("<h2")[0]
