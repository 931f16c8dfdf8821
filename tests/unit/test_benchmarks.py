"""The harness measures like against like, writes what it measured, and the page shows what was written. No figure is judged here."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import memory, memory_child, record, setups, startup, stock, throughput, timing  # noqa: E402 - from the root of the repository
from benchmarks.__main__ import parse, scope  # noqa: E402

TINY = throughput.Scope(models=("tiny",), clients=(4,), tokens=(8,), repeats=3, steps=2)
FACTS = {
    "machine": {
        "processor": "Brand(R) Chip 9 CPU @ 3 GHz",
        "cores": 2,
        "features": ["avx2"],
        "memory_bytes": 2**34,
        "system": "Linux x",
        "load_before": 0.5,
    },
    "versions": {"python": "3.11.1", "torch": "2.13.0+cpu"},
    "threads": 2,
    "command": "python -m benchmarks",
}


@pytest.fixture(scope="module")
def speeds() -> list[dict[str, Any]]:
    said: list[str] = []
    rows = throughput.measure(TINY, said.append)
    assert len(said) == 1
    return rows


def test_every_way_of_training_is_timed(speeds: list[dict[str, Any]]) -> None:
    assert [row["way"] for row in speeds] == list(throughput.WAYS)
    for row in speeds:
        assert len(row["wall_s"]) == 3
        assert row["tokens_per_s"] > 0
        assert row["tokens_per_s"] * row["step_s"] == pytest.approx(4 * 8)
    assert speeds[0]["speed_to_peft"] == 1.0


def test_the_split_loop_trains_as_the_whole_model_does() -> None:
    case = setups.Case("tiny", "float32", 1, 8, 3)
    ids = torch.arange(3, 11)[None]
    traces = []
    for build in (lambda model: stock.Unsplit(model, "float32"), lambda model: stock.SequentialLoop(model, [2], "float32")):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)  # PEFT draws its adapters from the global stream
            rival = build(setups.build_model(case.model, case.dtype))
        traces.append([rival.step(ids) for _ in range(3)])
    assert traces[0] == pytest.approx(traces[1], rel=1e-6)
    assert traces[0][0] > traces[0][1] > traces[0][2]


def test_unlike_work_is_refused() -> None:
    case = next(TINY.cases())
    throughput.require_same_start(case, {"peft": 4.0, "cohort-identity": 4.0001, "cohort-cast": 4.01})
    for name, loss in (("cohort-identity", 4.01), ("cohort-cast", 4.1), ("sequential", float("nan"))):
        with pytest.raises(RuntimeError, match=name):
            throughput.require_same_start(case, {"peft": 4.0, name: loss})


def test_bfloat16_is_measured_too() -> None:
    found = throughput.measure_case(setups.Case("tiny", "bfloat16", 1, 8, 1), 1)
    assert {row["way"] for row in found} == set(throughput.WAYS) - {"workers-cast"}


def test_contestants_take_turns_and_each_is_first_once() -> None:
    order: list[str] = []
    samples = timing.interleave({name: lambda name=name: order.append(name) for name in "abc"}, 3)
    assert order == [*"abc", *"bca", *"cab"]
    assert all(len(one.wall_s) == len(one.processor_s) == 3 for one in samples.values())


def test_a_ratio_is_taken_within_a_repeat() -> None:
    assert timing.median_ratio([1.0, 10.0, 100.0], [2.0, 20.0, 200.0]) == 0.5
    assert timing.spread([1.0, 2.0, 4.0]) == 1.5


def test_cuts_are_mixed_and_leave_the_server_a_block() -> None:
    assert setups.cuts(1, 8) == [2]
    assert setups.cuts(5, 4) == [1, 2, 3, 1, 2]
    for clients, blocks in itertools.product(range(2, 20), range(2, 13)):
        assert set(setups.cuts(clients, blocks)) <= set(range(1, blocks))


@pytest.mark.parametrize("kind", ["peft", "cohort"])
def test_memory_of_a_process_is_told(kind: str) -> None:
    given = {"kind": kind, "model": "tiny", "dtype": "float32", "clients": 2, "tokens": 8, "steps": 1}
    found = memory_child.main(json.dumps(given))
    assert found["training_peak_bytes"] >= 0
    assert found["baseline_bytes"] > 10_000_000, "torch alone is larger"


def test_a_client_holds_less_than_the_whole_model(tmp_path: Path) -> None:
    case = setups.Case("tiny", "float32", 1, 8, 2)
    memory_child.save(case, str(tmp_path))
    memory_child.client(case, str(tmp_path))()
    memory_child.unsplit(case, str(tmp_path))()


def test_peak_memory_sees_what_came_and_went() -> None:
    if not memory_child.forget_peak():
        pytest.skip("this system cannot reset the peak")
    before = memory_child.resident_bytes(peak=True)
    memory = bytearray(64_000_000)
    memory[::4096] = b"x" * len(memory[::4096])
    del memory
    assert memory_child.resident_bytes(peak=True) - before > 50_000_000


@pytest.mark.slow
def test_start_up_is_timed_to_the_first_step() -> None:
    small = ("data.max_documents=60", "clients.count=2", "tokens.block_tokens=32", "evaluate.max_rows=2", "train.batch_size=1")
    stages = startup.first_step_seconds(small)
    assert list(stages)[-1] == "first step"
    assert 0 < stages["load the model"] < stages["train"] < stages["first step"]


def test_start_up_of_a_command_that_fails_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(startup.sys, "executable", "false")
    with pytest.raises(RuntimeError, match="did not get to its first step"):
        startup.first_step_seconds(())


def test_start_up_table_names_the_stages() -> None:
    rows = startup.measure(startup.Scope(repeats=2, commands=("python -c pass",), overrides=None), lambda line: None)
    assert [row["what"] for row in rows] == ["python -c pass"]
    assert len(rows[0]["seconds"]) == 2
    run = {"what": "splitft run, to the first step", "median_s": 3.0, "seconds": [3.0], "stages": {"train": 2.0, "first step": 3.0}}
    assert startup.table([*rows, run]).endswith("Of the last: train at 2.0 s, first step at 3.0 s.")


def test_results_of_one_day_stand_in_one_file_and_the_newest_counts(tmp_path: Path, speeds: list[dict[str, Any]]) -> None:
    seconds = [{"what": "import splitft", "median_s": 0.5, "seconds": [0.5]}]
    first = record.write_result(tmp_path, "2026-01-01", "throughput", speeds, FACTS)
    assert first.name == "2026-01-01-brand-chip-9-2-cores.json"
    assert record.write_result(tmp_path, "2026-01-01", "startup", seconds, FACTS) == first
    record.write_result(tmp_path, "2026-02-01", "startup", [{**seconds[0], "median_s": 0.25}], FACTS)
    sections = record.newest_sections(tmp_path)
    assert sections["throughput"]["date"] == "2026-01-01"
    text = record.render(sections)
    assert "| `import splitft` | 0.25 |" in text
    assert "<sub>2026-02-01; Brand(R) Chip 9 CPU @ 3 GHz (avx2), 2 cores, 16 GiB, Linux x; 2 threads; python 3.11.1, torch 2.13.0;" in text
    assert "| 4 × 8 | " in text
    assert "PEFT, split loop" in text


def test_memory_table_sets_both_beside_each_other() -> None:
    case = {"model": "embedded", "dtype": "float32", "clients": 4, "tokens": 128, "group": "training"}
    rows = [case | {"kind": "peft", "training_peak_bytes": 200_000_000}, case | {"kind": "cohort", "training_peak_bytes": 150_000_000}]
    assert "| embedded | float32 | 4 × 128 | 200 | 150 | **0.75** |" in memory.table(rows)


def test_page_keeps_what_stands_around_the_results(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{record.BEGIN}\nold\n{record.END}\nafter\n")
    record.write_page("new", page)
    assert page.read_text() == f"before\n{record.BEGIN}\n\nnew\n\n{record.END}\nafter\n"
    assert record.page_text(page) == "new"
    page.write_text("no markers")
    with pytest.raises(RuntimeError, match="markers"):
        record.write_page("new", page)


def test_page_shows_the_newest_results() -> None:
    assert record.page_text() == record.render(record.newest_sections()), "run: make bench"


def test_options_reach_the_benchmarks_that_know_them() -> None:
    chosen = parse(["--bf16", "--clients", "2", "3", "--repeats", "7"])
    assert (chosen.threads, chosen.names) == (2, [])
    assert scope("throughput", chosen).clients == scope("memory", chosen).clients == (2, 3)
    assert scope("throughput", chosen).dtypes == ("float32", "bfloat16")
    assert scope("startup", chosen).repeats == 7
    assert scope("memory", parse(["--quick"])) == memory.QUICK
    with pytest.raises(SystemExit):
        parse(["nothing"])
