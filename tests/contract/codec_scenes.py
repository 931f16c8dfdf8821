"""What the tests of codecs send: rows of every kind, samples that come again, and how both ends' states are compared."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from splitft.compress.base import Codec, Packet, Samples, State, as_rows
from splitft.rng import numpy_stream, torch_stream

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HALF_MAX = 65280.0  # the largest number that float16 and bfloat16 have both
KINDS = ("normal", "drift", "same", "zero", "constant", "outlier", "subnormal", "huge", "flipped")


def sample(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Values over six orders of magnitude and both signs, all of them normal numbers in every type."""
    generator = torch_stream(seed, "codec-sample")
    exponent = torch.randint(-10, 11, shape, generator=generator)
    sign = torch.randint(0, 2, shape, generator=generator) * 2 - 1
    return (sign * (1.0 + torch.rand(shape, generator=generator)) * 2.0**exponent).to(dtype)


def draw(codec: Codec, index: int = 0) -> torch.Generator | None:
    """What `encode` is given: a new generator for a codec that draws, the same for the same index."""
    return torch_stream(7, "codec-contract", index) if codec.draws else None


def samples_for(count: int, first: int = 0) -> Samples:
    """So many rows as samples of 2, 1 and 3 rows in turn."""
    rows: list[int] = []
    while sum(rows) < count:
        rows.append(min((2, 1, 3)[len(rows) % 3], count - sum(rows)))
    return Samples(tuple(range(first, first + len(rows))), tuple(rows))


def encode(codec: Codec, tensor: torch.Tensor, state: State | None = None, index: int = 0) -> Packet:
    """The packet of a tensor; where samples are wanted its rows are those of `samples_for`."""
    samples = samples_for(as_rows(tensor.shape)[0])
    return codec.encode(tensor, codec.init() if state is None else state, draw(codec, index), samples)[0]


def decode(codec: Codec, packet: Packet, state: State | None = None) -> torch.Tensor:
    """What arrives, after real bytes: header and payload are joined and parsed again."""
    data = packet.header() + bytes(packet.payload)
    assert len(data) == packet.size_bytes
    parsed, rest = Packet.parse(memoryview(data))
    assert len(rest) == 0
    samples = samples_for(as_rows(packet.shape)[0])
    return codec.decode(parsed, codec.init() if state is None else state, samples)[0]


def through(codec: Codec, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor after real bytes."""
    return decode(codec, encode(codec, tensor))


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal in type, shape and every bit."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(one.contiguous().reshape(-1).view(torch.uint8), other.contiguous().reshape(-1).view(torch.uint8))


def same_state(codec: Codec, one: State, other: State) -> bool:
    """Whether two states are the same to the bit, in the order of what they hold too."""
    found, expected = codec.flatten(one), codec.flatten(other)
    return found.keys() == expected.keys() and all(same_bits(found[name], expected[name]) for name in found)


def held(codec: Codec, state: State) -> list[list[list[int]]]:
    """Which samples a state holds (id, rows, channels), in the order of use, of each of its caches; caches and their ledgers look alike."""
    names = {"samples", "noted"}
    return [tensor.tolist() for name, tensor in codec.flatten(state).items() if name.rsplit(".", 1)[-1] in names]


def frozen(codec: Codec, state: State) -> dict[str, torch.Tensor]:
    """A state as it is now, in memory of its own."""
    return {name: tensor.clone() for name, tensor in codec.flatten(state).items()}


@dataclass(frozen=True)
class Turn:
    """What the packets of a cohort hold: rows, how many of each, whose."""

    rows: torch.Tensor
    counts: list[int]
    samples: list[Samples]


def rows_of_kind(kind: str, one: int, rows: int, width: int, turn: int) -> torch.Tensor:
    """Rows of a sample at a turn, float32: each sample has a base that is its own and changes slowly or not at all."""
    base = torch.randn((rows, width), generator=torch_stream(one, "scene-base"))
    other = torch.randn((rows, width), generator=torch_stream(one, "scene-other", turn))
    if kind == "outlier":
        base[:, one % width] *= 1000.0
    made = {
        "drift": base + 0.02 * (turn % 7) * other,
        "same": base,
        "zero": 0.0 * base,
        "constant": torch.full_like(base, -3.7),
        "outlier": base,
        "subnormal": 1e-41 * other,
        "huge": 3e38 * base.sign(),
        "flipped": -3e38 * base.sign(),
    }
    return made.get(kind, other)


def turns(
    seed: int, count: int, clients: int, width: int, dtype: torch.dtype, ids: int = 9, kinds: Sequence[str] = KINDS
) -> Iterator[Turn]:
    """Turns of a cohort whose samples (of 1 to 4 rows) come again, some twice in a packet; some packets are empty."""
    choice, most = numpy_stream(seed, "scene-turns"), min(HALF_MAX, torch.finfo(dtype).max) if dtype == torch.float16 else math.inf
    for turn in range(count):
        picked = [[int(one) for one in choice.integers(0, ids, choice.integers(0 if clients > 1 else 1, 5))] for _ in range(clients)]
        samples = [Samples(tuple(chosen), tuple(1 + one % 4 for one in chosen)) for chosen in picked]
        parts = [
            rows_of_kind(str(choice.choice(kinds)), one, 1 + one % 4, width, turn).clamp(-most, most) for chosen in picked for one in chosen
        ]
        rows = torch.cat(parts) if parts else torch.empty(0, width)
        limit = torch.finfo(dtype).max
        yield Turn(rows.clamp(-limit, limit).to(dtype), [sum(one.rows) for one in samples], samples)
