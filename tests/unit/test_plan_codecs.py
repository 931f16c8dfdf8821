"""apps/plan_codecs.py: bits and bytes of the chosen codecs against figures worked out by hand."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from splitft.apps.plan_codecs import (
    Shapes,
    Stream,
    describe_codec,
    packet_bytes,
    plan_codecs,
    render_codecs,
    run_bytes,
    streams_of,
)
from splitft.apps.plan_command import show_plan
from splitft.compress.base import HEADER_BYTES, Codec
from splitft.compress.cast import Cast
from splitft.compress.identity import Identity
from splitft.compress.quantize import Quantize

from ..tiny_run import tiny_config


@dataclass(frozen=True)
class Learning(Cast):
    """As bfloat16 at first contact, an eighth of that on the second visit, a sixteenth later."""

    def expected_bytes(self, count: int, width: int, dtype: torch.dtype, visit: int = 0, samples: int = 1) -> float:
        return self.payload_bytes(count, width, dtype) / (1, 8, 16)[min(visit, 2)]


@dataclass(frozen=True)
class Over(Cast):
    """A codec with one inside, for its description."""

    inner: Codec = field(default_factory=Cast)


def stream(codec: Codec, packets: float = 10.0, epochs: float | None = None) -> Stream:
    return Stream("up activations", codec, 32, 64, torch.float32, packets, epochs)


def shapes(**changes: Any) -> Shapes:
    values: dict[str, Any] = {
        "batch_rows": 2, "row_tokens": 16, "hidden_size": 64, "dtype": torch.float32, "adapter_values": 100.0,
        "exchanges": 10.0, "participations": 5.0, "client_rounds": 5.0,
    }  # fmt: skip
    return Shapes(**(values | changes))


def test_cast_and_quantize_by_hand() -> None:
    cast, quantize = plan_codecs([stream(Cast()), stream(Quantize(bits=4))], (1.0,))
    # 32 x 64 values of two bytes; of half a byte, with a bfloat16 step for each of the 32 tokens. A header of 32 bytes on every packet.
    assert cast.plain_bytes == 10 * (32 * 64 * 2 + 32)
    assert cast.run_bytes == (cast.plain_bytes,)
    assert cast.first_bits == cast.later_bits == 8 * (4096 + 32) / 2048
    assert quantize.run_bytes == (10 * (32 * 64 // 2 + 32 * 2 + 32),)
    assert quantize.first_bits == 8 * (1024 + 64 + 32) / 2048
    assert quantize.plain_bytes == cast.plain_bytes


def test_a_plan_is_what_packets_of_fixed_rate_weigh() -> None:
    for codec in (Cast(), Cast("float32"), Quantize(bits=2, per="block", block=16), Identity()):
        packet, _ = codec.encode(torch.randn(2, 16, 64), codec.init())
        assert packet_bytes(stream(codec), 0) == packet.size_bytes


def test_the_first_epoch_and_later_ones_are_counted_apart() -> None:
    first, second, later = (HEADER_BYTES + 4096 / part for part in (1, 8, 16))
    one = stream(Learning(), 12)
    assert run_bytes(one, 1.0) == pytest.approx(12 * first)
    assert run_bytes(one, 0.4) == pytest.approx(12 * first)
    assert run_bytes(one, 2.0) == pytest.approx(6 * first + 6 * second)
    assert run_bytes(one, 3.0) == pytest.approx(4 * first + 4 * second + 4 * later)
    assert run_bytes(one, 1.5) == pytest.approx(8 * first + 4 * second)
    assert run_bytes(one, 12.0) == pytest.approx(first + second + 10 * later)
    many = stream(Learning(), 1_000_000)
    assert run_bytes(many, 1_000_000.0) == pytest.approx(first + second + 999_998 * later)


def test_adapters_are_sent_anew_each_round_whatever_the_data() -> None:
    [plan] = plan_codecs([stream(Learning(), 12, epochs=3.0)], (1.0, 10.0))
    assert plan.run_bytes[0] == plan.run_bytes[1] == run_bytes(stream(Learning(), 12), 3.0)


def test_which_tensors_travel() -> None:
    names = ("uplink", "downlink", "exit_uplink", "exit_downlink", "adapter_uplink", "adapter_downlink")
    codecs: dict[str, Codec] = {name: Quantize(block=number) for number, name in enumerate(names, start=2)}
    plain = {one.place: one for one in streams_of(shapes(), codecs, False)}
    assert list(plain) == ["up activations", "down gradients", "up adapters", "down adapters"]
    bent = {one.place: one for one in streams_of(shapes(), codecs, True)}
    assert [*bent] == ["up activations", "down activations", "up gradients", "down gradients", "up adapters", "down adapters"]
    used = ("uplink", "exit_downlink", "exit_uplink", "downlink", "adapter_uplink", "adapter_downlink")
    assert [one.codec for one in bent.values()] == [codecs[name] for name in used]
    assert (bent["up gradients"].rows, bent["up gradients"].width, bent["up gradients"].packets) == (32, 64, 10.0)
    assert (bent["up adapters"].rows, bent["up adapters"].width, bent["up adapters"].epochs) == (1, 128, 5.0), "as a change"
    codecs["adapter_uplink"] = Identity()
    whole = {one.place: one for one in streams_of(shapes(), codecs, True)}["up adapters"]
    assert (whole.rows, whole.width) == (1, 100)
    assert [one.place for one in streams_of(shapes(exchanges=0.0), codecs, False)] == ["up adapters", "down adapters"]
    assert streams_of(shapes(exchanges=0.0, adapter_values=0.0), codecs, True) == []


def test_a_codec_in_one_line() -> None:
    assert describe_codec(Identity()) == "identity"
    assert describe_codec(Cast("float16")) == "cast (dtype float16)"
    assert describe_codec(Quantize()) == "quantize (bits 8)"
    assert describe_codec(Quantize(bits=4, per="block", symmetric=False)) == "quantize (bits 4, per block, symmetric false)"
    assert describe_codec(Over(inner=Quantize(bits=2))) == "over (dtype bfloat16) over quantize (bits 2)"


def printed(streams: list[Stream]) -> str:
    console = Console(file=io.StringIO(), width=80)
    render_codecs(plan_codecs(streams), console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_one_column_where_epochs_make_no_difference_else_one_for_each() -> None:
    fixed, learning = printed([stream(Cast())]), printed([stream(Learning())])
    assert "16 bit      run" in fixed
    assert "epoch " not in fixed.split("All clients")[0]
    assert all(head in learning for head in ("1 epoch", "3 epochs", "10 epochs"))
    assert "…" not in fixed + learning
    assert max(map(len, (fixed + learning).splitlines())) <= 80
    assert printed([]) == ""


def test_the_command_shows_the_whole_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show_plan(tiny_config(tmp_path, uplink={"name": "quantize", "bits": 4}, split={"labels": "client"}))
    text = capsys.readouterr().out
    block = text[text.index("Codecs\n") :]
    assert "up activations    quantize (bits 4)" in block
    assert "down activations  quantize (bits 4)" in block
    assert "up gradients      cast (dtype bfloat16)" in block
    # Three rounds of three clients and two steps: 18 packets of 2 x 16 tokens and 32 channels, two bytes a value and a header of 32.
    assert f"{18 * (32 * 32 * 2 + 32) / 1000:.1f} kB" in block
    assert f"{18 * (32 * 16 + 32 * 2 + 32) / 1000:.1f} kB" in block
