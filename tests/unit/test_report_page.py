"""The page: whole for every kind of run, closed to injection, fetching nothing, the same bytes every time."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from report_journals import Journal, asynchronous_events, write_events

from splitft.apps.report import write_report
from splitft.apps.report_page import LEAKAGE_NOTE, render_page
from splitft.apps.report_record import RunRecord, load_record
from splitft.apps.report_tables import CELLS, client_rows, numbers_html
from splitft.errors import CheckpointError

RUNS = {
    "one client, one round": Journal(clients=1, rounds=1),
    "five clients": Journal(),
    "exact seconds": Journal(clients=2, rounds=3, busy=True),
    "forty clients": Journal(clients=40, rounds=4, drawn_steps=1),
    "fifty clients": Journal(clients=50, rounds=3, participation=0.3),
    "unfinished": Journal(rounds=4, finished=False),
    "before the first round": Journal(rounds=1, finished=False),
    "partial participation": Journal(clients=9, rounds=8, participation=0.4),
    "all steps drawn": Journal(clients=3, rounds=2, steps=2, drawn_steps=9),
    "nothing drawn": Journal(clients=3, rounds=2, drawn_steps=0),
    "adaptive": Journal(adaptive=True, rounds=8),
    "adaptive, one client": Journal(adaptive=True, clients=1, rounds=3),
    "adaptive, fifty clients": Journal(adaptive=True, clients=50, rounds=40, participation=0.6, drawn_steps=1),
    "adaptive, a hundred clients": Journal(adaptive=True, clients=100, rounds=30, drawn_steps=0),
    "adaptive, long": Journal(adaptive=True, clients=12, rounds=200, steps=2, drawn_steps=0),
    "many steps": Journal(clients=2, rounds=6, steps=200, drawn_steps=1),
}
EVIL = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</title></svg><b>",
    "'; DROP",
    "\x1b[31m\u202egnp.exe",
    "]]>&amp;<!--",
)
VOID = {"meta", "rect", "path", "circle", "br", "img", "input", "link"}


class Checker(HTMLParser):
    """Fails on a tag that is not closed in order; collects tags, attributes and text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID or tag in ("rect", "circle"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def checked(page: str) -> Checker:
    checker = Checker()
    checker.feed(page)
    checker.close()
    assert checker.open == []
    return checker


def page_of(journal: Journal, folder: Path) -> str:
    return render_page(load_record(journal.write(folder)))


@pytest.mark.parametrize("journal", RUNS.values(), ids=RUNS.keys())
def test_every_kind_of_run_makes_a_sound_page(journal: Journal, tmp_path: Path) -> None:
    page = page_of(journal, tmp_path)
    checker = checked(page)
    assert LEAKAGE_NOTE in checker.text
    assert not re.search(r"\b(nan|inf|None|Infinity)\b", re.sub(r"<style>.*?</style>", "", page))
    ids = [value for name, value in checker.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    for svg in re.findall(r"<svg viewBox.*?</svg>", page, re.DOTALL):
        ElementTree.fromstring(svg)
    for links in (value for name, value in checker.attributes if name == "aria-labelledby"):
        assert set(links.split()) <= set(ids)


@pytest.mark.parametrize("journal", RUNS.values(), ids=RUNS.keys())
def test_no_mark_leaves_its_drawing(journal: Journal, tmp_path: Path) -> None:
    for svg in re.findall(r'<svg viewBox="0 0 \d+[^>]*role="img".*?</svg>', page_of(journal, tmp_path), re.DOTALL):
        root = ElementTree.fromstring(svg)
        _, _, width, height = (float(part) for part in root.attrib["viewBox"].split())
        for mark in root.iter():
            if mark.tag == "rect":
                assert float(mark.attrib["x"]) >= -0.01
                assert float(mark.attrib["y"]) >= -0.01
                assert float(mark.attrib["x"]) + float(mark.attrib["width"]) <= width + 0.01
                assert float(mark.attrib["y"]) + float(mark.attrib["height"]) <= height + 0.01
            if mark.tag == "path":
                numbers = [float(number) for number in re.findall(r"-?[\d.]+", mark.attrib["d"])]
                assert all(-0.01 <= value <= max(width, height) + 0.01 for value in numbers)
            if mark.tag == "text":
                assert 0 <= float(mark.attrib["x"]) <= width
                assert 0 <= float(mark.attrib["y"]) <= height + 1


def test_nothing_of_the_journal_becomes_markup(tmp_path: Path) -> None:
    events = Journal(clients=len(EVIL), rounds=2, names=EVIL).events()
    start = events[0]
    start |= {"name": EVIL[0], "utc": EVIL[1], "version": EVIL[2], "partition": EVIL[1], "references": [EVIL[0], {"x": EVIL[1]}]}
    start["model"] |= {"name": EVIL[2], "architecture": EVIL[0]}
    start["config"] |= {EVIL[0]: {EVIL[1]: EVIL[5]}, "text": EVIL[2]}
    start["clients"][0]["profile"] = EVIL[1]
    events[2]["clients"][0]["bytes"]["up"][EVIL[1]] = 5
    events[2]["timeline"].append([0, EVIL[0], 1.0, 2.0])
    events.insert(4, {"event": "resumed", "round": 1, "utc": EVIL[0]})
    page = render_page(load_record(write_events(tmp_path, events)))
    checker = checked(page)
    assert not {"script", "img", "b", "iframe", "link"} & set(checker.tags)
    assert not [name for name, _ in checker.attributes if name.startswith("on")]
    assert not {"\x1b", "\u202e"} & set(page)
    assert any("<script>alert(1)</script>" in text for text in checker.text)


def test_the_page_fetches_and_runs_nothing(tmp_path: Path) -> None:
    page = page_of(Journal(), tmp_path)
    checker = checked(page)
    assert not {"script", "link", "img", "iframe", "object", "use", "image"} & set(checker.tags)
    assert not {"src", "srcset", "xlink:href", "action"} & {name for name, _ in checker.attributes}
    assert not re.search(r"@import|url\((?!#)", page)
    links = [value for name, value in checker.attributes if name == "href"]
    assert all(link.startswith(("#", "https://arxiv.org/abs/")) for link in links)
    assert "default-src 'none'" in page


def test_equal_journals_give_equal_bytes(tmp_path: Path) -> None:
    first = write_report(Journal().write(tmp_path / "a")).read_bytes()
    assert write_report(Journal().write(tmp_path / "b")).read_bytes() == first


def test_the_report_replaces_the_old_one_whole(tmp_path: Path) -> None:
    folder = Journal(rounds=1).write(tmp_path)
    (folder / "report.html").write_text("old")
    assert write_report(folder) == folder / "report.html"
    assert (folder / "report.html").read_text().startswith("<!DOCTYPE html>")
    assert sorted(path.name for path in folder.iterdir()) == ["journal.jsonl", "report.html"]


def test_a_damaged_journal_leaves_the_old_report(tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("old")
    (tmp_path / "journal.jsonl").write_text("nonsense\n{}\n")
    with pytest.raises(CheckpointError):
        write_report(tmp_path)
    assert (tmp_path / "report.html").read_text() == "old"


def test_the_header_has_the_key_figures(tmp_path: Path) -> None:
    record = load_record(Journal().write(tmp_path))
    text = " ".join(checked(render_page(record)).text)
    before, after = record.before_after()
    for expected in (f"{before:.1f}", f"{after:.1f}", "822 B", "128,000", "5 of 5", "finished", "2026-04-01 09:30:00 UTC"):
        assert expected in text


@pytest.mark.parametrize(
    ("change", "expected"), [({"event": "interrupted"}, "interrupted"), ({"event": "resumed", "round": 2, "utc": ""}, "Resumed")]
)
def test_the_header_says_how_the_run_stands(tmp_path: Path, change: dict[str, Any], expected: str) -> None:
    page = render_page(load_record(write_events(tmp_path, [*Journal(rounds=3).events()[:-1], change])))
    assert expected in page


def test_the_configuration_can_be_saved_and_read_again(tmp_path: Path) -> None:
    import html
    import tomllib

    journal = Journal()
    shown = re.search(r"<pre>(.*?)</pre>", page_of(journal, tmp_path), re.DOTALL)
    assert shown is not None
    config = {key: value for key, value in journal.config().items() if value is not None}
    assert tomllib.loads(html.unescape(shown[1])) == config


def test_the_client_table_ends_with_the_cohort(tmp_path: Path) -> None:
    record = load_record(Journal(clients=3, rounds=2).write(tmp_path))
    columns, rows = client_rows(record)
    assert [row[0] for row in rows] == ["client-0", "client-1", "client-2", "global"]
    assert {len(row) for row in rows} == {len(columns)}
    assert not {"refused", "predicted", "busy", "ratio", "missed"} & set(columns)


def test_an_asynchronous_run_makes_a_sound_page(tmp_path: Path) -> None:
    page = render_page(load_record(write_events(tmp_path, asynchronous_events())))
    checked(page)
    assert "Time line of rounds 1 to 2" in page
    assert "Versions missed" in page
    assert "no update of the client was merged" in page


def column(record: RunRecord, name: str) -> list[str]:
    columns, rows = client_rows(record)
    return [row[columns.index(name)] for row in rows]


def test_the_client_table_counts_what_became_of_each_round(tmp_path: Path) -> None:
    journal = Journal(clients=4, rounds=11, adaptive=True)
    record = load_record(journal.write(tmp_path))
    told = [[int(part) for part in cell.split("/")] for cell in column(record, "done / partial / lost")]
    for client in range(4):
        states = [journal.state(client, number) for number in range(1, 12)]
        assert told[client] == [states.count(state) for state in ("done", "partial", "lost")]
    assert told[4] == [sum(row[place] for row in told[:4]) for place in range(3)]
    assert sum(told[4]) == 44
    refused = [int(cell) for cell in column(record, "refused")]
    assert refused[4] == sum(refused[:4]) > 0


def test_observed_seconds_are_held_against_the_prediction_of_rounds_that_came_through(tmp_path: Path) -> None:
    record = load_record(Journal(clients=4, rounds=11, adaptive=True).write(tmp_path))
    assert column(record, "ratio")[:4] == ["1.00", "1.10", "1.20", "1.30"]
    events = Journal(clients=2, rounds=2, adaptive=True).events()
    for event in events:
        for part in event["clients"] if event["event"] == "round" else ():
            part |= {"status": "lost"} if event["round"] == 2 else {"status": "done", "busy_s": {"back": 6.0}, "predicted_s": 4.0}
    record = load_record(write_events(tmp_path / "lost", events))
    assert [column(record, name)[0] for name in ("predicted", "busy", "ratio")] == ["4.00 s", "6.00 s", "1.50"]


def test_a_client_that_was_never_predicted_has_dashes(tmp_path: Path) -> None:
    events = Journal(clients=2, rounds=1, adaptive=True).events()
    events[2]["clients"][1] |= {"predicted_s": 0.0, "status": "done"}
    record = load_record(write_events(tmp_path, events))
    assert column(record, "ratio")[1] == "\N{EM DASH}"


def test_waiting_is_not_being_lost(tmp_path: Path) -> None:
    record = load_record(write_events(tmp_path, asynchronous_events()))
    # Client 0: 4 s busy and 2 s waiting for the merge, then 1 s busy and 5 s lost.
    assert column(record, "waited")[:3] == ["17 %", "0 %", "25 %"]
    assert column(record, "missed") == ["0", "0", "1.00", "0.250"]


def test_warnings_are_listed_and_a_long_list_is_folded(tmp_path: Path) -> None:
    page = page_of(Journal(adaptive=True, rounds=5), tmp_path / "few")
    assert "2 warnings during the run" in page
    assert "<li>Round 2: the cut of client 2 goes back and forth" in page
    events = Journal(rounds=1).events()
    events[2:2] = [{"event": "warning", "round": 1, "text": EVIL[0]} for _ in range(108)]
    page = render_page(load_record(write_events(tmp_path / "many", events)))
    assert "103 more warnings</summary>" in page
    assert "8 further in the journal" in page
    assert "script" not in checked(page).tags
    assert "during the run" not in page_of(Journal(rounds=1), tmp_path / "none")


def test_the_aggregation_section_is_there_when_it_has_something(tmp_path: Path) -> None:
    assert 'href="#aggregation"' in page_of(Journal(adaptive=True), tmp_path / "a")
    assert "aggregation" not in page_of(Journal(), tmp_path / "b")


PRIVATE = {"epsilon": 7.5, "delta": 1e-5, "clip": 0.2, "noise_multiplier": 3.8, "participants": 100.0, "merges": 1.0}


@pytest.mark.parametrize(
    ("metrics", "says", "not_said"),
    [
        ({**PRIVATE, "replaced": 1.0, "noise_norm": 0.4}, "differential privacy, epsilon 7.5 at delta 1e-05", "Secure aggregation"),
        ({"clip": 0.2, "participants": 100.0}, "no differential privacy is claimed", "epsilon"),
        ({"sealed_clients": 3.0, "sealed_values": 0.25, "sealed_step": 1e-9}, "the sum of 3 clients", "differential privacy"),
    ],
)
def test_what_is_hidden_is_said_in_a_sentence_and_constants_have_no_chart(
    tmp_path: Path, metrics: dict[str, float], says: str, not_said: str
) -> None:
    named = {name if name.startswith("sealed") else f"privacy_{name}": value for name, value in metrics.items()}
    events = Journal(rounds=2).events()
    for event in events:
        if event["event"] == "round":
            event["metrics"] = named
    page = render_page(load_record(write_events(tmp_path / "run", events)))
    assert says in page
    assert not_said not in page
    for constant in ("Privacy delta", "Privacy merges", "Privacy participants", "Sealed step", "Sealed values"):
        assert constant not in page


def test_a_huge_table_is_cut_and_says_so() -> None:
    columns = tuple(f"c{index}" for index in range(300))
    page = numbers_html(columns, tuple(columns for _ in range(500)))
    assert page.count("<td") <= CELLS
    assert "of 500 rows and 120 of 300 columns; the journal has all" in page
    assert numbers_html(columns, ()) == ""
