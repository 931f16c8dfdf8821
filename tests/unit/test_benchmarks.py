"""The harness measures like against like, writes what it measured, and the page shows what was written. No figure is judged here."""

from __future__ import annotations

import itertools
import json
import mmap
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import memory, memory_child, plots, record, setups, startup, stock, throughput, throughput_tables, timing  # noqa: E402 - from the root of the repository
from benchmarks.__main__ import TIMED, benchmark, parse, scope  # noqa: E402

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
    ways = [(row["way"], row["precision"]) for row in speeds]
    assert ways == [(way, kind) for kind in ("float32", "bfloat16") for way in throughput_tables.WAYS]
    for row in speeds:
        assert len(row["client_step_s"]) == 3
        assert row["tokens_per_s"] == pytest.approx(8 / statistics.median(row["client_step_s"]))
        assert set(row["speed_to"]) == {"peft", "best_peft", "best_loop", "bare"}
        assert (row["round_s"] > 0) == (row["way"] == "cohort")
    assert speeds[0]["speed_to"]["peft"] == 1.0


def test_sizes_of_a_run() -> None:
    cases = [(case.model, case.clients, case.tokens, case.steps) for case in throughput.Scope().cases()]
    assert ("embedded", 1000, 64, 1) in cases
    assert ("gpt2-small", 8, 256, 1) in cases
    assert ("embedded", 8, 64, 2) in cases
    assert [(case.clients, case.tokens) for case in throughput.Scope(models=("tiny",), clients=(3,)).cases()] == [
        (3, 64),
        (3, 128),
        (3, 256),
    ]


def test_a_rival_takes_a_sensible_batch_and_counts_for_as_many() -> None:
    assert throughput.timed_clients(setups.Case("embedded", "float32", 64, 128, 1)) == 64
    assert throughput.timed_clients(setups.Case("embedded", "float32", 64, 256, 1)) == 32
    assert throughput.timed_clients(setups.Case("embedded", "float32", 1000, 64, 1)) == 125
    assert throughput.timed_clients(setups.Case("gpt2-small", "float32", 64, 64, 1)) == 32


def test_ratios_are_of_one_clients_step_and_to_the_better_rival() -> None:
    def idle() -> throughput.Timing:
        return throughput.Timing(0.0, 0.0)

    case = setups.Case("tiny", "float32", 16, 8, 1)
    seconds = {
        "peft float32": 4.0,
        "peft bfloat16": 2.0,
        "loop float32": 8.0,
        "loop bfloat16": 12.0,
        "bare float32": 3.0,
        "bare bfloat16": 1.0,
    }
    seconds |= {"cohort float32": 2.0, "cohort bfloat16": 0.5}
    ways = [
        throughput.Contestant(way, kind, 8 if way == "loop" else 16, idle)
        for kind in ("float32", "bfloat16")
        for way in throughput_tables.WAYS
    ]
    # Every repeat on a slower machine than the one before: ratios within a repeat do not see it.
    samples = {name: [throughput.Timing(value * slow, 4.0) for slow in (1.0, 3.0, 9.0)] for name, value in seconds.items()}
    rows = {(row["way"], row["precision"]): row for row in throughput.rows_of(case, ways, samples)}
    assert rows["cohort", "bfloat16"]["speed_to"] == pytest.approx({"peft": 8.0, "best_peft": 4.0, "best_loop": 32.0, "bare": 2.0})
    assert rows["cohort", "float32"]["speed_to"] == pytest.approx({"peft": 2.0, "best_peft": 1.0, "best_loop": 8.0, "bare": 1.5})
    assert rows["loop", "float32"]["tokens_per_s"] == pytest.approx(8 * 8 / (8.0 * 3))
    text = throughput_tables.table(list(rows.values()))
    assert "| 16 × 8 | 2.00× | 1.50× | 8.00× | 2.00× | 1.33× | 4.00× | 4.00× | 32.00× | 0.0 |" in text


def test_only_steps_count_as_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    moments = iter([0.0, 1.0, 2.0, 5.0, 9.0, 20.0, 22.0])
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: next(moments))
    clock = throughput.StepClock()
    start = torch.zeros(1)
    clock.opened(start)
    clock.opened(start)  # at 2.0 the cohort is open
    clock.step(2)
    clock.step(2)
    clock.opened(start)  # another cohort; what lay between belongs to no step
    clock.step(1)
    assert clock.steps_s == (9.0 - 2.0) + (22.0 - 20.0)


def test_the_split_loop_trains_as_the_whole_model_does() -> None:
    case = setups.Case("tiny", "float32", 1, 8, 3)
    ids = torch.arange(3, 11)[None]
    traces = []
    for build in (stock.Unsplit, lambda model: stock.SequentialLoop(model, [2])):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)  # PEFT draws its adapters from the global stream
            rival = build(setups.build_model(case.model, case.dtype))
        traces.append([rival.step(ids) for _ in range(3)])
    assert traces[0] == pytest.approx(traces[1], rel=1e-6)
    assert traces[0][0] > traces[0][1] > traces[0][2]


