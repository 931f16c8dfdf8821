"""`splitft audit` over a tiny run: its files, its table, its place in the report, and no text in any of them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import typer
from typer.testing import CliRunner, Result

from splitft.apps.api import run
from splitft.apps.audit_command import audit, private_rows, request_of, times_sent
from splitft.apps.audit_page import NONE_MADE, config_digest, leakage_line, stretches
from splitft.apps.report import write_report
from splitft.apps.server_setup import assemble_server
from splitft.apps.session import FederatedRun
from splitft.audit.base import Options
from splitft.config import load_config, parse_config
from splitft.data.base import TokenRows
from splitft.errors import ConfigError, DataError

from ..deploy.federation_scenes import federation_values
from ..support import random_rows
from ..tiny_run import text_file, tiny_config


def call(*arguments: str) -> Result:
    app = typer.Typer()
    app.command()(audit)
    return CliRunner().invoke(app, [*arguments, "--sequences", "2", "--tokens", "8"], env={"COLUMNS": "80"}, catch_exceptions=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of one round."""
    base = tmp_path_factory.mktemp("audited")
    return run(tiny_config(base, rounds=1, clients={"count": 2}, policy={"name": "fixed", "cuts": [2, 1]})).folder


@pytest.fixture(scope="module")
def public(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Public text that is read faster than the bundled one."""
    return str(text_file(tmp_path_factory.mktemp("public") / "public.txt", documents=300, seed=5))


def record(path: Path) -> Any:
    return json.loads((path / "audit.json").read_text())


@pytest.mark.timeout(120)
def test_a_run_folder_is_audited_and_its_report_says_so(folder: Path) -> None:
    assert NONE_MADE in (folder / "report.html").read_text()
    done = call(str(folder))
    assert done.exit_code == 0, done.output
    found = record(folder)
    assert (found["round"], found["client"], found["cut"]) == (1, 1, 1)  # the shallowest cut
    assert [one["cut"] for one in found["cuts"]] == [1]
    assert found["labels_sent"]
    assert found["label_leak"] == 1.0
    assert "labels are sent: text is disclosed" in done.output
    assert "K adapter known" in done.output
    page = (folder / "report.html").read_text()
    assert NONE_MADE not in page
    assert "Leakage audit after round 1, cut 1: labels are sent: text is disclosed; the states alone: " in page
    assert re.search(r"Share of tokens recovered: K \(knows the adapter\) [01]\.\d{3}, ", page)
    assert '<a href="audit.svg">Plot</a>' in page
    ElementTree.fromstring((folder / "audit.svg").read_text())


@pytest.mark.timeout(60)
def test_no_text_is_written_and_it_is_shown_on_request_only(folder: Path, tmp_path: Path, public: str) -> None:
    common = (str(folder), "--to", str(tmp_path), "--public", public)
    plain, shown = call(*common), call(*common, "--show-text")
    assert "the text: " in shown.output
    assert "the text: " not in plain.output
    written = (tmp_path / "audit.json").read_text() + (tmp_path / "audit.svg").read_text()
    sample = shown.output.split("the text: ")[1].split("\n")[0].strip()
    assert len(sample) >= 4
    assert sample not in written
    for finding in record(tmp_path)["cuts"][0]["findings"]:  # figures, never tokens
        assert not any(isinstance(value, list) for name, value in finding.items() if name != "figures")


def test_the_report_says_with_what_an_audit_was_made(folder: Path, public: str) -> None:
    call(str(folder), "--public", public)
    kept = record(folder)
    line = leakage_line(folder, 1)
    assert "from 2 sequences of 8 tokens of client 1, in " in line
    assert "over 1 visit of the text." in line
    other = json.loads(json.dumps(kept))
    other["visits"], other["notes"], other["seconds"] = 4, ["only half was reached"], 71.0
    other["cuts"][0]["findings"].append(
        {"attacker": "L", "figures": {**other["cuts"][0]["findings"][0]["figures"], "tokens": 0, "accuracy": 0.0}}
    )
    try:
        (folder / "audit.json").write_text(json.dumps(other))
        line = leakage_line(folder, 1)
        assert "L (reads labels from gradients) not reached in the time given" in line
        assert "L 0.000" not in line
        assert line.endswith("over 4 visits of the text. Note: only half was reached.")
        del other["visits"]  # as audits were before visits were counted
        (folder / "audit.json").write_text(json.dumps(other))
        assert "over 1 visit of the text." in leakage_line(folder, 1)
    finally:
        (folder / "audit.json").write_text(json.dumps(kept))


@pytest.mark.timeout(60)
def test_attackers_without_time_have_no_figure(tmp_path: Path, public: str) -> None:
    config = tiny_config(tmp_path, split={"labels": "client", "tail_blocks": 1})
    (tmp_path / "u.toml").write_text(config.to_toml())
    done = call(str(tmp_path / "u.toml"), "--seconds", "1e-6", "--public", public, "--to", str(tmp_path / "out"))
    assert done.exit_code == 0, done.output
    labels = [one for one in record(tmp_path / "out")["cuts"][0]["findings"] if one["attacker"] == "L"]
    assert [one["figures"]["tokens"] for one in labels] == [0]
    row = next(line for line in done.output.splitlines() if "L labels" in line)
    assert "0.000" not in row


def test_how_often_a_run_sends_a_text(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, rounds=3, train={"local_steps": 4, "batch_size": 2, "gradient_accumulation": 2})
    assert times_sent(config, None, 10) == 5  # 48 rows of 10: some texts five times
    assert times_sent(config, 1, 10) == 2
    assert times_sent(config, 1, 16) == 1
    assert times_sent(config, 0, 16) == times_sent(config, 1, 1000) == 1


@pytest.mark.timeout(60)
def test_visits_are_those_of_the_run_unless_others_are_asked_for(tmp_path: Path, public: str) -> None:
    noise = {"name": "noise", "clip": 0.0, "multiple": 1.0}
    config = tiny_config(tmp_path, clients={"count": 1}, policy={"name": "fixed", "cuts": [1]}, uplink=noise, rounds=400)
    (tmp_path / "noise.toml").write_text(config.to_toml())
    common = (str(tmp_path / "noise.toml"), "--public", public, "--to", str(tmp_path / "out"))
    done = call(*common)
    planned = record(tmp_path / "out")
    assert planned["times_sent"] > 1
    assert planned["visits"] == min(8, planned["times_sent"])
    assert f"the mean of {planned['visits']} visits is attacked" in " ".join(done.output.split())
    assert call(*common, "--visits", "3").exit_code == 0
    assert record(tmp_path / "out")["visits"] == 3
    assert call(*common, "uplink=identity").exit_code == 0
    assert record(tmp_path / "out")["visits"] == 1
    with pytest.raises(ConfigError, match="--visits is -1"):
        call(*common, "--visits", "-1")


@pytest.mark.timeout(120)
def test_a_servers_own_data_is_not_attacked_as_a_clients(tmp_path: Path, public: str) -> None:
    """Its folder has no text of any client, so a figure about the server's would say nothing of theirs."""
    federated = FederatedRun(parse_config(federation_values(tmp_path)), None, build=assemble_server)
    federated.close()
    with pytest.raises(ConfigError, match=r"federation's server.*--data FILE"):
        call(str(federated.folder), "--public", public)
    text = tmp_path / "texts" / "c1.txt"
    with pytest.raises(ConfigError, match="leave out --steps"):
        call(str(federated.folder), "--public", public, "--data", str(text), "--steps", "1")
    done = call(str(federated.folder), "--public", public, "--data", str(text), "--show-text")
    assert done.exit_code == 0, done.output
    assert "The text of c1.txt as that of client 0" in done.output
    shown = done.output.split("the text: ")[1].split("\n")[0].strip()
    assert shown[:6] in text.read_text()
    assert not (federated.folder / "audit.json").exists()
    found = record(federated.folder.parent / "fed-audit")
    assert found["data"] == "c1.txt"


@pytest.mark.timeout(60)
def test_another_text_does_not_count_as_the_runs_own(folder: Path, tmp_path: Path, public: str) -> None:
    before = (folder / "audit.json").read_text() if (folder / "audit.json").exists() else ""
    text = text_file(tmp_path / "mine.txt", documents=20, seed=9)
    assert call(str(folder), "--public", public, "--data", str(text), "--to", str(tmp_path / "out")).exit_code == 0
    assert call(str(folder), "--public", public, "--data", str(text)).exit_code == 0
    assert record(tmp_path / "out")["data"] == "mine.txt"
    assert ((folder / "audit.json").read_text() if (folder / "audit.json").exists() else "") == before


def test_an_audit_of_something_else_does_not_count(folder: Path, public: str) -> None:
    call(str(folder), "--public", public)
    assert leakage_line(folder, 1).startswith("Leakage audit after round 1")
    assert leakage_line(folder, 2) == NONE_MADE  # the run went on
    kept = (folder / "audit.json").read_text()
    try:
        for damaged in ("{", "[]", kept.replace('"config": "', '"config": "0'), kept.replace('"accuracy"', '"gone"')):
            (folder / "audit.json").write_text(damaged)
            assert leakage_line(folder, 1) == NONE_MADE
            write_report(folder)
            assert NONE_MADE in (folder / "report.html").read_text()
    finally:
        (folder / "audit.json").write_text(kept)


@pytest.mark.timeout(60)
def test_with_overrides_the_run_keeps_its_own_audit(folder: Path, public: str) -> None:
    call(str(folder), "--public", public)
    before = (folder / "audit.json").read_text()
    call(str(folder), 'uplink={name="quantize",bits=8}', "-q", "--public", public)
    assert (folder / "audit.json").read_text() == before
    other = folder.parent / "tiny-audit"
    assert record(other)["uplink"]["bits"] == 8
    assert record(other)["config"] != config_digest(load_config(folder / "config.toml"))


@pytest.mark.timeout(120)
def test_a_sweep_over_a_u_shape_with_local_steps(tmp_path: Path, public: str) -> None:
    config = tiny_config(tmp_path, split={"labels": "client", "tail_blocks": 1})
    (tmp_path / "u.toml").write_text(config.to_toml())
    done = call(str(tmp_path / "u.toml"), "--sweep", "--steps", "2", "--public", public, "--to", str(tmp_path / "out"))
    assert done.exit_code == 0, done.output
    found = record(tmp_path / "out")
    assert [one["cut"] for one in found["cuts"]] == [1, 2]
    assert {one["attacker"] for cut in found["cuts"] for one in cut["findings"]} == {"K", "B", "L", "L base"}
    assert not found["labels_sent"]
    assert found["verdict"]["word"] == "disclosed"
    assert "by cut" in (tmp_path / "out" / "audit.svg").read_text()


def test_what_cannot_be_audited_is_refused_with_the_reason(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(ConfigError, match="not a run folder"):
        request_of([str(tmp_path)], -1, 0, False, None)
    with pytest.raises(ConfigError, match="2 clients"):
        call(str(folder), "--client", "2")
    whole = tiny_config(tmp_path, policy={"name": "whole"}, split={"labels": "client"})
    (tmp_path / "whole.toml").write_text(whole.to_toml())
    with pytest.raises(ConfigError, match="nothing crosses a cut"):
        call(str(tmp_path / "whole.toml"))


def test_rows_that_are_attacked() -> None:
    rows = TokenRows.concatenate([random_rows(3, 9, 1), random_rows(4, 20, 2)])
    ids, trained = private_rows(rows, Options(sequences=3, tokens=15))
    assert ids.shape == trained.shape == (3, 15)
    assert private_rows(rows, Options(sequences=6, tokens=15))[0].shape == (6, 9)  # as many tokens as the shortest has
    with pytest.raises(DataError, match="3 tokens"):
        private_rows(random_rows(2, 3, 1), Options(sequences=2, tokens=8))


def test_positions_are_drawn_in_stretches() -> None:
    assert stretches([1.0] * 8 + [0.0, 1.0]) == [(0.0, 1.0), (8.0, 0.5)]
