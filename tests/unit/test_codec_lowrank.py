"""LowRank: exact sums, bytes as in the paper's arithmetic, both ends in step, and what a decoder refuses."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import pytest
import torch

from splitft.apps.assemble import build_components
from splitft.compress.base import HEADER_BYTES, Packet, Samples, State
from splitft.compress.cast import Cast
from splitft.compress.factors import MOST_COMPONENTS, SPAN, Factors, enough, largest_triplets, quantised, read_factors, write_factors
from splitft.compress.identity import Identity
from splitft.compress.lowrank import LowRank
from splitft.compress.quantize import Quantize
from splitft.compress.temporal import Temporal
from splitft.config import parse_config
from splitft.errors import CodecError, ConfigError
from splitft.rng import numpy_stream, torch_stream

WIDTH = 40
EXACT = LowRank(Identity(), cache_dtype="float32")


def rows_of(count: int, seed: int = 0, width: int = WIDTH) -> torch.Tensor:
    return torch.randn((count, width), generator=torch_stream(seed, "lowrank-test"))


def change_of(rank: int, rows: int, seed: int = 1) -> torch.Tensor:
    return rows_of(rows, seed, rank) @ rows_of(rank, seed + 50)


def send(codec: LowRank, rows: torch.Tensor, samples: Samples, state: State, draw: int = 1) -> tuple[Packet, torch.Tensor, State]:
    """One packet; the two ends are compared bit by bit."""
    packet, sender = codec.encode(rows, state, torch_stream(draw, "lowrank-draw"), samples)
    decoded, receiver = codec.decode(replace(packet, payload=bytes(packet.payload)), state, samples)
    ends = codec.flatten(sender), codec.flatten(receiver)
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    return packet, decoded, receiver


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("count", [1, 16, MOST_COMPONENTS])
def test_sums_are_exact_in_any_order(bits: int, count: int) -> None:
    """At the worst: largest codes, odd significands, steps as far apart as is allowed. Against rational numbers, and in every order."""
    dice, most = numpy_stream(bits, "lowrank-exact", count), 2 ** (bits - 1)
    # Most of them at the top with the largest significand, so that sums are as large as they can be; one at the bottom, odd.
    significands, exponents = torch.full((count, 2), 255.0).double(), torch.full((count,), SPAN - 2.0).double()
    exponents[count // 2 :: 3] = torch.from_numpy(dice.integers(0, SPAN - 1, len(exponents[count // 2 :: 3]))).double()
    significands[-1], exponents[-1] = 129.0, 0.0
    steps = significands * torch.stack([2.0**exponents, torch.full((count,), 2.0**-20)], 1).double()
    codes = torch.from_numpy(dice.choice([-most, most - 1, -most + 1, 1], (count, 3 + 4))).float()
    factors = read_factors(memoryview(b"".join(write_factors(Factors(steps.float(), codes), bits))), count, 3, 4, bits)
    assert torch.equal(factors.codes, codes)
    assert torch.equal(factors.steps.double(), steps)
    found = factors.product(3)
    terms = [
        [
            [
                Fraction(int(codes[k, i]) * int(codes[k, 3 + j])) * Fraction(float(steps[k, 0])) * Fraction(float(steps[k, 1]))
                for j in range(4)
            ]
            for i in range(3)
        ]
        for k in range(count)
    ]
    for i in range(3):
        for j in range(4):
            assert Fraction(float(found[i, j])) == sum(term[i][j] for term in terms)
    for turn in range(20):
        order = torch.from_numpy(numpy_stream(turn, "lowrank-order").permutation(count))
        assert torch.equal(Factors(factors.steps[order], factors.codes[order]).product(3), found)
        one_by_one = torch.zeros(3, 4, dtype=torch.float64)
        for k in order.tolist():
            one_by_one += Factors(factors.steps[k : k + 1], factors.codes[k : k + 1]).product(3)
        assert torch.equal(one_by_one, found)


def test_beyond_the_span_sums_are_not_exact() -> None:
    """So the limit is needed: the same with steps a billion apart gives other bits in another order."""
    steps = torch.tensor([[255.0 * 2.0**30, 255.0], [129.0, 129.0], [255.0 * 2.0**30, 255.0]])
    codes = torch.tensor([[127.0, 127.0], [1.0, 1.0], [-127.0, 127.0]])
    parts = [Factors(steps[k : k + 1], codes[k : k + 1]).product(1) for k in range(3)]
    assert float(parts[0] + parts[1] + parts[2]) != float(parts[0] + parts[2] + parts[1])


def test_components_too_small_for_an_exact_sum_are_left_out_and_refused_from_the_wire() -> None:
    columns = torch.ones(5, 3) * torch.tensor([1.0, 2.0**-14, 2.0**-16])
    factors = quantised(columns, torch.ones(3, 6), 8, torch_stream(0, "x"))
    assert len(factors.steps) == 2
    far = Factors(torch.tensor([[1.0, 1.0], [2.0**-16, 1.0]]), torch.ones(2, 11))
    with pytest.raises(CodecError, match="too far apart"):
        read_factors(memoryview(b"".join(write_factors(far, 8))), 2, 5, 6, 8)


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (20, 33), (60, 24)])
@pytest.mark.parametrize("most", [1, 4, 64])
def test_triplets_are_those_of_the_whole_decomposition(shape: tuple[int, int], most: int) -> None:
    """Decaying values as those of real changes: the error is that of the best matrix of this rank."""
    matrices = torch.stack([rows_of(shape[0], seed, shape[1]).double() * 0.7 ** torch.arange(shape[1]) for seed in range(3)])
    found = largest_triplets(matrices, most)
    values = torch.linalg.svdvals(matrices)
    kept = min(most, *shape)
    torch.testing.assert_close(found.energies.sqrt(), values[:, :kept], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(found.totals, values.square().sum(1))
    error = (matrices - found.columns.double() @ found.rows.double()).square().sum((1, 2))
    best = values[:, kept:].square().sum(1)
    assert bool((error <= best * 1.01 + 1e-10 * found.totals).all())


def test_enough_is_the_smallest_rank_that_keeps_the_share() -> None:
    energies, total = torch.tensor([8.0, 4.0, 2.0, 1.0]).double(), torch.tensor(16.0).double()
    assert [enough(energies, total, share) for share in (0.3, 0.5, 0.51, 0.75, 0.8, 0.9, 0.95, 1.0)] == [1, 1, 2, 2, 3, 4, 4, 4]


@pytest.mark.parametrize("bits", [8, 4])
def test_rounding_is_unbiased(bits: int) -> None:
    columns, rows = rows_of(6, 0, 2), rows_of(2, 1, 5)
    exact, draws = columns.double() @ rows.double(), 4000
    generator = torch_stream(3, "unbiased")
    samples = torch.stack([quantised(columns, rows, bits, generator).product(6) for _ in range(draws)])
    spread = samples.std(0) / draws**0.5
    assert bool(((samples.mean(0) - exact).abs() <= 5 * spread + 1e-3 * exact.abs().max() * 2.0**-bits).all())


@pytest.mark.parametrize(("bits", "rank", "rows", "width"), [(4, 32, 128, 768), (8, 64, 128, 768), (4, 3, 7, 40), (8, 9, 5, 12)])
def test_bytes_of_a_later_visit_are_the_paper_s(bits: int, rank: int, rows: int, width: int) -> None:
    """k (t + d) bits / 8 as in arXiv 2608.23018, two steps in bfloat16 for each component (not counted there), a byte for the rank."""
    codec, samples = LowRank(rank=rank, bits=bits), Samples((4,), (rows,))
    first, _, state = send(codec, rows_of(rows, 0, width), samples, codec.init())
    assert first.size_bytes == HEADER_BYTES + rows * width * 2
    later, _, _ = send(codec, rows_of(rows, 1, width), samples, state)
    kept = min(rank, rows)
    assert len(later.payload) == 1 + 4 * kept + kept * -(-(rows + width) * bits // 8)
    assert len(later.payload) == codec.expected_bytes(rows, width, torch.float32, 1)
    assert first.facts["rank_samples"] == 0
    assert (later.facts["rank_samples"], later.facts["rank_sum"]) == (1, kept)
    stages = sum(value for name, value in later.facts.items() if name.startswith("stage_"))
    assert stages == len(later.payload)


def test_the_paper_s_table_of_relative_traffic() -> None:
    """Rank 32 at 4 bits up and 64 at 8 bits down, t = 128, against 16 bits: 6.51 and 16.28 % at d = 3072, without steps and ranks."""
    for width, uplink, total in ((3072, 6.51, 16.28), (2048, 6.64, 16.6), (1536, 6.77, 16.93), (1152, 6.94, 17.36)):
        up = LowRank(rank=32, bits=4).expected_bytes(128, width, torch.bfloat16, 1) - 1 - 4 * 32
        down = LowRank(rank=64, bits=8).expected_bytes(128, width, torch.bfloat16, 1) - 1 - 4 * 64
        full = 128 * width * 2
        assert 100 * up / full == pytest.approx(uplink, abs=0.006)
        assert 100 * (up + down) / (2 * full) == pytest.approx(total, abs=0.006)


def test_nothing_changed_costs_a_byte() -> None:
    samples, rows = Samples((1, 2, 3), (3, 3, 5)), rows_of(11)
    _, decoded, state = send(EXACT, rows, samples, EXACT.init())
    assert torch.equal(decoded, rows)
    packet, decoded, state = send(EXACT, rows, samples, state)
    assert bytes(packet.payload) == b"\0\0\0"
    assert torch.equal(decoded, rows)
    changed = rows.clone()
    changed[3:6] += change_of(2, 3)
    packet, _, _ = send(EXACT, changed, samples, state)
    assert bytes(packet.payload[:3]) == b"\0\2\0"
    assert len(packet.payload) == 3 + 2 * (4 + 22)


@pytest.mark.parametrize(("bits", "limit"), [(8, 0.03), (4, 0.5)])
def test_a_change_of_low_rank_arrives_and_what_is_lost_is_sent_next(bits: int, limit: float) -> None:
    codec, samples, rows = replace(EXACT, rank=4, bits=bits), Samples((0,), (30,)), rows_of(30)
    _, _, state = send(codec, rows, samples, codec.init())
    target = rows + change_of(4, 30)
    errors = [float((target - rows).norm())]
    for turn in range(6):
        packet, decoded, state = send(codec, target, samples, state, turn)
        errors.append(float((target - decoded).norm()))
        assert packet.facts["residual_squared"] == pytest.approx(errors[-2] ** 2, rel=1e-4)
        assert packet.facts["squared_error"] == pytest.approx(errors[-1] ** 2, rel=1e-4)
        assert packet.facts["known_squared"] == packet.facts["squared"] == pytest.approx(float(target.double().square().sum()))
    assert errors[1] < limit * errors[0]
    assert errors[6] < limit**2 * errors[0]


def test_energy_gives_each_sample_its_own_rank() -> None:
    codec = replace(EXACT, energy=0.999, rank=12, bits=8)
    samples, rows = Samples((0, 1, 2), (30, 30, 20)), rows_of(80)
    _, _, state = send(codec, rows, samples, codec.init())
    changed = rows + torch.cat([change_of(2, 30), change_of(7, 30), 100 * rows_of(20, 8)])
    packet, _, _ = send(codec, changed, samples, state)
    assert list(packet.payload[:3]) == [2, 7, 12]


@pytest.mark.parametrize(
    "inner", [Cast(), Quantize(bits=4, rounding="stochastic"), LowRank(rank=2, bits=8)], ids=["cast", "quantize", "lowrank"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_batch_is_one_packet_after_the_other(inner: Cast | Quantize | LowRank, dtype: torch.dtype) -> None:
    codec = LowRank(inner, rank=3, bits=8, cache_mb=0.001, evict="oldest")
    samples = [Samples((1, 2, 3), (3, 3, 2)), Samples((2,), (5,)), Samples((4, 4), (2, 2)), Samples((9,), (1,))]
    counts, many = [sum(one.rows) for one in samples], [codec.init() for _ in samples]
    single = list(many)
    for turn in range(3):
        rows = (rows_of(sum(counts)) + 0.3 * turn * rows_of(sum(counts), 9)).to(dtype)
        draws = [torch_stream(turn, "lowrank-batch", k) for k in range(len(counts))]
        packets, senders = codec.encode_batch(rows, counts, many, draws, samples)
        decoded, many = codec.decode_batch(packets, many, samples=samples)
        for k, (part, found) in enumerate(zip(rows.split(counts), decoded.split(counts), strict=True)):
            packet, _ = codec.encode(
                part,
                single[k],
                torch_stream(turn, "lowrank-batch", k),
                samples[k],
            )
            alone, single[k] = codec.decode(packet, single[k], samples[k])
            assert bytes(packet.payload) == bytes(packets[k].payload)
            assert packet.facts == packets[k].facts
            assert torch.equal(alone, found)
            assert found.dtype == dtype
            for states in (senders, many):
                ours, theirs = codec.flatten(states[k]), codec.flatten(single[k])
                assert ours.keys() == theirs.keys()
                assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(("evict", "spill"), [("new", False), ("oldest", False), ("new", True)])
def test_both_ends_stay_equal_over_a_long_life(evict: str, spill: bool) -> None:
    """With evictions and restarts of either end, a packet always decodes to what the sender says is lost."""
    codec = LowRank(Cast(), rank=2, bits=8, cache_mb=0.0012, evict=evict, spill=spill)  # type: ignore[arg-type]
    dice, sender, receiver = numpy_stream(2, "lowrank-life"), codec.init(), codec.init()
    lengths = {one: int(dice.integers(1, 6)) for one in range(10)}
    bases = {one: rows_of(lengths[one], one) for one in lengths}
    ranks = 0.0
    for turn in range(150):
        ids = [int(one) for one in dice.choice(10, int(dice.integers(1, 5)))]
        for one in ids:
            bases[one] = bases[one] + 0.1 * rows_of(lengths[one], turn)
        samples, rows = Samples(tuple(ids), tuple(lengths[one] for one in ids)), torch.cat([bases[one] for one in ids])
        packet, sender = codec.encode(rows, sender, torch_stream(turn, "life"), samples)
        decoded, receiver = codec.decode(packet, receiver, samples)
        assert packet.facts["squared_error"] == pytest.approx(float((rows.double() - decoded.double()).square().sum()), rel=1e-9)
        assert len(packet.payload) <= codec.payload_bytes(len(rows), WIDTH, torch.float32)
        ranks += packet.facts["rank_samples"]
        if turn % 9 == 0:
            sender = codec.restore(codec.flatten(sender))
        if turn % 7 == 0:
            receiver = codec.restore(codec.flatten(receiver))
        ours, theirs = codec.flatten(sender), codec.flatten(receiver)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert ranks > 50


def test_without_commit_the_packet_is_the_same_and_the_state_is_left() -> None:
    samples, rows = Samples((1, 2), (3, 4)), rows_of(7)
    _, _, state = send(EXACT, rows, samples, EXACT.init())
    for given in (EXACT.init(), state):
        kept, after = EXACT.encode_batch(rows * 2, [7], [given], [torch_stream(0, "c")], [samples])
        left, same = EXACT.encode_batch(rows * 2, [7], [given], [torch_stream(0, "c")], [samples], commit=False)
        assert bytes(kept[0].payload) == bytes(left[0].payload)
        assert kept[0].facts == left[0].facts
        assert same[0].own is given.own
        assert after[0].own is not given.own


@pytest.mark.parametrize("values", [(3e38, -3e38), (1e-44, 3e38), (0.0, 1e-44), (3e38, 0.0), (1e20, -1e20)])
def test_extremes_stay_finite_and_equal(values: tuple[float, float]) -> None:
    samples, state = Samples((0,), (4,)), EXACT.init()
    for turn in range(4):
        _, decoded, state = send(EXACT, torch.full((4, 8), values[turn % 2]) * (1 - 0.1 * torch.eye(4, 8)), samples, state)
        assert bool(torch.isfinite(decoded).all())


def test_the_size_bound_holds_for_any_division_into_samples() -> None:
    dice = numpy_stream(5, "lowrank-bound")
    for _ in range(3000):
        bits, rank, width = int(dice.choice([4, 8])), int(dice.integers(1, 40)), int(dice.integers(1, 60))
        lengths = [int(one) for one in dice.integers(1, 30, int(dice.integers(1, 6)))]
        codec = LowRank(Identity(), rank=rank, bits=bits)
        needed = sum(codec.expected_bytes(rows, width, torch.float32, 1) for rows in lengths)
        assert needed <= codec.payload_bytes(sum(lengths), width, torch.float32) - 4 * sum(lengths) * width


def test_random_bytes_never_raise_anything_but_codec_errors() -> None:
    codec, samples = LowRank(rank=3), Samples((1, 2), (2, 3))
    first, _, state = send(codec, rows_of(5), samples, codec.init())
    later, _, _ = send(codec, rows_of(5, 1), samples, state)
    dice, good = numpy_stream(1, "lowrank-bytes"), 0
    for turn in range(2000):
        payload = bytearray((first, later)[turn % 2].payload if turn % 5 else dice.bytes(int(dice.integers(0, 90))))
        for _ in range(turn % 4):
            if payload:
                payload[int(dice.integers(len(payload)))] ^= 1 << int(dice.integers(8))
        end = len(payload) if turn % 3 else int(dice.integers(len(payload) + 1))
        try:
            rows, _ = codec.decode(replace(first, payload=bytes(payload[:end])), (codec.init(), state)[turn % 2], samples)
        except CodecError:
            continue
        good += 1
        assert rows.shape == (5, WIDTH)
        assert bool(torch.isfinite(rows).all())
    assert good > 100
    for end in range(len(later.payload)):
        with pytest.raises(CodecError):
            codec.decode(replace(later, payload=bytes(later.payload[:end])), state, samples)


def test_what_cannot_be_is_refused_by_name() -> None:
    samples, codec = Samples((1,), (2,)), LowRank()
    packet, _, state = send(codec, rows_of(2), samples, codec.init())
    for payload, words in (
        (b"\3" + bytes(75), "ranks"),
        (b"\2" + bytes(20), "too short"),
        (b"\1" + bytes(25), "not positive"),
        (b"\0\0", "at most 0"),
    ):
        with pytest.raises(CodecError, match=words):
            codec.decode(replace(packet, payload=payload), state, samples)
    with pytest.raises(CodecError, match="NaN"):
        codec.encode(torch.full((2, WIDTH), float("nan")), state, torch_stream(0, "n"), samples)


def test_the_dial() -> None:
    assert LowRank(rank=16).scaled(2.0) == LowRank(rank=8)
    assert LowRank(rank=16).scaled(1000.0) == LowRank(rank=1)
    assert LowRank(rank=16).scaled(0.001) == LowRank(rank=255)
    assert LowRank(energy=0.96).scaled(0.5).energy == pytest.approx(0.99)  # type: ignore[attr-defined]
    assert LowRank(energy=0.96).scaled(100.0).energy > 0  # type: ignore[attr-defined]


@pytest.mark.parametrize("fields", [{"rank": -1}, {"rank": 256}, {"energy": 1.1}, {"bits": 2}, {"bits": True}, {"cache_mb": "x"}])
def test_wrong_fields_are_named(fields: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(fields))):
        LowRank(**fields)  # type: ignore[arg-type]


def test_an_inner_codec_whose_ends_differ_is_refused() -> None:
    with pytest.raises(ConfigError, match="temporal"):
        LowRank(Temporal())


def test_without_a_rank_of_its_own_it_follows_the_adapters() -> None:
    """As SplitLite has it: twice the adapters' rank for activations, four times for gradients, inside other codecs too."""
    codec = {"name": "entropy", "inner": {"name": "lowrank"}}
    built = build_components(parse_config({"lora": {"rank": 5}, "uplink": codec, "downlink": "lowrank", "split": {"labels": "client"}}))
    assert (built.uplink.inner.rank, built.downlink.rank) == (10, 20)
    assert (built.exit_downlink.inner.rank, built.exit_uplink.rank) == (10, 20)
    fixed = build_components(parse_config({"uplink": {"name": "lowrank", "rank": 3}}))
    assert fixed.uplink.rank == 3
