"""Temporal: what is skipped and why, bytes on the wire, both ends over a long life, and what a decoder refuses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch

from splitft.compress.base import HEADER_BYTES, Packet, Samples, State
from splitft.compress.cache import Budget, Cache, Ledger
from splitft.compress.cast import Cast
from splitft.compress.identity import Identity
from splitft.compress.lowrank import LowRank
from splitft.compress.quantize import Quantize
from splitft.compress.temporal import Temporal
from splitft.errors import CodecError, ConfigError
from splitft.rng import numpy_stream, torch_stream

WIDTH = 24
EXACT = Temporal(Identity(), cache_dtype="float32")


def rows_of(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn((count, WIDTH), generator=torch_stream(seed, "temporal-test"))


def send(
    codec: Temporal, rows: torch.Tensor, samples: Samples, ends: tuple[State, State]
) -> tuple[Packet, torch.Tensor, tuple[State, State]]:
    packet, sender = codec.encode(rows, ends[0], torch_stream(1, "temporal-draw"), samples)
    decoded, receiver = codec.decode(replace(packet, payload=bytes(packet.payload)), ends[1], samples)
    return packet, decoded, (sender, receiver)


def fresh(codec: Temporal) -> tuple[State, State]:
    return codec.init(), codec.init()


def test_the_first_visit_costs_the_inner_codec_and_a_bit_a_sample_the_second_only_the_bits() -> None:
    samples = Samples(tuple(range(9)), (3,) * 9)
    rows = rows_of(27)
    first, decoded, ends = send(EXACT, rows, samples, fresh(EXACT))
    assert first.size_bytes == HEADER_BYTES + 2 + 27 * WIDTH * 4
    assert torch.equal(decoded, rows)
    second, decoded, _ = send(EXACT, rows + 1e-4, samples, ends)
    assert bytes(second.payload) == b"\xff\x01"
    assert torch.equal(decoded, rows), "the receiver uses its old rows"
    assert second.facts["skipped"] == second.facts["samples"] == second.facts["similarity_19"] == 9
    assert second.facts["squared"] == pytest.approx(float((rows + 1e-4).double().square().sum()))
    assert "similarity_19" not in first.facts


def test_only_what_has_changed_is_sent() -> None:
    samples = Samples((5, 7, 2), (4, 1, 6))
    rows = rows_of(11)
    _, _, ends = send(EXACT, rows, samples, fresh(EXACT))
    changed = rows.clone()
    changed[4] = -changed[4]
    packet, decoded, ends = send(EXACT, changed, samples, ends)
    assert bytes(packet.payload) == b"\x05" + changed[4].numpy().tobytes()
    assert packet.facts["similarity_00"] == 1, "an opposite direction is counted at the bottom"
    assert torch.equal(decoded, changed)
    assert bytes(send(EXACT, changed, samples, ends)[0].payload) == b"\x07", "both ends have taken the new rows over"


def test_the_threshold_is_a_cosine_of_the_whole_sample() -> None:
    """With as many dimensions as channels are many the projected cosine is the cosine, up to a few hundredths."""
    rows, other = rows_of(40), rows_of(40, 1)
    for cosine in (0.2, 0.5, 0.9, 0.99):
        mixed = cosine * rows + (1 - cosine**2) ** 0.5 * other * (rows.norm() / other.norm())
        true = float(torch.nn.functional.cosine_similarity(rows.reshape(-1), mixed.reshape(-1), dim=0))
        for threshold, skipped in ((true - 0.07, 1), (true + 0.07, 0)):
            codec = replace(EXACT, threshold=min(threshold, 1.0), dimensions=512, norm_tolerance=0.5)
            _, _, ends = send(codec, rows, Samples((0,), (40,)), fresh(codec))
            assert send(codec, mixed, Samples((0,), (40,)), ends)[0].facts["skipped"] == skipped


def test_at_threshold_one_only_equal_rows_are_skipped() -> None:
    codec, samples = replace(EXACT, threshold=1.0), Samples((0, 1), (5, 5))
    rows = rows_of(10)
    _, _, ends = send(codec, rows, samples, fresh(codec))
    moved = rows.clone()
    moved[7:] += 0.01
    assert bytes(send(codec, moved, samples, ends)[0].payload[:1]) == b"\x01"


@pytest.mark.parametrize(("factor", "skipped"), [(1.0, 1), (1.04, 1), (0.96, 1), (1.06, 0), (0.94, 0), (-1.0, 0)])
def test_a_cosine_is_blind_to_length_the_norm_tolerance_is_not(factor: float, skipped: int) -> None:
    samples, rows = Samples((0,), (6,)), rows_of(6)
    _, _, ends = send(EXACT, rows, samples, fresh(EXACT))
    assert send(EXACT, rows * factor, samples, ends)[0].facts["skipped"] == skipped


@pytest.mark.parametrize(("before", "now", "skipped"), [(0.0, 0.0, 1), (0.0, 1.0, 0), (1.0, 0.0, 0), (3e38, 3e38, 0), (1e-44, 1e-44, 1)])
def test_zeros_and_extremes(before: float, now: float, skipped: int) -> None:
    """Projections that overflow are never similar; zero is similar to zero alone. (Tiny values project to zero, or to themselves.)"""
    samples = Samples((0,), (2,))
    _, _, ends = send(EXACT, torch.full((2, WIDTH), before), samples, fresh(EXACT))
    packet, decoded, _ = send(EXACT, torch.full((2, WIDTH), now), samples, ends)
    assert packet.facts["skipped"] == skipped
    assert torch.equal(decoded, torch.full((2, WIDTH), now))


def test_slow_drift_is_noticed_because_rows_are_compared_with_those_sent_last() -> None:
    samples, rows, other = Samples((0,), (8,)), rows_of(8), rows_of(8, 1)
    ends, sent = fresh(EXACT), []
    for turn in range(60):
        packet, decoded, ends = send(EXACT, rows + 0.01 * turn * other, samples, ends)
        sent.append(packet.facts["skipped"] == 0)
        error = (decoded - rows - 0.01 * turn * other).norm() / rows.norm()
        assert error < 0.35
    assert 2 <= sum(sent) <= 15


def test_the_sender_keeps_a_projection_and_the_receiver_the_rows() -> None:
    codec = replace(EXACT, dimensions=4)
    _, _, (sender, receiver) = send(codec, rows_of(10), Samples((1, 2), (3, 7)), fresh(codec))
    assert isinstance(sender.own, Ledger)
    assert isinstance(receiver.own, Cache)
    assert {name: tuple(t.shape) for name, t in codec.flatten(sender).items()} == {"noted": (2, 3), "summaries": (10, 4)}
    assert {name: tuple(t.shape) for name, t in codec.flatten(receiver).items()} == {"samples": (2, 3), "values": (10 * WIDTH,)}


def test_states_are_values() -> None:
    samples, rows = Samples((1, 2), (3, 7)), rows_of(10)
    _, _, ends = send(EXACT, rows, samples, fresh(EXACT))
    before = [{k: v.clone() for k, v in EXACT.flatten(end).items()} for end in ends]
    again = [send(EXACT, -rows, samples, ends)[0].payload for _ in range(2)]
    assert bytes(again[0]) == bytes(again[1])
    for old, end in zip(before, ends, strict=True):
        now: Mapping[str, torch.Tensor] = EXACT.flatten(end)
        assert all(torch.equal(old[name], now[name]) for name in now)


@pytest.mark.parametrize("inner", [Cast(), Quantize(bits=4, rounding="stochastic"), LowRank(bits=8)], ids=["cast", "quantize", "lowrank"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_batch_is_one_packet_after_the_other(inner: Cast | Quantize | LowRank, dtype: torch.dtype) -> None:
    codec = Temporal(inner)
    samples = [Samples((1, 2, 3), (3, 3, 2)), Samples((2,), (5,)), Samples((4, 4), (2, 2)), Samples((9,), (1,))]
    counts, many = [sum(one.rows) for one in samples], [fresh(codec) for _ in samples]
    single = list(many)
    for turn in range(4):
        rows = (rows_of(sum(counts)) * (1 + 0.02 * turn) + 0.3 * (turn == 2) * rows_of(sum(counts), 9)).to(dtype)
        draws = [torch_stream(turn, "temporal-batch", k) for k in range(len(counts))]
        packets, senders = codec.encode_batch(rows, counts, [end[0] for end in many], draws, samples)
        decoded, receivers = codec.decode_batch(packets, [end[1] for end in many], samples=samples)
        many = list(zip(senders, receivers, strict=True))
        for k, (part, found) in enumerate(zip(rows.split(counts), decoded.split(counts), strict=True)):
            packet, sender = codec.encode(part, single[k][0], torch_stream(turn, "temporal-batch", k), samples[k])
            alone, receiver = codec.decode(packet, single[k][1], samples[k])
            single[k] = sender, receiver
            assert bytes(packet.payload) == bytes(packets[k].payload)
            assert packet.facts == packets[k].facts
            assert torch.equal(alone, found)
            assert found.dtype == dtype


def test_half_precision_reuses_finite_rows() -> None:
    """65504 is 65536 in the cache's bfloat16, which float16 does not have."""
    samples, rows, codec = Samples((0,), (2,)), torch.full((2, 3), 65504.0, dtype=torch.float16), Temporal(Identity())
    _, _, ends = send(codec, rows, samples, fresh(codec))
    packet, decoded, _ = send(codec, rows, samples, ends)
    assert packet.facts["skipped"] == 1
    assert torch.equal(decoded, rows)


