"""experiments/codecs: its figures are the journal's, its shares and fronts are what they say, its runs are not repeated."""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import splitft
from splitft.adapt.profiles import load_profiles
from splitft.apps.assemble import build_components
from splitft.config import parse_config

from ..tiny_run import tiny_config

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from experiments.codecs import figures, measures, runs, settings, tables  # noqa: E402
from experiments.codecs.stacks import CAST, RECOMMENDED, UNCOMPRESSED, stacks  # noqa: E402

QUANTIZE = {"name": "quantize", "bits": 4}
FIELDS = {"uplink": QUANTIZE, "downlink": {"name": "error_bounded"}, "adapter_uplink": CAST}


def trained(folder: Path, name: str, link: str = settings.LINK, **changes: Any) -> Path:
    """The folder of a tiny run whose clients have this link."""
    clients = {"count": 3, "profiles": [link], "profiles_file": str(figures.LINKS_FILE)}
    config = tiny_config(folder, name=name, rounds=2, clients=clients, **changes)
    with contextlib.closing(splitft.open_run(config)) as opened:
        for _ in opened.rounds():
            pass
        return opened.folder


def virtual_s(folder: Path) -> list[float]:
    """Virtual seconds since the run began, after each round, as the journal has them."""
    return [event["virtual_end_s"] for event in figures.events(folder) if event["event"] == "round"]


def column(lines: list[list[float | None]], name: str) -> list[float | None]:
    return [line[figures.COLUMNS.index(name)] for line in lines]


@pytest.mark.parametrize("labels", ["server", "client"])
def test_a_run_played_again_on_another_link_takes_what_a_run_on_that_link_takes(tmp_path: Path, labels: str) -> None:
    split = {"labels": labels}
    here = trained(tmp_path, "here", split=split, **FIELDS)
    lines = figures.points(here)
    assert column(lines, "virtual_s 10 Mbit/s")[1:] == pytest.approx(virtual_s(here), rel=1e-6)
    for link, profile in figures.LINKS.items():
        there = trained(tmp_path, profile, profile, split=split, **FIELDS)
        assert column(lines, f"virtual_s {link}")[1:] == pytest.approx(virtual_s(there), rel=1e-6)
        assert column(figures.points(there), "loss") == column(lines, "loss"), "a link changes no number that is learned"


def test_a_round_is_replayed_to_the_last_bits(tmp_path: Path) -> None:
    folder = trained(tmp_path, "exact", **FIELDS)
    link = load_profiles(figures.LINKS_FILE)[settings.LINK]
    for event in figures.events(folder):
        if event["event"] == "round":
            expected = event["virtual_end_s"] - event["virtual_start_s"]
            assert figures.round_seconds(event["clients"], link) == pytest.approx(expected, rel=1e-12)


def test_bytes_are_the_sums_of_the_journal_and_nothing_is_left_out(tmp_path: Path) -> None:
    folder = trained(tmp_path, "bytes", controller={"name": "bang_bang"}, **FIELDS)
    lines, total = figures.points(folder), 0
    rounds = [event for event in figures.events(folder) if event["event"] == "round"]
    for event, line in zip(rounds, lines[1:], strict=True):
        total += sum(count for client in event["clients"] for kinds in client["bytes"].values() for count in kinds.values())
        named = [value for name, value in zip(figures.COLUMNS, line, strict=True) if name.startswith(("up_", "down_"))]
        assert sum(value for value in named if value is not None) == total
    probe = rounds[0]["probe"]
    assert column(lines, "probe")[1] == pytest.approx(probe["coded_loss"] / probe["clean_loss"] - 1, rel=1e-6, abs=1e-9)
    assert column(lines, "dial")[1] == rounds[0]["dial"]["activations"]
    assert figures.rounds_done(folder) == 2
    assert figures.rounds_done(tmp_path / "nowhere") == -1


def as_kept(folder: Path, stack: str) -> measures.Kept:
    lines = [dict(zip(figures.COLUMNS, line, strict=True)) for line in figures.points(folder)]
    return measures.Kept(stack, 2, 0, lines)  # type: ignore[arg-type]


