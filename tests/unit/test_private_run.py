"""A private run from start to end: its journal, its claim, and the check after it, which must be able to fail."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from splitft.aggregate.private import STILL, UPDATES
from splitft.apps.private_check import verify_after
from splitft.apps.session import FederatedRun
from splitft.errors import AdapterError
from splitft.peft_format import WEIGHTS
from splitft.privacy.claim import claim_of

from ..tiny_run import tiny_config

RULE: dict[str, Any] = {"name": "private", "noise_multiplier": 0.05, "clip": 0.05, "secret_seed": 4, "clients": 3}


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
        for path in (run.folder / "checkpoints").glob("round-*/*"):
            assert path.stat().st_mode & 0o077 == 0, path
    plain = tmp_path / "plain"
    plain.mkdir()
    with closing(FederatedRun(tiny_config(plain))) as run:
        list(run.rounds())
        assert "epsilon" not in (run.finish() / "report.html").read_text(encoding="utf-8").split("<h2")[0]