def test_unlike_work_is_refused() -> None:
    case = next(TINY.cases())

    def begins(way: str, kind: str, loss: float) -> None:
        throughput.require_same_start(case, throughput.Contestant(way, kind, 4, lambda: throughput.Timing(0.0, loss)), loss, 4.0)

    begins("peft", "float32", 4.0001)
    begins("cohort", "float32", 4.01)
    begins("bare", "bfloat16", 4.01)
    for way, kind, loss in (("loop", "float32", 4.01), ("cohort", "float32", 4.1), ("peft", "bfloat16", float("nan"))):
        with pytest.raises(RuntimeError, match=f"{way} {kind} starts from"):
            begins(way, kind, loss)


def test_contestants_take_turns_and_each_is_first_once() -> None:
    order: list[str] = []
    samples = timing.take_turns({name: lambda name=name: order.append(name) or len(order) for name in "abc"}, 3)
    assert order == [*"abc", *"bca", *"cab"]
    assert samples == {"a": [1, 6, 8], "b": [2, 4, 9], "c": [3, 5, 7]}


def test_weights_are_shared_and_modules_are_not() -> None:
    model = setups.build_model("tiny", "float32")
    other = setups.sharing(model)
    assert all(a is b for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert not {id(one) for one in model.modules()} & {id(one) for one in other.modules()}


def test_trainers_half_precision_keeps_float32_weights() -> None:
    rival = stock.Unsplit(setups.build_model("tiny", "float32"), autocast=True)
    assert {parameter.dtype for parameter in rival.model.parameters()} == {torch.float32}
    seen: list[torch.dtype] = []
    rival.model.get_base_model().transformer.h[0].attn.c_attn.base_layer.register_forward_hook(lambda *given: seen.append(given[2].dtype))
    rival.step(torch.arange(3, 11)[None])
    assert seen == [torch.bfloat16]


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
    with mmap.mmap(-1, 64_000_000) as memory:  # not from the heap, which may have as much to give away
        for page in range(0, len(memory), mmap.PAGESIZE):
            memory[page] = 1
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
    assert "](images/benchmarks_throughput.svg)" in text


def test_memory_table_sets_both_beside_each_other() -> None:
    case = {"model": "embedded", "dtype": "float32", "clients": 4, "tokens": 128, "group": "training"}
    rows = [case | {"kind": "peft", "training_peak_bytes": 200_000_000}, case | {"kind": "cohort", "training_peak_bytes": 150_000_000}]
    device = {"model": "gpt2-small", "dtype": "float32", "clients": 1, "tokens": 128, "group": "client", "weight_bytes": 0}
    for kind, peak, baseline in (("peft", 900_000_000, 366_000_000), ("client", 300_000_000, 367_000_000)):
        rows.append(device | {"kind": kind, "training_peak_bytes": peak, "baseline_bytes": baseline})
    text = memory.table(rows)
    assert "| embedded | float32 | 4 × 128 | 200 | 150 | **0.75** |" in text
    assert "| a client, cut 2 | gpt2-small | float32 | 0 | 300 | **0.33** |" in text
    assert "Taken off as interpreter and libraries: 366 and 367 MB." in text


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


def test_plots_show_the_newest_results() -> None:
    sections = record.newest_sections()
    for name, (draw, _) in plots.PLOTS.items():
        path = plots.IMAGES / plots.file_name(name)
        assert path.exists() == (name in sections), name
        if name in sections:
            assert path.read_text("utf-8") == draw(sections[name]["rows"]), "run: make bench"


def test_options_reach_the_benchmarks_that_know_them() -> None:
    chosen = parse(["--bf16", "--clients", "2", "3", "--repeats", "7", "--flower-python", "/elsewhere/python"])
    assert (chosen.threads, chosen.names) == (2, [])
    assert scope("throughput", chosen).clients == scope("memory", chosen).clients == (2, 3)
    assert scope("memory", chosen).dtypes == ("float32", "bfloat16")
    assert scope("codecs", chosen).clients == 8, "a number and not a choice of numbers"
    assert scope("flower", chosen).flower_python == "/elsewhere/python"
    assert scope("flower", parse([])).flower_python == ""
    assert scope("startup", chosen).repeats == 7
    assert scope("memory", parse(["--quick"])) == memory.QUICK
    for name in TIMED:
        assert scope(name, parse([])) == benchmark(name).Scope()
    with pytest.raises(SystemExit):
        parse(["nothing"])


def test_the_recorded_command_names_no_place_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["benchmarks", "flower", "--flower-python", "/somewhere/bin/python", "--repeats", "5"])
    assert record.command_line() == "python -m benchmarks flower --flower-python python --repeats 5"
    assert all("/" not in section["command"] for section in record.newest_sections().values())
