"""Every decoder of the catalogue, and codecs over codecs, under damaged and hostile bytes: a CodecError or finite rows of the claimed
shape, never another exception, and no more memory than the shape it claims is worth."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from splitft.compress.base import Codec, Packet, Samples, State
from splitft.compress.coding import decode_codes
from splitft.errors import CodecError
from splitft.rng import numpy_stream

from ..contract.codec_scenes import decode, draw, encode, sample, samples_for, turns
from ..contract.variants import ALL_CODEC_VARIANTS, CODEC_VARIANTS, Variant

BUILT: dict[str, Codec] = {repr(variant): variant.build() for variant in ALL_CODEC_VARIANTS}
every_codec = pytest.mark.parametrize("codec", BUILT.values(), ids=BUILT.keys())
TAME = ("normal", "drift", "same", "zero")


def attempt(codec: Codec, packet: Packet, state: State, samples: Samples) -> bool:
    """Whether a packet is taken; then it is finite rows of its shape. Anything but a CodecError fails the test, panics of Rust included."""
    try:
        found, after = codec.decode(packet, state, samples)
    except CodecError:
        return False
    assert found.shape == packet.shape
    assert found.dtype == packet.dtype
    assert bool(torch.isfinite(found).all())
    codec.flatten(after)
    return True


def damaged(good: bytes, choice: np.random.Generator) -> bytes:
    """A payload with some bits turned, or cut, or longer, or with a part exchanged, or nothing like it."""
    body = bytearray(good)
    match int(choice.integers(6)):
        case 0:
            for _ in range(int(choice.integers(1, 4))):
                if body:
                    body[int(choice.integers(len(body)))] ^= 1 << int(choice.integers(8))
        case 1:
            del body[int(choice.integers(len(body) + 1)) :]
        case 2:
            body += choice.bytes(int(choice.integers(1, 9)))
        case 3:
            start = int(choice.integers(len(body) + 1))
            body[start : start + 4] = choice.bytes(4)
        case 4:
            body = bytearray(choice.bytes(len(body)))
        case _:
            start = int(choice.integers(len(body) + 1))
            body[start:] = bytes([int(choice.choice([0, 1, 0x7F, 0x80, 0xFF]))]) * (len(body) - start)
    return bytes(body)


@every_codec
def test_damaged_packets_are_refused_or_read_as_finite_rows(codec: Codec) -> None:
    """At a state that has seen nothing and at one that knows the samples; shapes, types and samples may lie too."""
    choice = numpy_stream(1, "fuzz")
    sender, receiver = codec.init(), codec.init()
    for turn, now in enumerate(turns(8, 4, 1, 6, torch.float32, 3, TAME)):
        told = now.samples[0]
        packet, sender = codec.encode(now.rows, sender, draw(codec, turn), told)
        for _ in range(20):
            shape = packet.shape if choice.random() < 0.7 else (int(choice.integers(1, 9)), int(choice.integers(1, 9)))
            dtype = packet.dtype if choice.random() < 0.8 else torch.float16
            given_samples = told if shape[0] == packet.shape[0] else samples_for(shape[0])
            state = receiver if choice.random() < 0.7 else codec.init()
            attempt(codec, Packet(codec.number, dtype, shape, damaged(bytes(packet.payload), choice)), state, given_samples)
        _, receiver = codec.decode(packet, receiver, told)


@every_codec
def test_every_truncation_is_refused(codec: Codec) -> None:
    packet = encode(codec, sample((5, 8)))
    body = bytes(packet.payload)
    for end in range(len(body)):
        taken = attempt(codec, Packet(codec.number, packet.dtype, packet.shape, body[:end]), codec.init(), samples_for(5))
        # Entropy coded numbers may mean something without their last words; no other bytes may be missing.
        assert not taken or "ErrorBounded" in repr(codec), end


@every_codec
def test_payloads_of_other_codecs_are_refused_or_read_as_finite_rows(codec: Codec) -> None:
    for variant in CODEC_VARIANTS:
        packet = encode(variant.build(), sample((5, 8)))
        attempt(codec, Packet(codec.number, packet.dtype, packet.shape, packet.payload), codec.init(), samples_for(5))


@pytest.mark.parametrize("codec", [variant.build() for variant in CODEC_VARIANTS], ids=[repr(variant) for variant in CODEC_VARIANTS])
@settings(max_examples=40)
@given(payload=st.binary(max_size=200), count=st.integers(1, 6), width=st.integers(1, 9))
def test_any_bytes_at_all(codec: Codec, payload: bytes, count: int, width: int) -> None:
    attempt(codec, Packet(codec.number, torch.bfloat16, (count, width), payload), codec.init(), samples_for(count))


@settings(max_examples=300)
@given(words=st.lists(st.integers(0, 2**32 - 1), max_size=12), head=st.integers(0, 2), rows=st.integers(1, 20), columns=st.integers(1, 9))
def test_any_words_of_the_entropy_coder(words: list[int], head: int, rows: int, columns: int) -> None:
    data = bytes([head]) + np.array(words, "<u4").tobytes()
    try:
        codes = decode_codes(data, rows, columns)
    except CodecError:
        return
    assert codes.shape == (rows, columns)


def test_thousands_of_seeded_words_of_the_entropy_coder() -> None:
    choice, taken = numpy_stream(2, "fuzz-words"), 0
    for _ in range(4000):
        data = bytes([int(choice.integers(2))]) + choice.bytes(4 * int(choice.integers(0, 9)))
        try:
            taken += decode_codes(data, int(choice.integers(1, 12)), int(choice.integers(1, 12))).size > 0
        except CodecError:
            continue


def peak_mebibytes() -> float:
    """Most memory this process has held since `reset_peak`."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1024


