"""Send tensors as whole numbers of few bits, with a scale for every token, channel or block.

The payload of a packet of q rows and d channels, little endian:

    steps bf16 | middles bf16, unless symmetric | outlier channels i32 [k] | their values bf16 [q k] | codes [q ceil(d * bits / 8)]

Axes: q rows (tokens), n packets, d channels, k outlier channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from splitft.compress.base import from_bytes, join, require_finite, to_bytes
from splitft.compress.bits import SMALLEST_STEP, add_noise, bf16_nearest, bf16_steps, code_bytes, pack_codes, unpack_codes
from splitft.compress.groups import Groups, packet_extremes, packet_of_row
from splitft.compress.stateless import Payload, Stateless, as_rows, slices
from splitft.errors import CodecError, ConfigError

Per = Literal["token", "channel", "block"]
Rounding = Literal["nearest", "stochastic"]
BITS = (8, 4, 2)
# What float32's own roundings on the way may add, as a share of a step: codes of at most 128 steps have 16 binary places left.
SLACK_STEPS = 2.0**-14
# Of a result's type: largest relative error of rounding, and half the smallest step.
RESULT_ERRORS = {torch.bfloat16: (2.0**-8, 2.0**-134), torch.float16: (2.0**-11, 2.0**-25)}
FLOAT32_ERRORS = (2.0**-24, 2.0**-150)


@dataclass(frozen=True)
class Quantize(Stateless):
    """Round every value to one of 2^`bits` levels (8, 4 or 2), evenly spaced over the values of a token, channel or block of channels.

    Error: half a step (`rounding = "nearest"`), or below one step and none on average (`"stochastic"`, QSGD). A step is the group's
    largest magnitude over 127, 7 or 1 (`symmetric`: zero stays zero), else its range over 255, 15 or 3, and at most 2^-7 of that larger,
    since it travels in bfloat16. `per`: `token`; `block`, one for each `block` channels of a token, so that a large channel spoils only
    its block; `channel`, one for each channel of a packet. `outliers`: this share of the channels, those with the largest values,
    travels in bfloat16 beside, as in LLM.int8(): hidden states have a few channels far above the others. Stateless.
    """

    number: ClassVar[int] = 3
    references: ClassVar[tuple[str, ...]] = ("2208.07339", "1610.02132")
    bits: int = 8
    per: Per = "token"
    block: int = 64
    symmetric: bool = True
    rounding: Rounding = "nearest"
    outliers: float = 0.0

    def __post_init__(self) -> None:
        wrong = {
            f"bits is {self.bits!r}; allowed are 8, 4 and 2": type(self.bits) is not int or self.bits not in BITS,
            f"per is {self.per!r}; allowed are {', '.join(get_args(Per))}": self.per not in get_args(Per),
            f"block is {self.block!r}; allowed are whole numbers from 2": type(self.block) is not int or self.block < 2,
            f"symmetric is {self.symmetric!r}; allowed are true and false": type(self.symmetric) is not bool,
            f"rounding is {self.rounding!r}; allowed are {', '.join(get_args(Rounding))}": self.rounding not in get_args(Rounding),
            f"outliers is {self.outliers!r}; allowed is a share of the channels from 0 to 0.5": type(self.outliers) not in (int, float)
            or not 0.0 <= self.outliers <= 0.5,
        }
        if found := tuple(problem for problem, is_wrong in wrong.items() if is_wrong):
            raise ConfigError(f"quantize has {len(found)} wrong field{'s' if len(found) > 1 else ''}.", "see docs/methods.md.", found)

    @property
    def draws(self) -> bool:
        return self.rounding == "stochastic"

    def payload_bytes(self, count: int, width: int, dtype: torch.dtype) -> int:
        return sum(self._section_bytes(count, width))

    def pack(self, rows: Tensor, counts: Sequence[int], generators: Sequence[torch.Generator | None]) -> list[Payload]:
        wide, groups = rows.float(), self._groups(counts, rows.shape[1])
        require_finite(wide, "tensor to quantize")
        channels, values, wide = self._without_outliers(wide, counts)
        steps, middles = self._levels(wide, groups)
        codes = self._codes(wide, groups, steps, middles)
        codes = add_noise(codes, counts, generators).floor_() if self.draws else codes.round_()
        codes.clamp_(-(2.0 ** (self.bits - 1)), 2.0 ** (self.bits - 1) - 1)
        numbers = [steps.bfloat16(), *([] if self.symmetric else [middles.bfloat16()])]
        apart = [channels, values.bfloat16()] if self._outlier_channels(rows.shape[1]) else []
        sections = [to_bytes(part) for part in (*numbers, *apart, pack_codes(codes, self.bits))]
        sizes = [[size for size in self._section_bytes(count, rows.shape[1]) if size] for count in counts]
        pieces = [slices(data, [size[j] for size in sizes]) for j, data in enumerate(sections)]
        return [b"".join(parts) for parts in zip(*pieces, strict=True)]

    def unpack(self, payloads: Sequence[Payload], counts: Sequence[int], width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        total, groups, share = sum(counts), self._groups(counts, width), self._outlier_channels(width)
        pieces = [slices(memoryview(one), self._section_bytes(count, width)) for one, count in zip(payloads, counts, strict=True)]

        def section(position: int, kind: torch.dtype, shape: tuple[int, ...]) -> Tensor:
            part = from_bytes(join([piece[position] for piece in pieces]), kind, shape).to(device)
            if kind.is_floating_point:
                require_finite(part, "received scales or outliers")
            return part

        steps = section(0, torch.bfloat16, groups.shape).float()
        codes = unpack_codes(section(4, torch.uint8, (total, code_bytes(width, self.bits))), self.bits, width)
        grouped = groups.split(codes if self.symmetric else codes.add_(0.5)).mul_(groups.spread(steps))
        if not self.symmetric:
            grouped = grouped.add_(groups.spread(section(1, torch.bfloat16, groups.shape).float()))
        result = groups.merge(grouped)
        if share:
            channels = _of_rows(_checked(section(2, torch.int32, (len(counts), share)), width), counts)
            result.scatter_(1, channels, section(3, torch.bfloat16, (total, share)).float())
        # A level may lie beyond the largest number of the result's type; the value that was sent does not.
        limit = min(torch.finfo(dtype).max, torch.finfo(torch.float32).max)
        return result.clamp_(-limit, limit).to(dtype)

    def error_bound(self, tensor: Tensor) -> Tensor:
        count, width = as_rows(tensor.shape)
        if not count * width:
            return torch.zeros_like(tensor, dtype=torch.float64)
        wide, groups = tensor.detach().reshape(count, width).float(), self._groups([count], width)
        channels, _, rest = self._without_outliers(wide, [count])
        steps, _ = self._levels(rest, groups)
        grouped = groups.spread(steps.double()).expand(groups.split(rest).shape)
        bound = groups.merge(grouped) * ((1.0 if self.draws else 0.5) + SLACK_STEPS)
        relative, absolute = RESULT_ERRORS.get(tensor.dtype, FLOAT32_ERRORS)
        bound += relative * (wide.double().abs() + bound) + absolute
        if channels.numel():
            own = wide.double().abs() * RESULT_ERRORS[torch.bfloat16][0] + RESULT_ERRORS[torch.bfloat16][1]
            bound[:, channels[0].long()] = own[:, channels[0].long()]
        return bound.reshape(tensor.shape)

    def _groups(self, counts: Sequence[int], width: int) -> Groups:
        return Groups(tuple(counts), width, min(self.block, width) if self.per == "block" else width, self.per == "channel")

    def _outlier_channels(self, width: int) -> int:
        return math.ceil(self.outliers * width)

    def _section_bytes(self, count: int, width: int) -> tuple[int, int, int, int, int]:
        """Lengths of the parts of one packet's payload."""
        share, scales = self._outlier_channels(width), 2 * math.prod(self._groups([count], width).shape)
        return scales, 0 if self.symmetric else scales, 4 * share, 2 * count * share, count * code_bytes(width, self.bits)

    def _without_outliers(self, wide: Tensor, counts: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Each packet's channels of largest magnitude, ascending [n k], their values [q k], and the rows with zeros in their place."""
        share = self._outlier_channels(wide.shape[1])
        if not share:
            return wide.new_empty(0), wide.new_empty(0), wide
        # A stable sort, so that every machine chooses the same of two equal channels.
        lowest, highest = packet_extremes(wide, counts)
        order = torch.maximum(highest, -lowest).sort(dim=1, descending=True, stable=True).indices
        channels = order[:, :share].sort(dim=1).values
        places = _of_rows(channels, counts)
        return channels.int(), bf16_nearest(wide.gather(1, places)), wide.scatter(1, places, 0.0)

    def _levels(self, wide: Tensor, groups: Groups) -> tuple[Tensor, Tensor]:
        """Step and middle of each group, which bfloat16 holds exactly; no middles when symmetric."""
        lowest, highest = groups.extremes(wide)
        most = 2.0 ** (self.bits - 1) - (1.0 if self.symmetric else 0.5)
        if self.symmetric:
            return bf16_steps(torch.maximum(highest, -lowest), most), wide.new_empty(0)
        # Halves first: the range of large values would overflow. From the middle as it will be read, so that no value is beyond reach.
        # Plus zero: the lowest of 0.0 and -0.0 is either, so a middle of -0.0 would not be the same one by one and together.
        middles = bf16_nearest(lowest / 2 + highest / 2 + 0.0)
        return bf16_steps(torch.maximum(highest - middles, middles - lowest), most), middles

    def _codes(self, wide: Tensor, groups: Groups, steps: Tensor, middles: Tensor) -> Tensor:
        """Every value as steps from zero or from its group's middle [q d], not yet rounded, in memory of its own."""
        # A group whose step is zero has nothing but its middle, whatever that is divided by.
        inverse = groups.spread(steps.clamp_min(SMALLEST_STEP).reciprocal_())
        if self.symmetric:
            return groups.merge(groups.split(wide) * inverse)
        return groups.merge((groups.split(wide) - groups.spread(middles)).mul_(inverse).sub_(0.5))


def _of_rows(channels: Tensor, counts: Sequence[int]) -> Tensor:
    """The outlier channels of each row's packet [q k]."""
    return channels.long().index_select(0, packet_of_row(counts).to(channels.device))


def _checked(channels: Tensor, width: int) -> Tensor:
    """Outlier channels [n k] from the wire, if they are channels and ascend; else CodecError."""
    bounded = bool((channels[:, 0] >= 0).all()) and bool((channels[:, -1] < width).all())
    if not bounded or not bool((channels[:, 1:] > channels[:, :-1]).all()):
        raise CodecError(f"outlier channels of a tensor of {width} are out of order or out of range.", "the message is damaged.")
    return channels
