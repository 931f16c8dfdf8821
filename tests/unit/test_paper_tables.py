"""The closed form is what the ledger counts, kind by kind; the formula gives the published rows; the page says what was counted."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as some

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import paper_bytes, paper_page, paper_tables, record  # noqa: E402 - from the root of the repository
from benchmarks.__main__ import benchmark, parse, scope  # noqa: E402
from benchmarks.paper_bytes import Turn, total_bytes  # noqa: E402

from splitft.engine.ledger import merge_counts  # noqa: E402
from splitft.engine.settings import Federation  # noqa: E402
from splitft.engine.workers import WorkersExecutor  # noqa: E402
from splitft.transport.inproc import InProcess  # noqa: E402
from splitft.types import RoundPlan  # noqa: E402

SMALL = paper_bytes.Setting(4, 128, 768, 50_257, 12, 3, 8448, 16)
# (cut, r_cut, published MB), as the paper's tables I and II have them; "No Cut" is rank 16 everywhere.
PUBLISHED = [
    *((2, 8, 3475.4), (4, 8, 3534.4), (6, 8, 3593.4), (8, 8, 3652.4), (10, 8, 3711.4)),
    *((2, 1, 3462.5), (2, 2, 3464.3), (2, 4, 3468.0), (2, 16, 3490.1)),
]


@pytest.fixture(scope="module")
def bench() -> paper_tables.Bench:
    return paper_tables.Bench(paper_tables.QUICK)


@pytest.fixture(scope="module")
def section() -> dict[str, Any]:
    found: dict[str, Any] = record.newest_sections()["paper_tables"]
    return found


def counted(section: dict[str, Any], *runs: str) -> list[dict[str, Any]]:
    return [row for row in section["rows"] if row["run"] in runs]


def by_messages(federation: Federation, plans: RoundPlan) -> dict[int, Any]:
    """The bytes of a round by real messages: a client and a server that encode and decode every frame."""
    start = federation.start
    result = WorkersExecutor(federation, InProcess()).train(
        plans, 0, lambda plan: start * federation.layout.active(plan.ranks), {}, lambda count: None
    )
    return result.ledger.clients


@pytest.mark.parametrize("codec", ["identity", "cast"])
@pytest.mark.parametrize("steps", [1, 2, 17])
def test_every_kind_of_bytes_is_the_closed_forms(bench: paper_tables.Bench, codec: str, steps: int) -> None:
    rows = bench.run("test", [Turn(1, 1, steps, 0), Turn(2, 3, steps, 1), Turn(2, 4, steps, 2)], codec)
    for row in rows:
        assert row["counted"] == row["closed_form"]
        assert all(row["counted"]["up"][kind] > 0 for kind in ("activations", "labels", "adapters", "control"))
        assert all(row["counted"]["down"][kind] > 0 for kind in ("gradients", "adapters", "control"))


def test_real_messages_have_the_same_bytes(bench: paper_tables.Bench) -> None:
    turns = [Turn(1, 2, 2, 0), Turn(2, 1, 2, 1)]
    found = by_messages(bench.federation, RoundPlan(1, tuple(map(bench.plan, turns))))
    assert [found[turn.client] for turn in turns] == [paper_bytes.turn_counts(bench.setting, turn) for turn in turns]


def test_a_clients_bytes_do_not_depend_on_the_others(bench: paper_tables.Bench) -> None:
    (alone,) = bench.run("test", [Turn(2, 2, 1, 1)])
    among_unlike = bench.run("test", [Turn(1, 4, 1, 0), Turn(2, 2, 1, 1), Turn(1, 1, 1, 2)])[1]
    among_alike = bench.run("test", [Turn(2, 2, 1, k) for k in range(3)])[1]
    assert alone["counted"] == among_unlike["counted"] == among_alike["counted"]


def test_a_miscount_is_refused(bench: paper_tables.Bench) -> None:
    (row,) = bench.run("test", [Turn(2, 2, 1)])
    for direction, kind in (("up", "activations"), ("down", "adapters"), ("down", "weights")):
        wrong = merge_counts([row["counted"]])
        wrong[direction][kind] += 1
        with pytest.raises(RuntimeError, match=f"bytes of {kind} {direction}"):
            paper_tables.require_equal(row | {"counted": wrong})


def test_a_whole_schedule_trained_for_real_adds_up(bench: paper_tables.Bench) -> None:
    """11 steps in turns of 4, one client at a time: the ledgers add up to both parts and the closing that the last turn is spared."""
    turns = [replace(turn, client=turn.client % 3) for turn in paper_bytes.schedule_turns(2, 2, 4, 11)]
    assert [(turn.steps, turn.round, turn.first_step) for turn in turns] == [(4, 1, 0), (4, 2, 4), (3, 3, 8)]
    trained = merge_counts([row["counted"] for turn in turns for row in bench.run("test", [turn])])
    parts = paper_bytes.split_run(bench.setting, turns, paper_bytes.step_counts(bench.setting))
    assert trained == merge_counts([*parts, paper_bytes.closing_counts(bench.setting, turns[-1])])


packable = some.recursive(
    some.booleans() | some.integers(0, 2**32 - 1) | some.floats(allow_nan=False) | some.text("abcdefgh_", max_size=40),
    lambda inner: some.lists(inner, max_size=20) | some.dictionaries(some.text("abcdefgh_", max_size=40), inner, max_size=20),
    max_leaves=40,
)


@given(packable)
def test_packed_length_is_msgpacks(value: object) -> None:
    assert paper_bytes.packed_bytes(value) == len(msgspec.msgpack.encode(value))


@pytest.mark.parametrize(("cut", "cut_rank", "figure"), PUBLISHED)
def test_the_formula_gives_the_published_rows(cut: int, cut_rank: int, figure: float) -> None:
    lora = (768 + 3 * 768) + (768 + 768) + (4 * 768 + 768)
    steps = 1143 * (2 * 4 * 128 * 768 * 4 + 1900)
    uploads = 57 * (sum(4 * lora * rank for rank in [16] * (cut - 1) + [cut_rank]) + 2000 * cut)
    assert (steps + uploads) / 2**20 == pytest.approx(figure, abs=0.06)
    assert paper_bytes.published_mib(cut, cut_rank) == (steps + uploads) / 2**20
    table = paper_bytes.PUBLISHED_RANKS[cut_rank] if cut == 2 else paper_bytes.PUBLISHED_CUTS[cut][1]
    assert table == figure


def test_the_schedule_is_the_papers() -> None:
    turns = paper_bytes.schedule_turns(2, 8)
    assert sum(turn.steps for turn in turns) == 1143
    assert [turn.steps for turn in turns] == [20] * 57 + [3]
    assert {turn.client for turn in turns} == set(range(5))
    # The framework's own count of rounds: 20 exchanges and one upload a turn, and the three of the turn that was cut off.
    assert 57 * (20 + 1) + 3 == 1200


def test_recorded_counts_are_complete_and_what_the_closed_form_says_today(section: dict[str, Any]) -> None:
    (facts,) = counted(section, "setting")
    assert facts == {"run": "setting", **vars(SMALL)}
    rows = [row for row in section["rows"] if "counted" in row]
    assert [(row["run"], row["cut"], row["cut_rank"]) for row in rows if row["run"] in ("cuts", "ranks")] == [
        *(("cuts", cut, 8) for cut in (2, 4, 6, 8, 10)),
        *(("ranks", 2, rank) for rank in (1, 2, 4, 8, 16)),
    ]
    assert [row["steps"] for row in counted(section, "alike", "cast", "turn")] == [2] * 5 + [1, 20]
    for row in rows:
        turn = Turn(*(row[name] for name in ("cut", "cut_rank", "steps", "client", "round", "first_step")))
        value_bytes = 2.0 if row["codec"] == "cast" else 4.0
        assert row["counted"] == paper_bytes.turn_counts(SMALL, turn, value_bytes)


def test_counts_grow_by_the_step(section: dict[str, Any]) -> None:
    one, two, turn = (counted(section, run)[0]["counted"] for run in ("cuts", "alike", "turn"))
    for direction, kind in (("up", "activations"), ("up", "labels"), ("down", "gradients")):
        assert (two[direction][kind], turn[direction][kind]) == (2 * one[direction][kind], 20 * one[direction][kind])
    assert one["up"]["activations"] == 4 * 128 * 768 * 4 + 32
    assert one["up"]["adapters"] == two["up"]["adapters"] == turn["up"]["adapters"] == 8448 * (16 + 8) * 4 + 32


@pytest.mark.parametrize(("cut", "cut_rank", "figure"), PUBLISHED)
def test_our_multiplied_counts_are_the_published_within_a_thousandth(
    section: dict[str, Any], cut: int, cut_rank: int, figure: float
) -> None:
    row = next(row for row in counted(section, "cuts", "ranks") if (row["cut"], row["cut_rank"]) == (cut, cut_rank))
    same, others = paper_page.multiplied(SMALL, row)
    assert total_bytes(same) / 2**20 == pytest.approx(figure, rel=1e-3)
    assert (same, others) == paper_bytes.split_run(SMALL, paper_bytes.schedule_turns(cut, cut_rank), paper_bytes.step_counts(SMALL))
    assert others["down"]["adapters"] == 58 * row["counted"]["down"]["adapters"]
    assert same["down"]["adapters"] == 0


def test_ranks_save_next_to_nothing_and_the_cut_nearly_all(section: dict[str, Any]) -> None:
    sums = {name: total_bytes(same) for name, _, same, _ in paper_page.savings(section["rows"])}
    whole = sums[paper_page.UNCHANGED]
    saved = {name: 100 * (1 - count / whole) for name, count in sums.items()}
    assert saved["r_cut 8"] == pytest.approx(0.42, abs=0.005)
    assert saved["r_cut 8"] == pytest.approx(100 * (3490.1 - 3475.4) / 3490.1, abs=0.005), "as the paper's own rows"
    assert 100 * 57 * 8448 * 4 * 32 / whole == pytest.approx(1.7, abs=0.05)
    assert saved[paper_page.SELDOMER] == pytest.approx(1.7 / 2, abs=0.05)
    assert 48 < saved[paper_page.NARROWER] < 50
    assert saved["int8 at the cut"] < 75 < saved["int4 at the cut"] < 87.5
    cast = counted(section, "cast")[0]["counted"]
    assert cast["up"]["activations"] == cast["down"]["gradients"] == 4 * 128 * 768 * 2 + 32


def test_the_model_gives_equal_devices_only_the_adapters_time(bench: paper_tables.Bench) -> None:
    """One client at a time and as fast as the server: the compute is the same at every cut, the rest is adapters both ways."""
    device, turns = paper_tables.DEVICE, [Turn(1, 4, 3), Turn(2, 4, 3)]
    counts = [paper_bytes.turn_counts(bench.setting, turn) for turn in turns]
    first, second = (bench.turn_s(turn.cut, turn.cut_rank, 1.0, one) for turn, one in zip(turns, counts, strict=True))
    moved = sum(counts[1][way]["adapters"] - counts[0][way]["adapters"] for way in ("up", "down"))
    assert second - first == pytest.approx(moved / device.uplink_bytes_per_s, rel=1e-6)
    slow = bench.turn_s(2, 4, 3.0, counts[1])
    cost = bench.costs.cost(bench.plan(turns[1]))
    assert slow - second == pytest.approx(3 * 2 * cost.client_flops / device.flops_per_s, rel=1e-6)
    twice = bench.turn_s(2, 4, 1.0, counts[1], front_twice=True)
    assert twice - second == pytest.approx(3 * cost.front_forward_flops / device.flops_per_s, rel=1e-6)


def test_recorded_times_contain_the_published_ratio_once_for_each_model(section: dict[str, Any]) -> None:
    rows = counted(section, "time")
    fitted = {(row["front_twice"], row["slowdown"]) for row in rows if row["fitted"]}
    assert sorted(twice for twice, _ in fitted) == [False, True]
    for twice, slowdown in {(row["front_twice"], row["slowdown"]) for row in rows}:
        seconds = [row["turn_s"] for row in rows if (row["front_twice"], row["slowdown"]) == (twice, slowdown)]
        assert seconds == sorted(seconds)
        close = math.isclose(seconds[-1] / seconds[0], 1104.7 / 810.4, rel_tol=1e-9)
        assert close == ((twice, slowdown) in fitted)


def test_the_page_is_made_from_the_newest_counts(section: dict[str, Any], tmp_path: Path) -> None:
    assert paper_page.PAGE.read_text("utf-8") == paper_page.page(section), "run: python -m benchmarks paper_tables"
    path = paper_page.write_page(section, tmp_path / "page.md")
    text = path.read_text("utf-8")
    assert "saves 0.42 % of the traffic" in text
    assert "1.7 % of it" in text
    for _, _, figure in PUBLISHED:
        assert f"| {figure:,.1f} |" in text


def test_another_count_makes_another_page(section: dict[str, Any]) -> None:
    changed = msgspec.json.decode(msgspec.json.encode(section))
    next(row for row in changed["rows"] if row["run"] == "cuts")["counted"]["up"]["activations"] += 10_000
    assert paper_page.page(changed) != paper_page.page(section)


def test_the_benchmark_is_known_by_name_and_its_setting_is_fixed() -> None:
    chosen = parse(["paper_tables", "--clients", "2", "--steps", "1", "--repeats", "1", "--tokens", "8"])
    assert benchmark("paper_tables") is paper_tables
    assert scope("paper_tables", chosen) == paper_tables.Scope()
    assert scope("paper_tables", parse(["--quick"])) == paper_tables.QUICK


def test_quick_runs_are_shown_and_agree() -> None:
    said: list[str] = []
    rows = paper_tables.measure(paper_tables.QUICK, said.append)
    text = paper_tables.table(rows)
    assert len(said) == 4
    for row in rows:
        if "counted" in row:
            assert row["counted"] == row["closed_form"]
            assert f"| {sum(row['counted']['up'].values()):,} |" in text