class Reference:
    """What the pair must do, in plain words: a dictionary of rows with a byte count, and no sharing of code with the codec."""

    def __init__(self, budget_bytes: float, evict: str, spill: bool) -> None:
        self.held: dict[int, torch.Tensor] = {}
        self.budget, self.evict, self.spill = budget_bytes, evict, spill

    def size(self) -> int:
        return sum(4 * rows.numel() for rows in self.held.values())

    def step(self, parts: dict[int, torch.Tensor], skipped: set[int]) -> None:
        for one in [one for one in parts if one in skipped]:
            self.held[one] = self.held.pop(one)
        for one, rows in [(one, rows) for one, rows in parts.items() if one not in skipped]:
            self.held.pop(one, None)
            while self.evict == "oldest" and not self.spill and self.held and self.size() + 4 * rows.numel() > self.budget:
                del self.held[next(iter(self.held))]
            if self.spill or self.size() + 4 * rows.numel() <= self.budget:
                self.held[one] = rows


@pytest.mark.parametrize(("evict", "spill"), [("new", False), ("oldest", False), ("new", True), ("oldest", True)])
def test_over_a_long_life_the_receiver_has_what_a_reference_says(evict: str, spill: bool) -> None:
    """Thousands of samples with skips, evictions and restarts of either end: nothing is ever skipped that the receiver has dropped."""
    codec = Temporal(Identity(), cache_dtype="float32", cache_mb=0.0024, evict=evict, spill=spill, dimensions=6)  # type: ignore[arg-type]
    reference, ends, dice = Reference(2400.0, evict, spill), fresh(codec), numpy_stream(4, "temporal-life")
    lengths = {one: int(dice.integers(1, 6)) for one in range(14)}
    bases = {one: rows_of(lengths[one], one) for one in lengths}
    skips = drops = 0
    for _ in range(1200):
        ids = [int(one) for one in dice.choice(14, int(dice.integers(1, 5)), replace=False)]
        for one in ids:
            bases[one] = rows_of(lengths[one], int(dice.integers(1 << 30))) if dice.random() < 0.3 else bases[one] * 1.001
        samples = Samples(tuple(ids), tuple(lengths[one] for one in ids))
        before = dict(reference.held)
        packet, decoded, ends = send(codec, torch.cat([bases[one] for one in ids]), samples, ends)
        flags = {one for place, one in enumerate(ids) if packet.payload[0] >> place & 1}
        parts = dict(zip(ids, decoded.split([lengths[one] for one in ids]), strict=True))
        for one in ids:
            assert torch.equal(parts[one], before[one] if one in flags else bases[one])
        reference.step(parts, flags)
        skips, drops = skips + len(flags), drops + len(before.keys() - reference.held.keys())
        assert list(ends[0].own.entries) == list(ends[1].own.entries) == list(reference.held)
        assert ends[0].own.held_bytes == ends[1].own.held_bytes <= 2400
        if dice.random() < 0.1:
            ends = codec.restore(codec.flatten(ends[0])), codec.restore(codec.flatten(ends[1]))
            assert list(ends[0].own.entries) == list(ends[1].own.entries) == list(reference.held)
    assert skips > 300
    assert (drops > 100) == (evict == "oldest" and not spill)


