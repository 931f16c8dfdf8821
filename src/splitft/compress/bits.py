"""Small whole numbers as bytes, scales as bfloat16, and noise to round by.

Axes: q rows, d channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

BF16_MAX = torch.finfo(torch.bfloat16).max
# Steps are normal numbers of float32, so neither a step nor its reciprocal can overflow or vanish.
SMALLEST_STEP = torch.finfo(torch.float32).tiny
_NOISE_STEP = 2.0**-16


def bf16_nearest(values: Tensor) -> Tensor:
    """float32 values rounded to bfloat16, those beyond its range to its largest."""
    return values.clamp(-BF16_MAX, BF16_MAX).bfloat16().float()


def bf16_steps(reach: Tensor, levels: float) -> Tensor:
    """The step of which `levels` cover a distance of `reach` (float32, not negative): rounded up to a bfloat16, and zero only for zero."""
    bounded = (reach / levels).clamp_(SMALLEST_STEP, BF16_MAX)
    up = bounded.view(torch.int32).add_(0xFFFF).bitwise_and_(~0xFFFF).view(torch.float32)
    return up.mul_(reach > 0)


def code_bytes(width: int, bits: int) -> int:
    """Bytes of a row of `width` codes of 8, 4 or 2 bits."""
    return -(-width * bits // 8)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Signed codes [q d] (whole numbers in float32; spoilt) as bytes [q code_bytes].

    A byte of two codes holds one of the row's first half and one of its second, of four codes one of each quarter: so all work is on
    contiguous halves, not on every second value.
    """
    if bits == 8:
        return codes.to(torch.int8).view(torch.uint8)
    fields, width = 8 // bits, code_bytes(codes.shape[1], bits)
    if missing := fields * width - codes.shape[1]:
        codes = torch.nn.functional.pad(codes, (0, missing))
    *lower, packed = codes.add_(2.0 ** (bits - 1)).view(-1, fields, width).unbind(1)
    for part in reversed(lower):
        packed = torch.add(part, packed, alpha=2**bits)
    return packed.to(torch.uint8)


def unpack_codes(data: Tensor, bits: int, width: int) -> Tensor:
    """The inverse of `pack_codes`: signed codes [q d] in float32, in memory of their own."""
    if bits == 8:
        return data.view(torch.int8).float()
    fields, part = 8 // bits, data.shape[1]
    codes = torch.empty((data.shape[0], fields * part), device=data.device)
    for place in range(fields):
        codes[:, place * part : (place + 1) * part] = (data >> bits * place) & (2**bits - 1)
    return codes[:, :width].contiguous().sub_(2.0 ** (bits - 1))


def add_noise(codes: Tensor, counts: Sequence[int], generators: Sequence[torch.Generator | None]) -> Tensor:
    """Add to codes [q d], in place, numbers spread evenly over (0, 1) in 2^16 steps; those of each packet's rows from its own generator.

    Drawing is what stochastic rounding costs most, so four values share one drawn number. It is drawn on the CPU, the same on any device.
    """
    for part, generator in zip(torch.split(codes, list(counts)), generators, strict=True):
        assert generator is not None, "stochastic rounding needs a generator for every packet"
        drawn = torch.empty(-(-part.numel() // 4), dtype=torch.int64)
        drawn.random_(torch.iinfo(torch.int64).min, None, generator=generator)
        part.add_(drawn.view(torch.int16)[: part.numel()].view(part.shape).to(part.device).float(), alpha=_NOISE_STEP)
    return codes.add_(0.5 + _NOISE_STEP / 2)