def test_a_run_of_16_bit_values_is_one_hundred_per_cent_but_for_its_headers(tmp_path: Path) -> None:
    bare = {"uplink": CAST, "downlink": CAST}
    reference = as_kept(trained(tmp_path, "reference", **bare, adapter_uplink={"name": "identity"}), UNCOMPRESSED)
    cast = as_kept(trained(tmp_path, "cast", **bare, adapter_uplink=CAST), "cast")
    packets = 3 * 2 * 2  # of adapters: clients, rounds, directions
    plain = measures.plain_bytes(reference, "up_", "down_")
    assert 0 <= cast.sent("up_", "down_") - plain <= 16 * packets, "half a header of 32 bytes for each packet of adapters"
    against = measures.Against(cast, reference)
    assert against.share("up_activations") == against.share("up_activations", index=1) == 1.0
    assert against.total() == pytest.approx(against.part("up_") + against.part("down_"))


def line(loss: float, sent: float, seconds: float) -> dict[str, float]:
    return {"loss": loss, "up_activations": sent, "down_gradients": sent, "up_adapters": 2.0, "virtual_s slow": seconds}


def test_seconds_are_those_of_the_first_round_within_the_tolerance() -> None:
    losses = [3.0, 2.5, 2.005, 2.02, 1.9]
    run = measures.Kept("one", 4, 0, [line(loss, 10.0 * index, 7.0 * index) for index, loss in enumerate(losses)])
    reference = measures.Kept(UNCOMPRESSED, 4, 0, [line(2.0, 50.0 * index, index) for index in range(5)])
    against = measures.Against(run, reference)
    assert against.seconds("slow") == 14.0, "exp(2.005) is within 1 % of exp(2), and it is reached in round 2"
    lower = measures.Kept(UNCOMPRESSED, 4, 0, [line(1.88, 50.0 * index, index) for index in range(5)])
    assert measures.Against(run, lower).seconds("slow") is None
    assert against.excess(3) == pytest.approx(math.exp(0.02) - 1)
    assert against.loss_excess(3) == pytest.approx(0.01)
    assert against.loss_excess() == pytest.approx(-0.05)
    assert against.share("up_", index=2) == pytest.approx(22.0 / 101.0), "20 + 2 adapters of 100 + 1"


def test_the_front_holds_whatever_no_other_stack_is_better_than_in_both() -> None:
    draw = np.random.default_rng(0)
    for _ in range(50):
        drawn = draw.integers(1, 9, (12, 2))
        reference = measures.Kept(UNCOMPRESSED, 1, 0, [line(1.0, 10.0, 1.0)])
        grouped = {}
        for number, (sent, extra) in enumerate(drawn.tolist()):
            grouped[f"s{number:02d}"] = [measures.Against(measures.Kept("x", 1, 0, [line(1.0 + extra / 100, sent, 1.0)]), reference)]
        found = measures.places(grouped)
        spots = {(place.share, place.excess) for place in found}
        best = {one for one in spots if not any(other != one and other[0] <= one[0] and other[1] <= one[1] for other in spots)}
        assert {(place.share, place.excess) for place in measures.front(found)} == best
        tolerable = [one for one in spots if one[1] <= 0.03]
        cheapest = measures.cheapest_within(found, 0.03)
        assert (cheapest is None) == (not tolerable)
        assert cheapest is None or cheapest.share == min(tolerable)[0]


def test_a_finished_run_is_kept_once_and_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = runs.Job("python_docs", "cast", 1, 3)
    width = len(figures.COLUMNS)
    points: list[list[float | None]] = [[float(epoch)] * width for epoch in range(3)]
    assert not runs.is_kept(job, tmp_path)
    runs.keep(job, points, tmp_path)
    runs.keep(runs.Job("python_docs", UNCOMPRESSED, 1, 3), points, tmp_path)
    runs.keep(job, points, tmp_path)
    assert [run["stack"] for run in runs.kept("python_docs", tmp_path)] == [UNCOMPRESSED, "cast"]
    assert runs.is_kept(job, tmp_path)
    assert not runs.is_kept(runs.Job("python_docs", "cast", 1, 10), tmp_path), "another length"
    assert not runs.is_kept(runs.Job("python_docs", "cast", 2, 3), tmp_path), "another seed"
    said: list[str] = []
    places = runs.Places(tmp_path, tmp_path, tmp_path / "work")
    assert runs.run_all([job], places, 1, tmp_path, said.append) == []
    assert said == ["1 of 1 runs are kept already"]
    folder = job.folder(tmp_path)
    assert [len(found) for found in measures.load("python_docs", 3, tmp_path).values()] == [1, 1]
    changed = {**stacks(3), "cast": dataclasses.replace(stacks(3)["cast"], uplink=QUANTIZE)}
    monkeypatch.setattr(runs, "stacks", lambda epochs=10: changed)
    monkeypatch.setattr(measures, "stacks", lambda epochs=10: changed)
    assert not runs.is_kept(job, tmp_path), "the figures of other codecs are not its own"
    assert job.folder(tmp_path) != folder
    assert set(measures.load("python_docs", 3, tmp_path)) == {UNCOMPRESSED}, "nor does the page show them"
    text = runs.results_path("python_docs", tmp_path).read_text("utf-8")
    assert str(tmp_path) not in text