def test_a_tighter_budget_after_a_restart_is_the_same_at_both_ends() -> None:
    samples = Samples(tuple(range(8)), (2,) * 8)
    _, _, ends = send(EXACT, rows_of(16), samples, fresh(EXACT))
    codec = replace(EXACT, cache_mb=0.0005)
    ends = codec.restore(codec.flatten(ends[0])), codec.restore(codec.flatten(ends[1]))
    packet, decoded, _ = send(codec, rows_of(16), samples, ends)
    assert packet.facts["skipped"] == 2
    assert torch.equal(decoded, rows_of(16))


def test_damaged_packets_and_strangers_are_refused() -> None:
    samples, rows = Samples((3, 8), (2, 3)), rows_of(5)
    first, _, ends = send(EXACT, rows, samples, fresh(EXACT))

    def refused(payload: bytes, state: State, named: Samples | None = samples) -> None:
        with pytest.raises(CodecError):
            EXACT.decode(replace(first, payload=payload), state, named)

    for payload in (b"", b"\x04" + bytes(first.payload[1:]), b"\x03\x00", bytes(first.payload[:-1]), bytes(first.payload) + b"\0"):
        refused(payload, ends[1])
    with pytest.raises(CodecError, match="does not hold, the first is 3"):
        EXACT.decode(replace(first, payload=b"\x03"), EXACT.init(), samples)
    refused(b"\x01" + bytes(4 * 3 * WIDTH), ends[1], Samples((4, 8), (2, 3)))
    refused(b"\x03", ends[1], Samples((3, 8), (3, 2)))
    refused(b"\x03", ends[1], None)
    assert torch.equal(EXACT.decode(replace(first, payload=b"\x03"), ends[1], samples)[0], rows)
    rows[0, 0] = float("nan")
    with pytest.raises(CodecError, match="1 of 120 values are NaN"):
        EXACT.encode(rows, ends[0], None, samples)


