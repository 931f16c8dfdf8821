"""A matrix as the sum of a few products of a column and a row, in whole numbers of few bits.

A component is one column [t] and one row [d], each as codes times a step (bfloat16). Their product is the same to the bit on any hardware,
in whatever order it is summed: a code has at most 7 bits and a sign, a product of two steps 16 significant bits, and components whose
product of steps is below 2^-15 of the largest are left out; so all terms of the sum are whole multiples of one power of two, and of at
most 255 components no partial sum needs more than the 53 bits that float64 has.

Axes: b matrices of equal shape, t rows (tokens), d channels, k components.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from splitft.compress.base import from_bytes, require_finite, to_bytes
from splitft.compress.bits import SMALLEST_STEP, add_noise, bf16_steps, code_bytes, pack_codes, unpack_codes
from splitft.errors import CodecError
from splitft.rng import torch_stream

MOST_COMPONENTS = 255
# log2 of how far apart the products of steps may lie: 53 = 15 + 16 (of a product of steps) + 14 (of two codes) + 8 (of 255 terms).
SPAN = 15
# Directions beyond those that are kept, and how often they are drawn towards the largest (Halko, Martinsson, Tropp, arXiv 0909.4061).
OVERSAMPLING, POWER_ITERATIONS = 8, 2
# Beyond this a matrix is cut off: columns must not overflow float32.
LARGEST = 2.0**100


class Factors(NamedTuple):
    """The components of a matrix [t d]: `steps` [k 2] of columns and rows (bfloat16 in float32), `codes` [k t + d] (whole, float32)."""

    steps: Tensor
    codes: Tensor

    def product(self, rows: int) -> Tensor:
        """Their sum [t d], t = `rows`, in float64; exact (see above)."""
        codes, steps = self.codes.double(), self.steps.double()
        columns = codes[:, :rows].T * (steps[:, 0] * steps[:, 1])
        return columns @ codes[:, rows:]


class Triplets(NamedTuple):
    """The largest singular values of matrices [b t d], times the left vectors: `columns` [b t k]; the right vectors: `rows` [b k d];
    `energies` [b k], squares of the values, and `totals` [b], sums of all squares of the matrices, in float64."""

    columns: Tensor
    rows: Tensor
    energies: Tensor
    totals: Tensor


def largest_triplets(matrices: Tensor, most: int) -> Triplets:
    """At most `most` of them by a randomised search for their span, whose first guess is the same for every matrix [b t d] (float64)."""
    height, width = matrices.shape[1:]
    matrices = matrices.clamp(-LARGEST, LARGEST)
    reach = matrices.abs().amax((1, 2), keepdim=True)
    # Of largest value 1, so that nothing overflows or vanishes in float32.
    scaled = (matrices / reach.where(reach > 0, torch.ones_like(reach))).float()
    kept = min(most, height, width)
    sought = min(kept + OVERSAMPLING, height, width)
    guess = torch.randn((width, sought), generator=torch_stream(0, "low-rank guess", width, sought))
    span = torch.linalg.qr(scaled @ guess).Q
    for _ in range(POWER_ITERATIONS):
        span = torch.linalg.qr(scaled @ torch.linalg.qr(scaled.mT @ span).Q).Q
    # Of the tall matrix: a decomposition of the wide one takes more than twice as long.
    right, values, left = torch.linalg.svd(scaled.mT @ span, full_matrices=False)
    columns = (span @ left.mT)[..., :kept] * values[:, None, :kept]
    energies = (values[:, :kept].double() * reach[:, 0]).square()
    return Triplets((columns.double() * reach).float(), right[..., :kept].mT.contiguous(), energies, matrices.square().sum((1, 2)))


def enough(energies: Tensor, total: Tensor, share: float) -> int:
    """The smallest number of components that keep this share of a matrix's energy, if they can; else all."""
    short = energies.cumsum(0) < share * total
    return min(int(short.sum()) + 1, len(energies))


def quantised(columns: Tensor, rows: Tensor, bits: int, generator: torch.Generator | None) -> Factors:
    """Components [t k], [k d] in whole numbers of so many bits, right on average; without those too small for an exact sum."""
    most = 2.0 ** (bits - 1) - 1
    values = [columns.T, rows]
    steps = torch.stack([bf16_steps(part.abs().amax(1), most) for part in values], 1)
    kept = _within_span(steps)
    steps = steps[kept]
    if not len(steps):
        return Factors(steps, torch.empty(0, columns.shape[0] + rows.shape[1]))
    inverse = steps.clamp_min(SMALLEST_STEP).reciprocal()
    codes = torch.cat([part[kept] * inverse[:, side : side + 1] for side, part in enumerate(values)], 1).contiguous()
    codes = add_noise(codes, [len(codes)], [generator]).floor_()
    return Factors(steps, codes.clamp_(-most, most))


def factor_bytes(rows: int, width: int, bits: int) -> int:
    """Of one component on the wire: two steps, and the codes of its column and row together."""
    return 4 + code_bytes(rows + width, bits)


def write_factors(factors: Factors, bits: int) -> list[memoryview]:
    """steps bf16 [k 2] | codes [k code_bytes(t + d)]."""
    return [to_bytes(factors.steps.bfloat16()), to_bytes(pack_codes(factors.codes.clone(), bits))]


def read_factors(data: memoryview, count: int, rows: int, width: int, bits: int) -> Factors:
    """The inverse of `write_factors` for bytes of the right length. Raises CodecError for steps that cannot be."""
    steps = from_bytes(data[: 4 * count], torch.bfloat16, (count, 2)).float()
    require_finite(steps, "received steps")
    if bool((steps <= 0).any()) or not bool(_within_span(steps).all()):
        raise CodecError(f"steps of {count} components are not positive or too far apart.", "the message is damaged.")
    codes = from_bytes(data[4 * count :], torch.uint8, (count, code_bytes(rows + width, bits)))
    return Factors(steps, unpack_codes(codes, bits, rows + width))


def _within_span(steps: Tensor) -> Tensor:
    """Which components [k] have steps [k 2] of a product that counts beside the largest, and is not zero."""
    products = steps.double().prod(1)
    largest = products.amax() if len(products) else products.new_zeros(())
    return (products > 0) & (products * 2.0**SPAN >= largest)
