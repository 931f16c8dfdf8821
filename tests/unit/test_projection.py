"""Coordinates of a basis of their own: the basis travels once, is invertible, finds the axes that matter, and refuses what cannot be."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import torch

from splitft.compress.base import Packet, Samples
from splitft.compress.cast import Cast
from splitft.compress.coding import encode_codes
from splitft.compress.error_bounded import ErrorBounded
from splitft.compress.projection import HEAD, Basis, Projection, _drawn
from splitft.errors import CodecError, ConfigError
from splitft.rng import torch_stream

PLAIN = Projection(inner=Cast("float32"))


def rows_near_axes(count: int, width: int, seed: int = 1) -> torch.Tensor:
    """Rows of which 4 of `width` directions carry nearly everything."""
    generator = torch_stream(seed, "projection-test")
    turned = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q
    sizes = torch.full((width,), 0.01)
    sizes[:4] = 1.0
    rows: torch.Tensor = (torch.randn(count, width, generator=generator) * sizes) @ turned
    return rows


def test_nothing_is_lost_but_by_the_codec_inside_and_the_basis_travels_once() -> None:
    rows = rows_near_axes(64, 32)
    packet, sender = PLAIN.encode(rows, PLAIN.init())
    decoded, receiver = PLAIN.decode(packet, PLAIN.init())
    assert torch.allclose(decoded, rows, atol=1e-5)
    second, _ = PLAIN.encode(rows, sender)
    assert len(second.payload) == HEAD.size + 4 * 64 * 32
    assert len(packet.payload) > len(second.payload) + 100
    assert torch.allclose(PLAIN.decode(second, receiver)[0], rows, atol=1e-5)


def test_a_few_coordinates_carry_what_lies_near_a_few_axes() -> None:
    rows = rows_near_axes(64, 32)
    few, drawn = (Projection(inner=Cast("float32"), basis=basis, dimensions=4) for basis in ("learned", "random"))
    lost = [
        float((codec.decode(codec.encode(rows, codec.init())[0], codec.init())[0] - rows).square().sum() / rows.square().sum())
        for codec in (few, drawn)
    ]
    assert lost[0] < 0.01
    assert lost[1] > 0.5


def test_at_the_same_error_coordinates_take_fewer_bytes() -> None:
    rows = rows_near_axes(256, 64)
    plain, turned = ErrorBounded(0.05), Projection(inner=ErrorBounded(0.05))
    _, state = turned.encode(rows, turned.init())
    assert len(turned.encode(rows, state)[0].payload) < 0.6 * len(plain.encode(rows, None)[0].payload)


def test_random_axes_are_independent_whatever_the_shape() -> None:
    """Rows of signs may be equal or opposite; then they are drawn anew, at both ends alike."""
    for width in range(1, 30):
        for count in range(1, width + 1):
            basis = _drawn(width, count)
            assert torch.allclose(basis.backward @ basis.forward, torch.eye(count), atol=1e-4)


@pytest.mark.parametrize("basis", ["learned", "random"])
def test_a_stream_may_change_its_width(basis: str) -> None:
    codec = Projection(inner=Cast("float32"), basis=basis)  # type: ignore[arg-type]
    sender, receiver = codec.init(), codec.init()
    for width in (8, 16, 8, 1):
        packet, sender = codec.encode(rows_near_axes(20, width) if width > 4 else torch.ones(2, width), sender)
        decoded, receiver = codec.decode(packet, receiver)
        assert decoded.shape == packet.shape


@pytest.mark.parametrize("rows", [torch.zeros(4, 8), torch.full((4, 8), 3.3e38), torch.full((4, 8), 1e-44), torch.eye(8) * 3e38], ids=str)
def test_rows_at_the_ends_of_the_range_arrive_finite(rows: torch.Tensor) -> None:
    for codec in (Projection(inner=Cast()), Projection(inner=Cast(), basis="random"), Projection()):
        samples = Samples((1,), (len(rows),))
        decoded, _ = codec.decode(codec.encode(rows, codec.init(), None, samples)[0], codec.init(), samples)
        assert bool(torch.isfinite(decoded).all())
        if not rows.any():
            assert not decoded.any()


def test_coordinates_before_their_basis_are_refused() -> None:
    rows = rows_near_axes(8, 8)
    _, sender = PLAIN.encode(rows, PLAIN.init())
    packet, _ = PLAIN.encode(rows, sender)
    with pytest.raises(CodecError, match="before their basis"):
        PLAIN.decode(packet, PLAIN.init())


def test_a_basis_that_cannot_be_inverted_is_refused() -> None:
    for codes in (np.zeros((4, 4), np.int32), np.ones((4, 4), np.int32)):
        data = encode_codes(codes)
        with pytest.raises(CodecError, match="inverted"):
            PLAIN.decode(Packet(12, torch.float32, (1, 4), HEAD.pack(1, len(data)) + data + bytes(16)), PLAIN.init())


@pytest.mark.parametrize(
    "head", [struct.pack("<BI", 2, 0), struct.pack("<BI", 0, 5), struct.pack("<BI", 1, 0), struct.pack("<BI", 1, 2**31)]
)
def test_heads_that_lie_are_refused(head: bytes) -> None:
    with pytest.raises(CodecError, match="basis"):
        PLAIN.decode(Packet(12, torch.float32, (1, 4), head + bytes(40)), PLAIN.init())


def test_a_restart_keeps_the_basis() -> None:
    rows = rows_near_axes(32, 12)
    _, sender = PLAIN.encode(rows, PLAIN.init())
    again = PLAIN.restore(PLAIN.flatten(sender))
    assert bytes(PLAIN.encode(rows, sender)[0].payload) == bytes(PLAIN.encode(rows, again)[0].payload)


def test_a_model_too_wide_is_refused_before_any_work() -> None:
    with pytest.raises(CodecError, match="8192"):
        PLAIN.encode(torch.zeros(1, 8193), PLAIN.init())
    with pytest.raises(ConfigError, match="2 wrong fields"):
        Projection(basis="x", dimensions=-1)  # type: ignore[arg-type]


def test_a_basis_that_is_known_already_is_refused_before_it_is_worked_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inverting one takes d^3 operations: a client must not be able to ask for that with every packet."""
    rows = rows_near_axes(16, 12)
    first, sender = PLAIN.encode(rows, PLAIN.init())
    _, receiver = PLAIN.decode(first, PLAIN.init())
    again = PLAIN.restore(PLAIN.flatten(receiver))
    second, _ = PLAIN.encode(rows, PLAIN.restore(PLAIN.flatten(sender)))
    for state in (receiver, again):
        assert torch.equal(PLAIN.decode(second, state)[0], PLAIN.decode(first, PLAIN.init())[0]), "after a restart none is sent or missed"
        with monkeypatch.context() as patched:
            patched.setattr("splitft.compress.projection.decode_codes", None)
            with pytest.raises(CodecError, match="a second basis for 12 channels"):
                PLAIN.decode(first, state)
    narrow, _ = PLAIN.encode(rows[:, :6], sender)
    assert PLAIN.decode(narrow, again)[0].shape == (16, 6), "another width has another basis"


@pytest.mark.parametrize(("basis", "dimensions"), [("learned", 0), ("learned", 5), ("random", 0), ("random", 5), ("random", 32)])
def test_facts_are_those_of_the_rows(basis: Basis, dimensions: int) -> None:
    codec, rows = Projection(ErrorBounded(0.1), basis, dimensions), rows_near_axes(64, 32) + 0.3
    packet, _ = codec.encode(rows, codec.init())
    decoded, _ = codec.decode(packet, codec.init())
    squared, error = float(rows.double().square().sum()), float((rows.double() - decoded.double()).square().sum())
    if (basis, dimensions) == ("learned", 0):
        assert packet.facts["squared"] == pytest.approx(squared, rel=0.03), "orthogonal but for its rounding"
        assert packet.facts["squared_error"] == pytest.approx(error, rel=0.03)
    else:
        assert packet.facts["squared"] == pytest.approx(squared, rel=1e-12)
        assert "squared_error" not in packet.facts, "that of coordinates is another one"
    assert packet.facts["stage_basis_bytes"] >= HEAD.size
