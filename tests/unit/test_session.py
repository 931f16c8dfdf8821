"""apps/session.py: what a run leaves in its folder, who may write there, what listeners hear, how it is stopped."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from splitft.adapt.choose import choose_cuts
from splitft.apps.session import FederatedRun, stoppable
from splitft.config import RunConfig, load_config
from splitft.engine import checkpoint
from splitft.engine.journal import Journal
from splitft.errors import CheckpointError, ConfigError, Interrupted
from splitft.peft_format import read_adapter

from ..data_tokenizer import byte_tokenizer
from ..tiny_run import tiny_config


def small(folder: Path, **changes: Any) -> RunConfig:
    return tiny_config(folder, rounds=2, **{"clients": {"count": 2}, "policy": {"name": "fixed", "cuts": [1, 2]}, **changes})


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[FederatedRun, list[Any], list[tuple[str, dict[str, Any]]]]]:
    """One run to its end: the run, its records, what its listener heard."""
    heard: list[tuple[str, dict[str, Any]]] = []
    run = FederatedRun(small(tmp_path_factory.mktemp("session")), None, lambda event, facts: heard.append((event, facts)))
    records = list(run.rounds())
    run.finish()
    yield run, records, heard
    run.close()


def journal(run: FederatedRun) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.folder / "journal.jsonl").read_text("utf-8").splitlines()]


def test_the_folder_holds_everything_the_run_promises(finished: Any) -> None:
    run, _, _ = finished
    names = {path.name for path in run.folder.iterdir()}
    assert {"config.toml", "manifest.json", "journal.jsonl", "checkpoints", "adapter", "report.html"} <= names
    assert not any(name.endswith(".part") for name in names), "something half-written was left"
    assert load_config(run.folder / "config.toml") == run.config
    assert [path.name for path in sorted((run.folder / "checkpoints").iterdir())] == ["round-00001", "round-00002"]


def test_a_record_per_round_beginning_with_the_evaluation_before_training(finished: Any) -> None:
    _, records, _ = finished
    assert [record.round for record in records] == [0, 1, 2]
    assert records[0].training is None
    assert all(record.evaluation is not None for record in records)
    assert all(record.training["round"] == record.round for record in records[1:])


def test_the_journal_tells_the_run_in_order(finished: Any) -> None:
    run, records, _ = finished
    events = journal(run)
    assert [(event["event"], event.get("round")) for event in events] == [
        ("run_started", None), ("evaluation", 0), ("round", 1), ("evaluation", 1), ("round", 2), ("evaluation", 2), ("run_finished", None),
    ]  # fmt: skip
    assert events[2] == json.loads(json.dumps(records[1].training))
    assert events[0]["model"]["blocks"] == 4
    assert [client["cut"] for client in events[0]["clients"]] == [1, 2]
    assert events[-1]["rounds"] == 2


def test_training_lowers_the_loss_of_repetitive_text(finished: Any) -> None:
    _, records, _ = finished
    assert records[-1].evaluation["global"]["loss"] < records[0].evaluation["global"]["loss"]


def test_listeners_hear_stages_every_client_step_and_every_round(finished: Any) -> None:
    run, _, heard = finished
    assert sum(facts["count"] for event, facts in heard if event == "step") == 2 * 2 * run.config.train.local_steps
    assert [facts["record"].round for event, facts in heard if event == "round"] == [0, 1, 2]
    stages = [facts["name"] for event, facts in heard if event == "stage"]
    assert stages[:3] == ["check the model", "read the data", "load the model"]
    assert stages[-3:] == ["train", "aggregate", "evaluate"]


def test_the_adapter_is_the_state_after_the_last_round(finished: Any) -> None:
    run, _, _ = finished
    layout = run.assembly.federation.layout
    found = read_adapter(run.folder / "adapter", run.assembly.base.anatomy.blocks_path)
    assert torch.equal(layout.row(found.factors), run.state.adapters)
    assert torch.equal(checkpoint.load(checkpoint.newest(run.folder)).adapters, run.state.adapters)
    assert not torch.equal(run.state.adapters, run.assembly.start)


def test_metrics_have_one_row_per_round(finished: Any) -> None:
    run, _, _ = finished
    table = run.metrics()
    assert [row["round"] for row in table] == [0, 1, 2]
    assert len({frozenset(row) for row in table}) == 1, "rows of a table have the same columns"


def test_a_second_run_of_that_name_is_refused_and_nothing_is_touched(finished: Any) -> None:
    run, _, _ = finished
    before = {path: path.stat().st_mtime_ns for path in run.folder.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match="exists already") as caught:
        FederatedRun(run.config)
    assert "--resume" in caught.value.remedy
    assert {path: path.stat().st_mtime_ns for path in run.folder.rglob("*") if path.is_file()} == before


def test_one_writer_at_a_time_and_the_lock_is_given_back(tmp_path: Path) -> None:
    config = small(tmp_path)
    run = FederatedRun(config)
    with pytest.raises(CheckpointError, match="in use by another process"):
        FederatedRun(config, run.folder)
    run.close()
    again = FederatedRun(config, run.folder)
    assert again.state.round == 0
    again.close()


def test_leaving_early_keeps_every_round_that_was_yielded(tmp_path: Path) -> None:
    config = small(tmp_path)
    run = FederatedRun(config)
    for record in run.rounds():
        if record.round == 1:
            break
    run.close()
    again = FederatedRun(config, run.folder)
    assert again.state.round == 1
    assert torch.equal(again.state.adapters, run.state.adapters)
    assert [record.round for record in again.rounds()] == [2]
    again.close()


def test_resuming_what_was_never_started_is_refused(tmp_path: Path) -> None:
    config = small(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="has no checkpoint"):
        FederatedRun(config, tmp_path / "empty")


@pytest.mark.parametrize(
    ("change", "name"), [({"lora": {"rank": 3}}, "adapters"), ({"seed": 2}, "data"), ({"engine": {"name": "workers"}}, "engine")]
)
def test_resuming_as_another_run_names_what_differs(tmp_path: Path, change: dict[str, Any], name: str) -> None:
    run = FederatedRun(small(tmp_path))
    run.close()
    with pytest.raises(CheckpointError, match=f"was made with {name} = "):
        FederatedRun(small(tmp_path, **change), run.folder)


def test_a_damaged_checkpoint_is_named_and_the_one_before_can_be_used(tmp_path: Path) -> None:
    config = small(tmp_path)
    run = FederatedRun(config)
    list(run.rounds())
    run.close()
    bad = checkpoint.newest(run.folder)
    (bad / "tensors.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=str(bad)):
        FederatedRun(config, run.folder)
    for path in bad.iterdir():
        path.unlink()
    bad.rmdir()
    again = FederatedRun(config, run.folder)
    assert [record.round for record in again.rounds()] == [2]
    assert torch.equal(again.state.adapters, run.state.adapters)
    again.close()


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises((CheckpointError, ConfigError), match="file"):
        FederatedRun(small(tmp_path, run={"folder": str(tmp_path / "file")}))


def test_the_round_s_numbers_reach_the_disk_before_the_record_is_yielded(tmp_path: Path) -> None:
    run = FederatedRun(small(tmp_path))
    for record in run.rounds():
        state = checkpoint.load(checkpoint.newest(run.folder))
        assert state.round == record.round
        assert state.journal_bytes == (run.folder / "journal.jsonl").stat().st_size
        assert torch.equal(state.adapters, run.state.adapters)
    run.close()
    assert Journal(run.folder, state.journal_bytes).bytes == state.journal_bytes


@pytest.mark.parametrize("share", ["held_out", "common_held_out"])
def test_without_one_kind_of_held_out_rows_a_run_and_its_report_are_whole(share: str, tmp_path: Path) -> None:
    """Without the clients' own rows they have no score; without the common ones the global score is theirs together."""
    run = FederatedRun(small(tmp_path, tokens={share: 0}, evaluate={"max_rows": 0}))
    records = list(run.rounds())
    run.finish()
    run.close()
    for record in records:
        assert record.evaluation is not None
        clients = record.evaluation["clients"]
        assert [one["client"] for one in clients] == ([] if share == "held_out" else [0, 1])
        assert record.evaluation["global"]["tokens"] == sum(one["tokens"] for one in clients) or share == "held_out"
        assert record.evaluation["global"]["tokens"] > 0
    assert all(state["held_out_loss"] is None or share != "held_out" for state in run.state.observations)
    assert "perplexity" in (run.folder / "report.html").read_text("utf-8")
    assert [row["round"] for row in run.metrics()] == [0, 1, 2]


