"""The examples run, at a tiny setting; the journal they leave is the one that docs/journal.md describes."""

from __future__ import annotations

import json
import re
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import splitft

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
SHORT = ["rounds=1", "train.local_steps=2", "train.batch_size=2", "evaluate.max_rows=1"]


@pytest.fixture(scope="module")
def stations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of example 01, with its U-shaped twin's journal left in `u-shape`."""
    folder = tmp_path_factory.mktemp("runs")
    splitft.run(
        EXAMPLES / "01_simulate" / "config.toml",
        [*SHORT, f"run.folder='{folder}'", "name=u-shape", "split.labels=client", "engine.name=workers", "policy.cuts=[1]"],
    )
    return splitft.run(EXAMPLES / "01_simulate" / "config.toml", [*SHORT, f"run.folder='{folder}'"]).folder


def test_stations_are_clients_with_their_own_cuts(stations: Path) -> None:
    events = [json.loads(line) for line in (stations / "journal.jsonl").read_text("utf-8").splitlines()]
    started, training = events[0], next(event for event in events if event["event"] == "round")
    assert [client["name"] for client in started["clients"]] == ["harbour", "lighthouse", "observatory"]
    assert [client["cut"] for client in training["clients"]] == [1, 2, 4]
    assert (stations / "report.html").is_file()
    assert (stations / "adapter" / "adapter_model.safetensors").is_file()


def test_every_line_of_the_data_is_a_record_of_a_station() -> None:
    records = [json.loads(line) for line in (EXAMPLES / "01_simulate" / "data.jsonl").read_text("utf-8").splitlines()]
    assert {tuple(record) for record in records} == {("station", "text")}
    assert len({record["text"] for record in records}) == len(records)


@pytest.mark.filterwarnings("ignore:.*loss_type.*")
def test_python_example_runs_and_opens_its_adapter_in_peft(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = EXAMPLES / "02_python" / "run.py"
    monkeypatch.setattr(sys, "argv", [str(script), *SHORT, f"run.folder='{tmp_path}'", "train.learning_rate=1e-2"])
    runpy.run_path(str(script), run_name="__main__")
    printed = capsys.readouterr().out
    assert re.search(r"^round 1: held-out perplexity \d", printed, re.MULTILINE)
    assert "bytes_up" in printed
    before, after = (float(value) for value in re.findall(r"^(?:loss of a line|with the adapter).*: +([\d.]+)$", printed, re.MULTILINE))
    assert before != after, "the adapter changes nothing"
    assert (tmp_path / "from-python" / "adapter").is_dir()


def fields(value: Any, prefix: tuple[str, ...] = ()) -> Iterator[str]:
    """Every field name below an event; the configuration has a page of its own."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield name
            if name != "config":
                yield from fields(inner)
    elif isinstance(value, list):
        for inner in value[:3]:
            yield from fields(inner)


def test_every_event_and_field_is_on_the_journal_page(stations: Path) -> None:
    page = (ROOT / "docs" / "journal.md").read_text("utf-8")
    splitft.run(resume=stations)
    config, folder = EXAMPLES / "01_simulate" / "config.toml", stations.parent
    narrow = splitft.run(config, [*SHORT, f"run.folder='{folder}'", "name=narrow", "bottleneck.channels=8"]).folder
    seen = set()
    for folder in (stations, stations.parent / "u-shape", narrow):
        for line in (folder / "journal.jsonl").read_text("utf-8").splitlines():
            event = json.loads(line)
            seen.add(event.pop("event"))
            missing = [name for name in fields(event) if f"`{name}`" not in page]
            assert missing == [], line[:60]
    assert seen - {"warning"} == set(re.findall(r"^## `(\w+)`", page, re.MULTILINE))
    assert "event `warning`" in page


def test_every_example_has_a_line_of_explanation() -> None:
    for folder in sorted(path for path in EXAMPLES.iterdir() if path.is_dir() and path.name != "__pycache__"):
        text = [file.read_text("utf-8") for file in folder.iterdir() if file.suffix in (".md", ".py")]
        assert text
        assert all(len(one.splitlines()[0]) > 5 for one in text)
