"""compress/positions.py: by hand, at the cheaper of two sizes, and every other pattern of bytes is refused."""

from __future__ import annotations

from itertools import combinations, product

import pytest
import torch

from splitft.compress.positions import kept_channels, pack_positions, position_bytes, require_share, scaled_share, unpack_positions
from splitft.errors import CodecError, ConfigError


def test_a_bit_for_each_channel_by_hand() -> None:
    packed = pack_positions(torch.tensor([[0, 3, 9], [7, 8, 11]]), 12)
    assert packed.tolist() == [[0b00001001, 0b0010], [0b10000000, 0b1001]]


def test_numbers_of_as_many_bits_as_the_width_needs_by_hand() -> None:
    packed = pack_positions(torch.tensor([[5, 37]]), 48)
    assert position_bytes(48, 2) == 2, "two numbers of six bits, less than six bytes of bitmap"
    assert packed.tolist() == [[(5 | 37 << 6) & 255, 37 >> 2]]


@pytest.mark.parametrize("width", [1, 2, 3, 8, 9, 16, 17, 100, 768, 4096])
def test_the_size_is_the_cheaper_one_and_what_was_packed_comes_back(width: int) -> None:
    for kept in {1, 2, width // 50, width // 10, width // 3, width - 1, width} - {0}:
        if kept > width:
            continue
        noise = torch.rand(5, width, generator=torch.Generator().manual_seed(width))
        channels = noise.argsort(1)[:, :kept].sort(1).values
        packed = pack_positions(channels, width)
        bits = max(1, (width - 1).bit_length())
        assert packed.shape == (5, 0 if kept == width else min(-(-width // 8), -(-kept * bits // 8)))
        assert packed.shape[1] == position_bytes(width, kept)
        assert torch.equal(unpack_positions(packed.numpy().tobytes(), 5, width, kept), channels)


@pytest.mark.parametrize(("width", "kept"), [(5, 2), (8, 3), (10, 1), (12, 1), (17, 2)])
def test_of_all_bytes_only_those_of_a_choice_are_read(width: int, kept: int) -> None:
    size = position_bytes(width, kept)
    sound = {pack_positions(torch.tensor([chosen]), width).numpy().tobytes(): [*chosen] for chosen in combinations(range(width), kept)}
    assert len(sound) == len({*combinations(range(width), kept)}), "different choices have different bytes"
    for pattern in product(range(256), repeat=size):
        data = bytes(pattern)
        if data in sound:
            assert unpack_positions(data, 1, width, kept).tolist() == [sound[data]]
        else:
            with pytest.raises(CodecError, match="positions"):
                unpack_positions(data, 1, width, kept)


def test_a_wrong_length_is_refused() -> None:
    for size in (0, 1, 3):
        with pytest.raises(CodecError, match="positions"):
            unpack_positions(bytes(size), 1, 12, 3)


def test_shares() -> None:
    assert [kept_channels(share, 768) for share in (0.1, 1.0, 1e-9, 0.5)] == [77, 768, 1, 384]
    assert scaled_share(0.1, 2.0) == 0.05
    assert scaled_share(0.1, 0.01) == 1.0
    assert scaled_share(0.1, float("inf")) > 0.0
    for wrong in (0.0, -0.1, 1.01, float("nan"), True, "0.1"):
        with pytest.raises(ConfigError, match="share"):
            require_share(wrong, "topk")  # type: ignore[arg-type]
