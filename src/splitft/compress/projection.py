"""Send the coordinates of every row in a basis of its own: all of them, where a few carry nearly everything, or only those few.

The payload of a packet: u8 whether the basis comes first | u32 its length and its bytes | payload of the codec inside, over [q k].

Axes: q rows (tokens), d channels, k coordinates.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from splitft.compress.base import Codec, Facts, Packed, Parts, Payload, State, require_finite
from splitft.compress.bits import BF16_MAX
from splitft.compress.coding import decode_codes, encode_codes, most_code_bytes
from splitft.compress.positions import ENERGIES
from splitft.compress.residual import Residual, require_room
from splitft.compress.wrapper import Nested, Wrapper, on_cpu
from splitft.errors import CodecError, ConfigError
from splitft.rng import torch_stream

Basis = Literal["learned", "random"]
HEAD = struct.Struct("<BI")
# Entries of an orthonormal basis are of size 1 / sqrt(d); these are its steps for each such size. The rows are sent in the basis as it is
# after rounding, whose inverse is exact, so that the steps only cost a little of its aim.
BASIS_STEPS = 8.0
LARGEST_WIDTH = 8192


@dataclass(frozen=True)
class _Known:
    """A basis as both ends have it: whole numbers [k d], what they are multiples of, the rows of the basis [k d] and what gives
    coordinates [d k]."""

    codes: Tensor
    forward: Tensor
    backward: Tensor


@dataclass(frozen=True)
class Projection(Wrapper):
    """Turn every row into coordinates of an orthogonal basis [k d] and send those through `inner`; a bottleneck where k is less than d.

    `basis = "learned"`: the principal axes of the first packet's rows (Karhunen-Loeve), which the sender works out, rounds and sends once.
    Hidden states lie close to a few axes, so an error-bounded codec inside needs about one bit a value less for the same error; gradients
    about a third of a bit. `"random"`: axes of random signs that both ends draw from a fixed seed, after the bottleneck of PrivateLoRA,
    which learns its own by gradient descent. `dimensions`: how many coordinates are sent; 0: all of a learned basis, so that nothing is
    lost but by the codec inside, and a quarter of a random one. Working out the axes takes d^3 operations, once for each client and
    tensor: 10 ms at 256 channels, seconds at 4,096.
    """

    number: ClassVar[int] = 12
    references: ClassVar[tuple[str, ...]] = ("2311.14030",)
    inner: Codec = field(default_factory=Residual)
    basis: Basis = "learned"
    dimensions: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        wrong = {
            f"basis is {self.basis!r}; allowed are {', '.join(get_args(Basis))}": self.basis not in get_args(Basis),
            f"dimensions is {self.dimensions!r}; allowed are whole numbers from 0": type(self.dimensions) is not int or self.dimensions < 0,
        }
        if found := tuple(problem for problem, is_wrong in wrong.items() if is_wrong):
            raise ConfigError(f"projection has {len(found)} wrong field{'s' if len(found) > 1 else ''}.", "see docs/methods.md.", found)

    def flatten_own(self, own: Any) -> dict[str, Tensor]:
        return {} if own is None or self.basis == "random" else {"basis": own.codes}

    def restore_own(self, tensors: Mapping[str, Tensor]) -> Any:
        return _known(tensors["basis"]) if "basis" in tensors else None

    def payload_bytes(self, count: int, width: int, dtype: torch.dtype) -> int:
        return HEAD.size + self._basis_bytes(width) + self.inner.payload_bytes(count, self._coordinates(width), torch.float32)

    def expected_bytes(self, count: int, width: int, dtype: torch.dtype, visit: int = 0, samples: int = 1) -> float:
        # About one bit a value less than without, which is what principal axes were measured to save on hidden states.
        inner = self.inner.expected_bytes(count, self._coordinates(width), torch.float32, visit, samples)
        return HEAD.size + (max(0.35 * inner, inner - count * width / 8) if self.basis == "learned" else inner)

    def pack_rows(self, rows: Tensor, parts: Parts) -> Packed:
        require_finite(rows, "tensor to project")
        wide, width = on_cpu(rows), rows.shape[1]
        _require_width(width)
        heads, known, coordinates = [], [], []
        for part, state in zip(torch.split(wide, list(parts.counts)), parts.states, strict=True):
            head, basis = self._begin(state.own, part)
            heads.append(head)
            known.append(basis)
            coordinates.append(_product(part, basis.forward))  # by itself, so that a packet rounds alike alone and among others
        inside = parts.inside([state.inner for state in parts.states])
        packed = self.inner.pack_rows(torch.cat(coordinates), inside)
        payloads: list[Payload] = [head + payload for head, payload in zip(heads, packed.payloads, strict=True)]
        split = torch.split(wide, list(parts.counts))
        facts = [
            {**self._facts(fact, part), "stage_basis_bytes": float(len(head))}
            for fact, part, head in zip(packed.facts, split, heads, strict=True)
        ]
        return Packed(payloads, [Nested(one, inner) for one, inner in zip(known, packed.states, strict=True)], facts)

    def unpack_rows(
        self, payloads: Sequence[Payload], parts: Parts, width: int, dtype: torch.dtype, device: torch.device
    ) -> tuple[Tensor, list[State]]:
        _require_width(width)
        count_of, bodies, known = self._coordinates(width), [], []
        for payload, state, count in zip(payloads, parts.states, parts.counts, strict=True):
            basis, body = self._read(payload, state.own, width)
            require_room(body, self.inner, count, count_of)
            known.append(basis)
            bodies.append(body)
        inside = parts.inside([state.inner for state in parts.states])
        rows, inner = self.inner.unpack_rows(bodies, inside, count_of, torch.float32, torch.device("cpu"))
        limit = torch.finfo(dtype).max
        decoded = [_product(part, basis.backward) for part, basis in zip(torch.split(rows, list(parts.counts)), known, strict=True)]
        whole = torch.cat(decoded).clamp_(-limit, limit)
        require_finite(whole, "received coordinates")
        return whole.to(device, dtype), [Nested(one, within) for one, within in zip(known, inner, strict=True)]

    def _facts(self, inner: Facts, rows: Tensor) -> Facts:
        """What is known of a packet's rows [q d] from what is known of their coordinates.

        All coordinates of a learned basis have very nearly the energy of the rows, and their errors that of the rows' errors: but for its
        rounding it is orthogonal. Of fewer, or of random axes, this is not so: the rows' energy is taken of the rows, and no error is
        told. What is said of samples that are known inside (`known_squared`, `residual_squared`) stays that of coordinates.
        """
        if "squared" not in inner or (self.basis == "learned" and self._coordinates(rows.shape[1]) == rows.shape[1]):
            return inner
        kept = {name: value for name, value in inner.items() if name not in ENERGIES}
        return {**kept, "squared": float(rows.double().square().sum())}

    def _begin(self, own: _Known | None, rows: Tensor) -> tuple[bytes, _Known]:
        """What a payload begins with, and the basis to use: a new one with the first packet."""
        if own is not None and own.codes.shape[1] == rows.shape[1]:
            return HEAD.pack(0, 0), own
        if self.basis == "random":
            return HEAD.pack(0, 0), _drawn(rows.shape[1], self._coordinates(rows.shape[1]))
        basis = _known(_principal_axes(rows, self._coordinates(rows.shape[1])))
        data = encode_codes(np.ascontiguousarray(basis.codes.numpy()))
        return HEAD.pack(1, len(data)) + data, basis

    def _read(self, payload: Payload, own: _Known | None, width: int) -> tuple[_Known, memoryview]:
        """The basis of a payload, or the one that is known, and what follows it."""
        data = memoryview(payload)
        if len(data) < HEAD.size:
            raise CodecError(f"payload of {len(data)} bytes is too short for a projection.", "the message is damaged.")
        comes, size = HEAD.unpack(data[: HEAD.size])
        body = data[HEAD.size :]
        if comes > 1 or size > len(body) or (size > 0) != (comes == 1) or (comes and self.basis == "random"):
            raise CodecError(f"a basis of {size} bytes (flag {comes}) in a payload of {len(data)}.", "the message is damaged.")
        if comes:
            if own is not None and own.codes.shape[1] == width:
                # Nobody sends it twice, and to work out its inverse takes d^3: a client could keep the server busy with it.
                raise CodecError(f"a second basis for {width} channels arrived.", "both ends must begin the stream together.")
            return _known(torch.from_numpy(decode_codes(body[:size], self._coordinates(width), width))), body[size:]
        if self.basis == "random":
            same = own is not None and own.codes.shape[1] == width
            return own if own is not None and same else _drawn(width, self._coordinates(width)), body
        if own is None:
            raise CodecError("coordinates arrived before their basis.", "both ends must begin the stream together.")
        if own.codes.shape[1] != width:
            raise CodecError(f"coordinates of {width} channels in a basis of {own.codes.shape[1]}.", "use the same model on both sides.")
        return own, body

    def _coordinates(self, width: int) -> int:
        return min(self.dimensions or (width if self.basis == "learned" else max(1, width // 4)), width)

    def _basis_bytes(self, width: int) -> int:
        return most_code_bytes(self._coordinates(width), width) if self.basis == "learned" else 0


def _product(rows: Tensor, matrix: Tensor) -> Tensor:
    """Rows [q d] times a matrix [d k], in float32; what is beyond bfloat16's range as its largest number, which any codec inside takes."""
    # A copy, since the last bits of a product may depend on where in memory its rows begin: alone or behind another packet's.
    found = rows.clone() @ matrix
    if float(found.abs().amax()) <= BF16_MAX:
        return found
    return (rows.double() @ matrix.double()).clamp_(-BF16_MAX, BF16_MAX).float()


