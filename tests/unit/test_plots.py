"""Scales, ticks, labels and drawings."""

from __future__ import annotations

import itertools
import math
import re
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitft.apps import plots
from splitft.apps.plot_lines import Band, LineChart, Series, spread_bands

numbers = st.floats(min_value=-1e12, max_value=1e12, allow_nan=False)


@given(st.lists(numbers, max_size=8), st.booleans())
def test_a_linear_scale_holds_its_values_between_its_ends(values: list[float], zero: bool) -> None:
    scale = plots.linear_scale(values, 0, 100, zero=zero)
    assert scale.low < scale.high
    assert 2 <= len(scale.ticks) <= 20
    for value in values + ([0.0] if zero else []):
        assert -1e-3 <= scale(value) <= 100 + 1e-3
    assert all(a < b for a, b in zip(scale.ticks, scale.ticks[1:], strict=False))


@given(st.lists(st.floats(min_value=1e-6, max_value=1e12), min_size=1, max_size=8))
def test_a_log_scale_holds_its_values(values: list[float]) -> None:
    scale = plots.value_scale([*values, max(values) * 100], 0, 100)
    assert scale.log
    assert all(-0.5 <= scale(value) <= 100.5 for value in values)
    assert len(scale.ticks) >= 2


@pytest.mark.parametrize(("low", "high"), [(0, 0), (1, 1), (0, 1), (1, 5), (0, 30), (3, 1000)])
def test_integer_ticks_are_whole_and_inside(low: int, high: int) -> None:
    scale = plots.integer_scale(low, high, 0, 100)
    assert all(tick == int(tick) and low <= tick <= high for tick in scale.ticks)
    assert 1 <= len(scale.ticks) <= 14
    assert 0 <= scale(low) <= scale(high) <= 100