def test_random_bytes_never_raise_anything_but_codec_errors() -> None:
    codec, samples = Temporal(LowRank(rank=3)), Samples((1, 2), (2, 2))
    packet, _, ends = send(codec, rows_of(4), samples, fresh(codec))
    dice = numpy_stream(1, "temporal-bytes")
    for turn in range(1500):
        payload = bytearray(packet.payload if turn % 2 else dice.bytes(int(dice.integers(0, 60))))
        for _ in range(turn % 4):
            if payload:
                payload[int(dice.integers(len(payload)))] ^= 1 << int(dice.integers(8))
        try:
            rows, _ = codec.decode(
                replace(packet, payload=bytes(payload[: int(dice.integers(len(payload) + 1))])), ends[turn % 3 % 2], samples
            )
        except CodecError:
            continue
        assert rows.shape == (4, WIDTH)
        assert bool(torch.isfinite(rows).all())


def test_the_dial_moves_the_threshold_s_distance_from_one_and_the_inner_codec() -> None:
    assert Temporal(threshold=0.9).scaled(0.5) == Temporal(threshold=0.95)
    assert Temporal(threshold=0.9).scaled(100.0) == Temporal(threshold=-1.0)
    inner = LowRank(rank=8)
    assert Temporal(inner, threshold=1.0).scaled(2.0) == Temporal(LowRank(rank=4), threshold=1.0)
    _, _, ends = send(EXACT, rows_of(4), Samples((0,), (4,)), fresh(EXACT))
    assert send(replace(EXACT, threshold=0.5), rows_of(4), Samples((0,), (4,)), ends)[0].facts["skipped"] == 1, "states stay valid"


def test_sizes_for_plans() -> None:
    assert Temporal().payload_bytes(17, 10, torch.float32) == 3 + 340
    assert Temporal().expected_bytes(17, 10, torch.float32, 1) == 341
    assert (Temporal().mirrored, Temporal().keyed, Temporal().draws) == (False, True, False)
    assert Temporal(Quantize(rounding="stochastic")).draws


@pytest.mark.parametrize(
    "fields",
    [
        {"threshold": 1.5},
        {"threshold": "x"},
        {"norm_tolerance": -1},
        {"norm_tolerance": float("nan")},
        {"dimensions": 0},
        {"cache_mb": -1},
        {"evict": "?"},
    ],
)
def test_wrong_fields_are_named(fields: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(fields))):
        Temporal(**fields)  # type: ignore[arg-type]


def test_the_ledger_follows_the_cache_when_a_sample_changes_its_shape() -> None:
    budget = Budget(0.001, "oldest", "float32")
    cache, ledger = Cache(budget), Ledger(budget)
    for rows, width in ((4, 8), (6, 8), (6, 5), (40, 8), (4, 8)):
        samples = Samples((1, 2), (rows, rows))
        cache, ledger = cache.put(samples, torch.ones(2 * rows, width)), ledger.put(samples, torch.ones(2 * rows, 2), width)
        assert cache.known(samples, width) == ledger.known(samples, width)
        assert list(cache.entries) == list(ledger.entries)