def test_what_is_run_and_in_which_order() -> None:
    listed = runs.jobs([0, 1])
    assert len(set(listed)) == len(listed)
    assert listed[0] == runs.Job("shakespeare", UNCOMPRESSED, 0, 1)
    both = {UNCOMPRESSED, RECOMMENDED}
    for setting in ("python_docs", "shakespeare"):
        assert {job.stack for job in listed if (job.setting, job.seed, job.epochs) == (setting, 1, 10)} == set(stacks())
        assert {(job.stack, job.epochs) for job in listed if job.setting == f"{setting}-u"} == {
            (stack, 50) for stack in (*both, runs.COARSE)
        }
    for epochs in settings.LENGTHS:
        assert both <= {job.stack for job in listed if (job.setting, job.epochs) == ("e2e", epochs)}
    assert all(any(one == runs.Job(job.setting, UNCOMPRESSED, job.seed, job.epochs) for one in listed) for job in listed), "its reference"
    assert [runs.Job.read(job.text) for job in listed] == listed
    groups = runs._together(listed)
    assert [job for group in groups for job in group] == listed
    assert all(len(group) == 1 or max(job.epochs for job in group) < 50 for group in groups)
    assert runs.jobs([0], ["topk"], ["shakespeare"]) == [runs.Job("shakespeare", "topk", 0, 10)]
    assert all(job.epochs == 1 for job in runs.jobs([0], quick=True))
    assert {job.epochs for job in runs.jobs([0], lengths=[3])} == {3}
    with pytest.raises(ValueError, match="unknown: nonsense"):
        runs.jobs([0], ["nonsense"])


def test_records_are_different_and_evenly_spaced(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl.gz"
    wanted = 2 * settings.DOCUMENTS
    texts = ["short", *(f"speech number {index}" for index in range(wanted)), "speech number 0"]
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text, "other": index}) + "\n" for index, text in enumerate(texts))
    found = settings.Text("", ("text",), 10).records(path)
    assert found == [{"text": f"speech number {2 * index}"} for index in range(settings.DOCUMENTS)]
    with pytest.raises(ValueError, match=f"{settings.DOCUMENTS} are needed"):
        settings.Text("", ("text",), 20).records(path)


def test_every_stack_and_setting_is_a_configuration_that_can_be_built(tmp_path: Path) -> None:
    places = runs.Places(tmp_path, tmp_path, tmp_path)
    for stack in stacks():
        for setting, epochs in (("python_docs", 10), ("python_docs-u", 50)):
            components = build_components(parse_config(runs.configuration(runs.Job(setting, stack, 0, epochs), places)))
            assert components.uplink is not None
    for name, setting in settings.SETTINGS.items():
        for epochs, length in settings.LENGTHS.items():
            assert length.rounds * length.local_steps * settings.BATCH_ROWS == epochs * settings.ROWS, "whole epochs"
            assert setting.values(0, epochs)["rounds"] == length.rounds
        assert setting.exit == ("client" if name.endswith("-u") else "server")


def test_codecs_of_the_exit_count_only_in_a_u_shape() -> None:
    stack = stacks()[RECOMMENDED]
    other = dataclasses.replace(stack, exit_downlink=CAST)
    assert stack.values("server").keys() == {"uplink", "downlink", "adapter_uplink"}
    assert stack.is_kept_as(other.values(), "server")
    assert stack.is_kept_as(stack.values("server"), "server")
    assert not stack.is_kept_as(other.values(), "client")
    assert stack.is_kept_as(stack.values(), "client")


def test_percentages_and_marks() -> None:
    assert tables.percent([0.01, 0.03]) == "2.00 ± 1.41"
    assert tables.percent([-0.005], sign=True) == "\N{MINUS SIGN}0.50"
    assert tables.percent([]) == "—"