def test_derived_cuts_use_every_client_s_own_row_length(tmp_path: Path) -> None:
    lines = ["word"] * 30 + ["a much longer line of many more words than that"] * 30
    folder = tmp_path / "clients"
    folder.mkdir()
    for name, part in (("long", lines[30:]), ("short", lines[:30])):
        (folder / f"{name}.txt").write_text("\n\n".join(f"{text} {number}" for number, text in enumerate(part)), "utf-8")
    (tmp_path / "profiles.toml").write_text('[slow]\nlike = "laptop"\nflops_per_s = 1e8\nlatency_s = 0\n', "utf-8")
    run = FederatedRun(
        small(
            tmp_path,
            data={"name": "folder", "path": str(folder)},
            partition={"name": "files"},
            tokens={"packing": "documents", "block_tokens": 48},
            policy={"name": "fixed"},
            clients={"count": 2, "profiles": ["slow"], "profiles_file": str(tmp_path / "profiles.toml")},
        )
    )
    built = run.assembly
    assert built.costs[0].sequence_tokens > 3 * built.costs[1].sequence_tokens
    profiles = [device.profile for device in built.devices]
    assert run.state.policy == {"cuts": [choice.cut for choice in choose_cuts(built.costs, profiles)]}
    assert run.state.policy["cuts"] != [choice.cut for choice in choose_cuts(built.costs[:1] * 2, profiles)]
    run.close()


def test_a_tokenizer_with_a_token_no_text_has_is_accepted(tmp_path: Path) -> None:
    """Gemma 3's knows a token for images that its text model has no row for."""
    config = small(tmp_path)
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens("<image_soft_token>", special_tokens=True)
    tokenizer.save_pretrained(tmp_path / "model")
    run = FederatedRun(config)
    assert len(run.assembly.base.tokenizer) == run.assembly.shape.vocabulary + 1
    run.close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_after_the_step_and_handlers_are_put_back(number: signal.Signals, tmp_path: Path) -> None:
    before, said = signal.getsignal(number), []
    (tmp_path / "run" / "checkpoints" / "round-00001").mkdir(parents=True)
    with stoppable(tmp_path / "run", said.append) as check:
        check()
        os.kill(os.getpid(), number)
        with pytest.raises(Interrupted, match="last finished round is on disk") as caught:
            check()
    assert str(tmp_path / "run") in caught.value.remedy
    assert len(said) == 1
    assert signal.getsignal(number) is before


def test_a_second_ctrl_c_stops_at_once(tmp_path: Path) -> None:
    def impatient() -> None:
        with stoppable(tmp_path):
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted, match="Stopped at once") as caught:
        impatient()
    assert "nothing was trained yet" in caught.value.remedy
