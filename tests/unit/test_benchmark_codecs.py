"""Codecs are measured on what the engine really sends, as streams that both ends follow; rounds on slow links are the clock's own."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import codec_links, codec_rows, codecs  # noqa: E402 - from the root of the repository
from benchmarks.codec_rows import Sizes, Visit  # noqa: E402
from benchmarks.codec_stacks import STACKS, play  # noqa: E402

from splitft.adapt.profiles import preset  # noqa: E402
from splitft.catalog import CODECS  # noqa: E402
from splitft.compress.base import HEADER_BYTES, Codec, Samples  # noqa: E402

SIZES = Sizes(clients=2, sequences=2, tokens=16, batches=2, epochs=2)


@pytest.fixture(scope="module")
def recording() -> dict[int, tuple[list[Visit], list[Visit]]]:
    return codec_rows.recorded(SIZES, (256, 512))


def by_sample(visits: Sequence[Visit]) -> dict[tuple[int, int], torch.Tensor]:
    """Rows of each client's samples, as last sent."""
    found = {}
    for visit in visits:
        for client, (rows, told) in enumerate(zip(torch.split(visit.rows, list(visit.counts)), visit.samples, strict=True)):
            found |= {(client, one): part for one, part in zip(told.ids, torch.split(rows, list(told.rows)), strict=True)}
    return found


def test_a_recording_has_every_sample_once_an_epoch(recording: dict[int, tuple[list[Visit], list[Visit]]]) -> None:
    up, down = recording[256]
    assert len(up) == len(down) == SIZES.batches * SIZES.epochs
    for epoch in (up[:2], up[2:]):
        told = [visit.samples[client].ids for client in range(2) for visit in epoch]
        assert sorted(told[0] + told[1]) == sorted(told[2] + told[3]) == [0, 1, 2, 3]
    assert [visit.samples for visit in down] == [visit.samples for visit in up]
    # The same sequences, through adapters that have learnt in between: similar and not equal.
    first, last = by_sample(up[:2]), by_sample(up[2:])
    for name, rows in first.items():
        assert not torch.equal(rows, last[name])
        assert torch.nn.functional.cosine_similarity(rows.flatten(), last[name].flatten(), 0) > 0.9


def test_clients_side_by_side_are_whole_clients(recording: dict[int, tuple[list[Visit], list[Visit]]]) -> None:
    for narrow, wide in zip(*(recording[width][0] for width in (256, 512)), strict=True):
        assert wide.rows.shape == (narrow.rows.shape[0], 512)
        assert torch.equal(wide.rows[:, :256], narrow.rows)
        assert (wide.counts, wide.samples) == (narrow.counts, narrow.samples)
        assert not torch.equal(wide.rows[:, 256:], narrow.rows)


def test_every_codec_is_measured() -> None:
    kinds = {type(codec) for _, codec in STACKS.values()}
    assert kinds == {kind for kind in CODECS.values() if issubclass(kind, Codec)}


def test_bits_are_those_of_the_packets_and_errors_of_what_arrives() -> None:
    rows = torch.randn(12, 8, generator=torch.Generator().manual_seed(3))
    visit = Visit(rows, (6, 6), (Samples((0, 1), (3, 3)), Samples((5, 7), (2, 4))))
    plain, half = (play(STACKS[name][1], [visit, visit]) for name in ("identity", "cast"))
    assert plain.bits == [8 * (2 * HEADER_BYTES + 4 * 96) / 96] * 2
    assert half.bits == [8 * (2 * HEADER_BYTES + 2 * 96) / 96] * 2
    assert plain.errors == [0.0, 0.0]
    assert half.errors[0] == pytest.approx(float((rows - rows.bfloat16().float()).norm() / rows.norm()), rel=1e-6)


def test_later_visits_cost_less_where_codecs_remember(recording: dict[int, tuple[list[Visit], list[Visit]]]) -> None:
    up = recording[256][0]
    plain, kept, axes = (play(STACKS[name][1], up) for name in ("bounded", "residual", "axes residual"))
    assert plain.bits[-1] == pytest.approx(plain.bits[0], rel=0.2)
    assert kept.bits[-1] < 0.7 * kept.bits[0]
    assert axes.basis_bytes > 1000
    assert plain.basis_bytes == kept.basis_bytes == 0


def test_figures_and_tables_of_a_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    threads, names = torch.get_num_threads(), ("cast", "bounded", "axes residual")
    scope = replace(codecs.QUICK, models=(), codecs=names, sizes=SIZES)
    rows = codecs.measure(scope, lambda line: None)
    assert torch.get_num_threads() == threads
    assert [(row["kind"], row["codec"]) for row in rows] == [(kind, name) for kind in ("speed", "link") for name in names]
    for row in rows[:3]:
        assert all(min(row[visit]["encode_mb_s"], row[visit]["decode_mb_s"]) > 0 for visit in ("first", "later"))
    text = codecs.table(rows)
    assert "**By themselves, 256 channels**: 2 clients' packets of 32 tokens" in text
    assert "Best: at 1 Mbit/s `projection`" in text
    widths = {line.count("|") - line.count("\\|") for line in text.splitlines() if line.startswith("|")}
    assert widths <= {6, 9}


def test_a_round_on_a_slow_link_is_bytes_over_its_rate() -> None:
    links = codec_links.Links(clients=1, local_steps=3)
    slow, step_bytes = codec_links.round_of(links, 1.0, 16.0, 8.0)
    twice, _ = codec_links.round_of(links, 2.0, 16.0, 8.0)
    values = links.sequences * links.tokens * 256
    assert step_bytes == values * 3 + 2 * links.sequences * links.tokens  # two bytes up and one down, and labels
    adapter_bytes = 2 * 4 * 8 * 2 * (256 + 768 + 256 + 256 + 256 + 1024 + 1024 + 256)  # both ways, float32, rank 8, two blocks
    moved = 3 * step_bytes + adapter_bytes
    assert slow - twice == pytest.approx(moved / 125_000 / 2, rel=1e-9)
    assert slow - moved / 125_000 > 2 * 3 * preset(links.device).latency_s


def test_the_best_stack_is_the_fastest_of_those_precise_enough() -> None:
    def row(name: str, seconds: float, error: float) -> dict[str, object]:
        return {"codec": name, "later": {"round_s": [seconds]}, "error": error}

    rows = [row("cast", 9.0, 0.01), row("bounded", 5.0, 0.07), row("int2", 3.0, 0.8)]
    assert codec_links.best(rows, 0) == "bounded"
    assert codec_links.best(rows, 0, most_error=0.001) == ""
