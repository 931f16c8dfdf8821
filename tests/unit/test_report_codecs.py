"""What the codecs' sums mean: ratios over those who know both parts, stages, tables, scalars."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rich.console import Console

from splitft.apps.report import summary_table
from splitft.apps.report_codecs import (
    HEADERS,
    VALUES,
    CodecSums,
    codec_places,
    codec_rows,
    codec_sums,
    codec_table,
    ratio_text,
    share_of_16_bit,
    stages_by_place,
)
from splitft.apps.report_page import render_page
from splitft.apps.report_record import RunRecord, load_record
from splitft.apps.tensorboard import scalars
from splitft.compress.base import HEADER_BYTES, Samples
from splitft.compress.entropy import Entropy
from splitft.compress.quantize import Quantize
from splitft.compress.temporal import Temporal

from .codec_journals import Journal, coded_events, write_events


@pytest.fixture
def record(tmp_path: Path) -> RunRecord:
    return load_record(write_events(tmp_path, coded_events()))


@pytest.fixture
def plain(tmp_path: Path) -> RunRecord:
    return load_record(Journal().write(tmp_path / "plain"))


def test_a_ratio_counts_only_those_who_know_both_parts() -> None:
    sums = CodecSums(({"skipped": 1.0, "samples": 4.0}, {"samples": 96.0}, {"skipped": 9.0}, {"skipped": None, "samples": 5.0}))
    assert sums.skip_rate == 0.25
    assert sums.error is None
    assert CodecSums(({"squared": 0.0, "squared_error": 0.0},)).error is None
    assert CodecSums(({"bytes": float("nan")}, {"bytes": 2.0})).total("bytes") == 2.0


def test_clients_rounds_and_places_add_up(record: RunRecord) -> None:
    up = codec_sums(record.rounds, "up activations")
    assert codec_places(record) == ("up activations", "down gradients", "up adapters")
    assert up.total("packets") == 3 * 9
    assert (up.share, up.rank) == (0.2, 4.0)
    assert up.error == pytest.approx(0.1)
    assert up.skip_rate == pytest.approx(sum(10 * number for number in range(2, 10)) / 900)
    assert up.residual_share == pytest.approx(0.5 * sum(1 / number for number in range(2, 10)) / 8)
    assert codec_sums(record.rounds).share == pytest.approx((400 + 500 + 300) / (2000 + 2000 + 600))


def test_stages_add_up_to_what_was_sent_and_saved(record: RunRecord) -> None:
    up = codec_sums(record.rounds[:1], "up activations").stages()
    assert up is not None
    assert up.made == {"codes": 750.0, "scales": 300.0, "flags": 54.0, HEADERS: 96.0}
    assert sum(up.made.values()) == up.sent == 1200
    # The lossless stage holds codes and scales: they are shown as they were, and 100 bytes a client fewer travelled.
    down = codec_sums(record.rounds[:1], "down gradients").stages()
    assert down is not None
    assert down.made == {"codes": 1350.0, "scales": 354.0, HEADERS: 96.0}
    assert sum(down.made.values()) == down.sent + 300
    both = stages_by_place(record.rounds[:1], codec_places(record))
    assert both is not None
    assert both.made == {"codes": 2100.0, "scales": 654.0, "flags": 54.0, HEADERS: 192.0}
    assert both.sent == 2700
    assert codec_sums(record.rounds, "up adapters").stages() is None


def test_a_lossless_stage_over_a_codec_without_stages_is_one_itself() -> None:
    stages = CodecSums(({"packets": 1.0, "bytes": 732.0, "stage_entropy_bytes": 700.0, "stage_entropy_saved_bytes": 300.0},)).stages()
    assert stages is not None
    assert stages.made == {"entropy": 700.0, HEADERS: 32.0}
    assert stages.sent == 732


def test_real_packets_are_told_apart_to_the_byte() -> None:
    samples, rows = Samples((4, 9), (8, 8)), torch.randn(16, 32)
    skipping, packed = Temporal(), Entropy(inner=Quantize(bits=8))
    for codec, expected in ((skipping, {"skips": 1.0, VALUES: 16.0 * 32 * 2}), (packed, {})):
        packet, _ = codec.encode(rows, codec.init(), torch.Generator(), samples)
        sizes = {"packets": 1.0, "bytes": float(packet.size_bytes), "plain_bytes": HEADER_BYTES + 16.0 * 32 * 2}
        stages = CodecSums(({**packet.facts, **sizes},)).stages()
        assert stages is not None
        assert stages.made == {HEADERS: 32.0, **(expected or {"entropy": float(len(packet.payload))})}
        assert sum(stages.made.values()) == packet.size_bytes


def test_the_share_of_the_whole_run_leaves_labels_and_control_as_they_are(record: RunRecord, plain: RunRecord) -> None:
    coded = 3 * 9 * (400 + 500 + 300)
    as_16_bit = 3 * 9 * (2000 + 2000 + 600)
    assert share_of_16_bit(record) == pytest.approx(record.traffic() / (record.traffic() - coded + as_16_bit))
    assert share_of_16_bit(plain) is None


def test_the_table_has_a_row_per_place_and_no_empty_column(record: RunRecord, plain: RunRecord) -> None:
    columns, rows = codec_rows(record)
    assert columns == ("tensor", "packets", "bytes", "as 16 bit", "share", "skipped", "residual", "error", "mean rank")
    assert [row[0] for row in rows] == ["up activations", "down gradients", "up adapters", "all"]
    assert rows[0] == ("up activations", "27", "10.8 kB", "54.0 kB", "20 %", "49 %", "11 %", "10 %", "4.00")
    assert rows[1][4:8] == ("25 %", "0 %", "\N{EM DASH}", "20 %")
    assert codec_rows(plain) == ((), [])
    assert codec_table(plain) == ""


def test_small_ratios_keep_two_figures() -> None:
    assert [ratio_text(value) for value in (0.25, 0.0123, 0.00123, 0.0, None)] == ["25 %", "1.2 %", "0.12 %", "0 %", "\N{EM DASH}"]


def test_the_terminal_and_the_page_show_codecs_only_where_there_are_facts(record: RunRecord, plain: RunRecord) -> None:
    assert [str(table.title) for table in summary_table(plain)] == ["Held-out perplexity", "Bytes sent", "Rounds and time"]
    tables = {str(table.title): table for table in summary_table(record)}
    console = Console(width=80)
    with console.capture() as capture:
        console.print(tables["Codecs"])
    assert "\N{HORIZONTAL ELLIPSIS}" not in capture.get()
    assert "up activations" in capture.get()
    assert 'id="codecs"' not in render_page(plain)
    page = render_page(record)
    assert page.index('id="traffic"') < page.index('id="codecs"') < page.index('id="codec-table"') < page.index('id="time"')
    assert 'href="#codecs"' in page


def test_facts_without_anything_to_draw_still_have_their_table(tmp_path: Path) -> None:
    events = coded_events(rounds=1, controlled=False)
    for event in events:
        for part in event.get("clients", ()) if event["event"] == "round" else ():
            part["codec"] = {"up activations": {"packets": 1.0, "bytes": 10.0, "plain_bytes": 20.0}}
    page = render_page(load_record(write_events(tmp_path, events)))
    section = page[page.index('<section id="codecs"') : page.index('<section id="time"')]
    assert "codec-table" in section
    assert "Nothing recorded" not in section


def test_tensorboard_gets_the_ratios_the_dial_and_the_probe(record: RunRecord, plain: RunRecord) -> None:
    found = {(point.tag, point.step): point.value for point in scalars(record)}
    assert found["codec/up_activations/share", 1] == 0.2
    assert found["codec/up_activations/skip_rate", 5] == 0.5
    assert found["codec/up_activations/residual_share", 4] == 0.125
    assert ("codec/up_activations/residual_share", 1) not in found
    assert found["codec/down_gradients/error", 2] == pytest.approx(0.2)
    assert found["dial/activations", 9] == 1.0
    assert found["probe/clean_loss", 3] == pytest.approx(2.7)
    assert not [point.tag for point in scalars(plain) if point.tag.startswith(("codec/", "dial/", "probe/"))]