def _require_width(width: int) -> None:
    if width > LARGEST_WIDTH:
        raise CodecError(f"a projection of {width} channels; at most {LARGEST_WIDTH} are worked out.", "use another codec for this model.")


def _principal_axes(rows: Tensor, count: int) -> Tensor:
    """The axes [k d] along which the rows [q d] are largest, as whole numbers of steps."""
    wide = rows.double()
    wide = wide / wide.abs().amax().clamp_min(1e-300)
    axes = torch.linalg.eigh(wide.T @ wide).eigenvectors.flip(1)[:, :count].T
    codes: Tensor = (axes * (BASIS_STEPS * math.sqrt(rows.shape[1]))).round_().to(torch.int32)
    return codes.contiguous()


def _known(codes: Tensor) -> _Known:
    """A basis from its whole numbers. Raises CodecError when they are none."""
    rows = codes.double() / (BASIS_STEPS * math.sqrt(codes.shape[1]))
    square = codes.shape[0] == codes.shape[1]
    inverse, fault = torch.linalg.inv_ex(rows if square else rows @ rows.T)
    forward = inverse if square else rows.T @ inverse
    sound = not int(fault) and bool(torch.isfinite(forward).all()) and float(forward.abs().amax()) <= 1e4
    # Of axes that depend on each other an inverse may come out too, which is none.
    if not sound or float((rows @ forward - torch.eye(len(rows), dtype=torch.float64)).abs().amax()) > 1e-6:
        raise CodecError("a received basis cannot be inverted: its axes depend on each other.", "the message is damaged.")
    return _Known(codes, forward.float(), rows.float())


def _drawn(width: int, count: int) -> _Known:
    """Random axes that follow from the shape alone: signs, so that every machine draws the same. Drawn anew until they are independent."""
    generator = torch_stream(0, "projection", width, count)
    while True:
        signs = torch.randint(0, 2, (count, width), generator=generator) * 2 - 1
        try:
            return _known((signs * int(BASIS_STEPS)).to(torch.int32))
        except CodecError:
            continue
