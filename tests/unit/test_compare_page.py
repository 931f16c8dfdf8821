"""The page, the Markdown and the terminal table: whole, closed to injection, honest about what is missing."""

from __future__ import annotations

import io
import itertools
import re
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from rich.console import Console

from splitft.apps.compare_page import render_markdown, render_page, spread_text, target_grid, terminal_table
from splitft.apps.compare_plots import HUES, MARKERS, compare_figures
from splitft.apps.compare_record import Comparison, Spread, VariantFigures, build_comparison

from .compare_journals import ended, figures, variant

EVIL = '"><script>alert(1)</script>|\x1b[31m'


def failed(name: str) -> VariantFigures:
    run = replace(figures({}, 0, name, "failed"), error=f"ConfigError: policy.cuts is 9 {EVIL}")
    return variant(name, run)


def comparison(count: int = 3, *more: VariantFigures, target: float | None = None) -> Comparison:
    variants = [ended(f"variant {index}", [40 + index, 41 + index, 43 + index]) for index in range(count)]
    return build_comparison("study", [*variants, *more], target, "")


def page(item: Comparison) -> str:
    return render_page(item, "1.0", "splitft compare a.toml")


class Checker(HTMLParser):
    """Fails on a tag that is not closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        assert not any(name.startswith("on") or (value or "").startswith(("http", "//")) for name, value in attrs)
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize(
    "item",
    [
        comparison(1),
        comparison(3, failed("broken")),
        comparison(15),
        comparison(2, target=1.0),
        build_comparison("empty", [variant("none", figures({}, status="not run"))], None, ""),
        build_comparison("all failed", [failed("a"), failed("b")], None, ""),
        build_comparison("one point", [variant("v", figures({0: 9.0, 1: 9.0}))], None, ""),
        build_comparison("interrupted", [variant("v", figures({0: 9.0}, status="unfinished"))], None, ""),
    ],
    ids=lambda item: f"{item.name} {len(item.variants)}",
)
def test_the_page_is_whole_and_has_every_variant(item: Comparison) -> None:
    text = page(item)
    checker = Checker()
    checker.feed(text)
    assert checker.open == []
    assert not checker.tags & {"script", "img", "link", "iframe"}
    assert "nan" not in re.sub(r"<style>.*?</style>", "", text).lower()
    for one in item.variants:
        assert one.label in checker.text
        assert all(run.name in checker.text for run in one.runs)
    for figure in compare_figures(item):
        ElementTree.fromstring(figure.svg)
    assert text == page(item)


def test_a_failed_run_is_shown_as_failed_with_the_first_line_of_its_error() -> None:
    item = comparison(2, failed("broken"))
    text = page(item)
    assert "policy.cuts is 9" in text
    assert "<script" not in text
    assert "\x1b" not in text
    assert "failed (1 of 1 runs)" in text
    assert "0 of 1, 1 failed" in text
    markdown = render_markdown(item)
    assert "broken-s0 failed: ConfigError: policy.cuts is 9" in markdown
    assert "<script" not in markdown
    assert item.failed == 1


def test_one_seed_is_not_shown_as_a_spread_of_zero() -> None:
    text = render_markdown(build_comparison("c", [variant("v", figures({0: 100.0, 1: 40.0}))], None, ""))
    assert "40.00 (one run)" in text
    assert "±" not in text.replace("± sample", "")
    assert spread_text(Spread(2.0, 0.0, 2.0, 2.0, 3), lambda value: f"{value:.1f} s") == "2.0 s ± 0"
    assert spread_text(None, str) == "\N{EM DASH}"


def test_not_reached_is_said_and_gives_no_ratio() -> None:
    item = build_comparison("c", [ended("good", [40, 41, 42]), ended("bad", [60, 61, 45]), ended("never", [80, 80, 80])], 50.0, "")
    columns, rows = target_grid(item)
    table = {row[0]: dict(zip(columns, row, strict=True)) for row in rows}
    assert table["good"]["time ratio"] == "×1.00"
    assert (table["bad"]["reached by"], table["bad"]["time ratio"]) == ("1 of 3", "\N{EM DASH}")
    assert table["bad"]["virtual time"] == "20.0 s (one run)"
    assert (table["never"]["reached by"], table["never"]["rounds"], table["never"]["bytes"]) == ("0 of 3", "not reached", "\N{EM DASH}")
    assert "not reached (ended at 80.00)" in page(item)


def test_thirty_variants_differ_in_hue_or_marker() -> None:
    pairs = [(index % HUES, index % MARKERS) for index in range(30)]
    assert len(set(pairs)) == 30
    assert all(one[0] != two[0] and one[1] != two[1] for one, two in itertools.pairwise(pairs))


def test_many_variants_get_panels_and_few_get_bands() -> None:
    few = {figure.key: figure for figure in compare_figures(comparison(3))}
    many = {figure.key: figure for figure in compare_figures(comparison(8))}
    assert "panels" not in few
    assert few["curve-virtual"].svg.count("span") == 3
    assert many["curve-virtual"].svg.count("span") == 0
    assert many["panels"].svg.count("span") == 8
    assert {f"curve-{key}" for key in ("rounds", "virtual", "bytes", "compute")} <= few.keys() & many.keys()


def test_curves_end_where_their_runs_end() -> None:
    short, long = variant("short", figures({0: 100.0, 1: 90.0})), variant("long", figures({0: 100.0, 4: 50.0}))
    figure = next(one for one in compare_figures(build_comparison("c", [short, long], None, "")) if one.key == "curve-rounds")
    assert {row[1] for row in figure.rows if row[0] == "short"} == {"0", "1"}


def test_terminal_table_fits_eighty_columns() -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(terminal_table(comparison(2, failed("broken [red]"))))
    text = console.export_text()
    rows = text.splitlines()[1:]
    assert all(len(line) <= 80 and line.rstrip()[-1] in "┓┃┩│┘" for line in rows)
    assert "0/1 failed" in text
    assert "[red]" in text
