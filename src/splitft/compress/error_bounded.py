"""Send tensors with a bound on the error of every element, in as few bytes as their values need.

The payload of a packet of q rows and d channels, little endian:

    steps f32, one or one for each row or channel | whole numbers of steps, entropy coded (coding.py)

Axes: q rows (tokens), d channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from splitft.compress.base import Codec, Packed, Parts, Payload, State, as_rows, require_finite
from splitft.compress.coding import LARGEST_CODE, decode_codes, encode_codes, most_code_bytes
from splitft.errors import CodecError, ConfigError

Of = Literal["rms", "range", "absolute"]
Per = Literal["packet", "token", "channel"]
Rounding = Literal["nearest", "stochastic"]
Doubles = npt.NDArray[np.float64]
# Of a result's type: largest relative error of rounding, and half the smallest step.
FLOAT32_MAX, SMALLEST = torch.finfo(torch.float32).max, 2.0**-149
ROUNDING = {torch.float32: (2.0**-24, 2.0**-150), torch.bfloat16: (2.0**-8, 2.0**-134), torch.float16: (2.0**-11, 2.0**-25)}


@dataclass(frozen=True)
class ErrorBounded(Codec):
    """Round every value to a multiple of a step and code those whole numbers by how likely they are: no element is off by more than the
    bound.

    `bound` is a share of the root mean square (`of = "rms"`), of the value range (`"range"`), or a plain number (`"absolute"`), taken over
    the packet, every token or every channel (`per`). What most values are far below costs next to nothing: the rate follows the values by
    itself, token by token and channel by channel. `rounding = "stochastic"` is right on average and has half as many bytes to spend, for
    its steps are half as wide. `dead_zone` above 0.5 rounds more values to zero: fewer bytes, and a step so much narrower that the bound
    holds. Stateless.
    """

    number: ClassVar[int] = 4
    references: ClassVar[tuple[str, ...]] = ("1311.2540",)
    bound: float = 0.125
    of: Of = "rms"
    per: Per = "packet"
    rounding: Rounding = "nearest"
    dead_zone: float = 0.5

    def __post_init__(self) -> None:
        wrong = {
            f"bound is {self.bound!r}; allowed are numbers above 0": type(self.bound) not in (int, float)
            or not (self.bound > 0 and math.isfinite(self.bound)),
            f"of is {self.of!r}; allowed are {', '.join(get_args(Of))}": self.of not in get_args(Of),
            f"per is {self.per!r}; allowed are {', '.join(get_args(Per))}": self.per not in get_args(Per),
            f"rounding is {self.rounding!r}; allowed are {', '.join(get_args(Rounding))}": self.rounding not in get_args(Rounding),
            f"dead_zone is {self.dead_zone!r}; allowed are numbers from 0.5 to 1": type(self.dead_zone) not in (int, float)
            or not 0.5 <= self.dead_zone <= 1.0,
        }
        if found := tuple(problem for problem, is_wrong in wrong.items() if is_wrong):
            raise ConfigError(f"error_bounded has {len(found)} wrong field{'s' if len(found) > 1 else ''}.", "see docs/methods.md.", found)

    @property
    def draws(self) -> bool:
        return self.rounding == "stochastic"

    def scaled(self, factor: float) -> Codec:
        return self if factor == 1.0 else replace(self, bound=self.bound * factor)

    def payload_bytes(self, count: int, width: int, dtype: torch.dtype) -> int:
        return 4 * self._steps(count, width) + most_code_bytes(count, width)

    def expected_bytes(self, count: int, width: int, dtype: torch.dtype, visit: int = 0, samples: int = 1) -> float:
        """For values of a normal distribution: log2 of their spread in steps, and the entropy of its shape."""
        share = self.bound * (8.0 if self.of == "range" else 1.0) if self.of != "absolute" else self.bound
        bits = max(0.05, math.log2(math.sqrt(2 * math.pi * math.e) / self._step_of(share) + 1.0))
        return 4 * self._steps(count, width) + count * width * bits / 8

    def error_bound(self, tensor: Tensor) -> Tensor:
        count, width = as_rows(tensor.shape)
        if not count * width:
            return torch.zeros_like(tensor, dtype=torch.float64)
        wide = tensor.detach().reshape(count, width).double()
        bound = torch.from_numpy(self._bounds(wide.cpu().numpy())).expand(count, width)
        relative, absolute = ROUNDING[tensor.dtype]
        return (bound + relative * (wide.abs() + bound) + absolute).reshape(tensor.shape)

    def pack_rows(self, rows: Tensor, parts: Parts) -> Packed:
        require_finite(rows, "tensor to send with bounded errors")
        payloads: list[Payload] = []
        facts = []
        for part, generator in zip(torch.split(rows.detach().cpu().double(), list(parts.counts)), parts.generators, strict=True):
            values = part.numpy()
            steps = self._steps_for(values)
            codes = self._codes(values, steps, generator)
            coded = encode_codes(codes)
            head = steps.astype("<f4").tobytes()
            payloads.append(head + coded)
            error = codes * steps
            error -= values
            squared_error = float(np.square(error, out=error).sum())
            facts.append(
                {
                    "squared": float(np.square(values).sum()),
                    "squared_error": squared_error,
                    "stage_scales_bytes": len(head),
                    "stage_codes_bytes": len(coded),
                }
            )
        return Packed(payloads, list(parts.states), facts)

    def unpack_rows(
        self, payloads: Sequence[Payload], parts: Parts, width: int, dtype: torch.dtype, device: torch.device
    ) -> tuple[Tensor, list[State]]:
        rows = []
        limit = torch.finfo(dtype).max
        for payload, count in zip(payloads, parts.counts, strict=True):
            size = 4 * self._steps(count, width)
            if len(payload) < size:
                raise CodecError(f"payload of {len(payload)} bytes has no room for {size // 4} steps.", "the message is damaged.")
            read = np.frombuffer(payload, "<f4", count=size // 4)
            # Before anything is made of them: some NaNs cannot even be converted without a warning.
            if not np.isfinite(read).all() or (read < 0).any():
                raise CodecError("a received step is negative or not finite.", "the message is damaged.")
            steps = read.astype(np.float64)
            codes = decode_codes(memoryview(payload)[size:], count, width)
            values = codes * steps.reshape(self._shape(count, width))
            rows.append(torch.from_numpy(values).clamp_(-limit, limit).to(dtype))
        return torch.cat(rows).to(device), list(parts.states)

    def _codes(self, values: Doubles, steps: Doubles, generator: torch.Generator | None) -> npt.NDArray[np.int32]:
        """Whole numbers of steps; zero where a step is zero, for then all values are."""
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            scaled = values / np.where(steps > 0, steps, 1.0)
        if not (steps > 0).all():
            scaled = np.where(steps > 0, scaled, 0.0)
        if not max(scaled.max(), -scaled.min()) < LARGEST_CODE:
            raise CodecError(
                f"a value of {np.abs(values).max():.3g} is too large for a bound of {self.bound:g}.",
                "raise the bound, or make it relative.",
            )
        if self.rounding == "stochastic":
            assert generator is not None, "stochastic rounding needs a generator for every packet"
            scaled = np.floor(scaled + torch.rand(values.shape, generator=generator, dtype=torch.float64).numpy())
        elif self.dead_zone == 0.5:
            np.rint(scaled, out=scaled)
        else:
            scaled = np.sign(scaled) * np.floor(np.abs(scaled) + (1.0 - self.dead_zone))
        codes: npt.NDArray[np.int32] = scaled.astype(np.int32)
        return codes

    def _bounds(self, values: Doubles) -> Doubles:
        """What each element may differ by: one number, or one for each row [q 1] or channel [1 d]."""
        axis = {"packet": None, "token": 1, "channel": 0}[self.per]
        shape = self._shape(*values.shape)
        if self.of == "absolute":
            return np.full(shape, self.bound)
        if self.of == "range":
            size = values.max(axis) - values.min(axis)
        else:
            most = _largest(values, axis)
            scaled = values / np.where(most > 0, most, 1.0)  # squares of the largest numbers would overflow
            size = np.sqrt(np.square(scaled, out=scaled).mean(axis, keepdims=True)) * most
        return np.asarray(self.bound * size, np.float64).reshape(shape)

    def _step_of(self, bound: float | Doubles) -> Doubles:
        """The step that keeps every element within the bound, a little narrower for the roundings on the way."""
        widest = 1.0 if self.rounding == "stochastic" else 1.0 / self.dead_zone
        return np.asarray(bound * widest * (1.0 - 2.0**-20), np.float64)

    def _steps_for(self, values: Doubles) -> Doubles:
        """The steps of a packet's values as float32 has them, never wider than the bound allows."""
        wanted = np.minimum(self._step_of(self._bounds(values)), FLOAT32_MAX)
        steps = wanted.astype(np.float32)
        steps = np.where(steps > wanted, np.nextafter(steps, np.float32(0.0)), steps)
        # All values are whole multiples of the smallest number of float32, so that is a step of no error.
        steps = np.where((steps == 0) & (wanted > 0), np.float32(SMALLEST), steps)
        axis = {"packet": None, "token": 1, "channel": 0}[self.per]
        if (wanted > 0).all():
            return steps.astype(np.float64)
        # Values that are all equal have no range: one step reaches them.
        return np.where(wanted > 0, steps, _largest(values, axis).reshape(steps.shape)).astype(np.float64)

    def _steps(self, count: int, width: int) -> int:
        return math.prod(self._shape(count, width))

    def _shape(self, count: int, width: int) -> tuple[int, int]:
        return {"packet": (1, 1), "token": (count, 1), "channel": (1, width)}[self.per]


def _largest(values: Doubles, axis: int | None) -> Doubles:
    """The largest magnitude over an axis that stays, of length one; without a copy of the values."""
    found: Doubles = np.maximum(values.max(axis, keepdims=True), -values.min(axis, keepdims=True))
    return found + 0.0  # never the other zero