@pytest.fixture
def peak() -> float:
    """Memory held at the start, from which the peak counts."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pytest.skip("the peak of a process's memory can be reset on Linux alone")
    return peak_mebibytes()


LIES = [
    b"",
    bytes(1),
    bytes(5),
    bytes(64),
    b"\x01" + bytes(64),
    b"\xff" * 100,
    bytes(9) + b"\x01" * 90,
    b"\x01\x00\x00\x00\x00" + bytes(40),
]


@every_codec
def test_a_shape_that_lies_takes_no_more_than_a_few_times_its_own_memory(codec: Codec, peak: float) -> None:
    """4 MiB of float32 are claimed with next to no payload; what few bytes can mean (all zeros, or nothing new) may be made."""
    for shape in ((2**13, 128), (2**20, 1)):
        samples = Samples((1,), (shape[0],))
        for payload in LIES:
            attempt(codec, Packet(codec.number, torch.float32, shape, payload), codec.init(), samples)
    assert peak_mebibytes() - peak < 8 * 4 + 8


@pytest.mark.parametrize("variant", [variant for variant in CODEC_VARIANTS if variant.name != "projection"], ids=repr)
def test_a_wide_row_of_few_bytes_takes_little(variant: Variant, peak: float) -> None:
    """A projection is left out: its basis has as many numbers as the square of the channels."""
    codec: Codec = variant.build()
    for payload in LIES:
        attempt(codec, Packet(codec.number, torch.bfloat16, (1, 2**20), payload), codec.init(), Samples((1,), (1,)))
    assert peak_mebibytes() - peak < 8 * 4 + 8


@every_codec
def test_one_bad_packet_of_a_cohort_spoils_no_state(codec: Codec) -> None:
    """The refusal leaves the states as they were: the good packets can be decoded afterwards."""
    rows, counts = sample((9, 6)), [4, 2, 3]
    told = [samples_for(count) for count in counts]
    packets, _ = codec.encode_batch(rows, counts, [codec.init()] * 3, [draw(codec, k) for k in range(3)], told)
    states = [codec.init() for _ in counts]
    expected = [codec.decode(packet, codec.init(), one)[0] for packet, one in zip(packets, told, strict=True)]
    bad = Packet(codec.number, packets[1].dtype, packets[1].shape, b"")
    with pytest.raises(CodecError):
        codec.decode_batch([packets[0], bad, packets[2]], states, samples=told)
    for packet, state, one, found in zip(packets, states, told, expected, strict=True):
        assert torch.equal(codec.decode(packet, state, one)[0], found)
    assert decode(codec, packets[0]).shape == (4, 6)