@pytest.mark.parametrize(
    ("values", "texts"),
    [
        ([0, 1], ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
        ([0, 100], ["0", "20", "40", "60", "80", "100"]),
        ([-1, 1], ["−1.0", "−0.5", "0.0", "0.5", "1.0"]),
        ([0, 4e-8], ["0", "1e−08", "2e−08", "3e−08", "4e−08"]),
    ],
)
def test_tick_texts(values: list[float], texts: list[str]) -> None:
    scale = plots.linear_scale(values, 0, 1)
    assert [scale.tick_text(tick) for tick in scale.ticks] == texts


@given(st.lists(numbers, min_size=2, max_size=8, unique=True))
def test_neighbouring_ticks_never_read_the_same(values: list[float]) -> None:
    scale = plots.linear_scale(values, 0, 1)
    texts = [scale.tick_text(tick) for tick in scale.ticks]
    assert len(set(texts)) == len(texts) or scale.high - scale.low < 1e-9 * max(abs(scale.low), abs(scale.high))


@given(st.lists(st.floats(min_value=0, max_value=300), max_size=12))
def test_labels_keep_their_distance_and_order(wanted: list[float]) -> None:
    placed = plots.spread(wanted, 14, 0, 300)
    ordered = sorted(placed)
    assert all(b - a >= 14 - 1e-9 for a, b in itertools.pairwise(ordered))
    assert all(place <= 300 for place in placed)
    for one in range(len(wanted)):
        for other in range(len(wanted)):
            if wanted[one] < wanted[other]:
                assert placed[one] < placed[other]


@given(st.lists(numbers, min_size=1, max_size=20))
def test_quantiles_are_between_the_ends_and_ordered(values: list[float]) -> None:
    shares = [plots.quantile(values, share) for share in (0.0, 0.1, 0.5, 0.9, 1.0)]
    slack = 1e-9 * max(map(abs, values))
    assert shares[0] == min(values)
    assert math.isclose(shares[-1], max(values))
    assert all(a <= b + slack for a, b in itertools.pairwise(shares))


@given(st.integers(min_value=0, max_value=500), st.integers(min_value=2, max_value=50))
def test_an_even_choice_keeps_both_ends(count: int, limit: int) -> None:
    chosen = plots.evenly(count, limit)
    assert len(chosen) <= limit
    assert chosen == sorted(set(chosen))
    if count:
        assert (chosen[0], chosen[-1]) == (0, count - 1)


@given(st.text(), st.text())
def test_a_drawing_escapes_all_its_text(title: str, label: str) -> None:
    drawing = plots.Drawing(10, 10)
    drawing.text(0, 0, label, title=title)
    drawing.rect(0, 0, 1, 1, "bar", title)
    drawing.circle(0, 0, 1, "dot", label)
    root = ElementTree.fromstring(drawing.svg("key", title, label))
    assert {mark.tag for mark in root.iter()} == {"svg", "title", "desc", "text"} | ({"rect", "circle"})


def test_coordinates_are_short() -> None:
    assert [plots.px(value) for value in (1.0, 1.25, 1.256, -0.001, 0, 100)] == ["1", "1.25", "1.26", "0", "0", "100"]


def chart(*points: tuple[float, float | None]) -> str:
    return LineChart((Series("line", points, "c0"),), "round", "loss").draw().svg("k", "t", "d")


def test_a_gap_is_bridged_with_dots_not_a_line() -> None:
    svg = chart((0, 1.0), (1, 2.0), (2, None), (3, 1.0), (4, 1.5))
    assert svg.count("line bridge") == 1
    assert svg.count('class="line thin c0"') == 2
    assert svg.count("<circle") == 4
    assert "line bridge" not in chart((0, 1.0), (1, 2.0), (2, 1.0))


@pytest.mark.parametrize("points", [[(0, 1.0)], [(0, None), (1, 5.0)], [(0, 0.0), (1, 0.0)], [(0, 1e-9), (1, 1e9)], []])
def test_odd_series_still_draw(points: list[tuple[float, float | None]]) -> None:
    assert "nan" not in chart(*points)


def test_a_dense_line_has_no_markers_but_lone_points_keep_theirs() -> None:
    dense = tuple((float(at), 1.0 + at % 7) for at in range(300))
    assert "<circle" not in chart(*dense)
    lone = (*dense, (300.0, None), (301.0, 3.0), (302.0, None), (303.0, 4.0), (304.0, 5.0))
    assert chart(*lone).count("<circle") == 1


def held_chart(*held: int) -> str:
    points = tuple((float(at), 2.0) for at in range(10))
    series = (Series("global", points, "ink", bold=True), Series("client", points, "c0"))
    return LineChart(series, "round", "loss", held=held, held_name="not aggregated").draw().svg("k", "t", "d")


def test_held_rounds_are_open_on_the_bold_line_and_bars_on_the_axis() -> None:
    svg = held_chart(0, 3, 4, 5, 9)
    assert svg.count('class="open ink"') == 5
    assert svg.count('class="dot ink"') == 5
    assert svg.count('class="dot c0"') == 10
    assert re.findall(r"<title>(round [\d to]+): not aggregated</title>", svg) == ["round 0", "round 3 to 5", "round 9"]
    assert "open" not in held_chart()
    assert held_chart(77) == held_chart()


def test_marks_are_written_beside_their_points() -> None:
    drawn = LineChart((Series("line", ((0, 1.0), (1, None), (5, 2.0)), "c0", marks=("0", "3", "6"), label=False),), "bytes", "loss").draw()
    assert [mark.split(">")[1].split("<")[0] for mark in drawn.marks if "small" in mark] == ["0", "6"]


def test_bands_of_many_clients() -> None:
    bands, median = spread_bands([(0, [1.0, 2.0, 3.0]), (1, []), (2, [5.0])])
    assert median == ((0, 2.0), (2, 5.0))
    assert bands[0].points == ((0, 1.0, 3.0), (2, 5.0, 5.0))
    drawn = LineChart((Series("median", median, "c0"),), "round", "loss", (Band(((0, 1.0, 3.0),), "band"), *bands)).draw()
    assert sum('class="band' in mark for mark in drawn.marks) == 3


def test_twelve_clients_look_different() -> None:
    assert len({plots.client_css(place) for place in range(12)}) == 12
