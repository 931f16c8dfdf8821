"""Noise on what crosses the cut: every row clipped in length, Gaussian noise added, the rest left to the codec inside.

The payload is that of the inner codec; the receiver knows of nothing.

Axes: q rows (positions of a text), d channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from splitft.compress.base import Codec, Packed, Parts, Payload, State, require_finite, to_bytes
from splitft.compress.bits import BF16_MAX
from splitft.compress.positions import ENERGIES
from splitft.compress.wrapper import Nested, Wrapper
from splitft.errors import ConfigError
from splitft.keyed import KeyedGenerator
from splitft.privacy.draws import digest, secret_normals
from splitft.privacy.gaussian import epsilon_of


@dataclass(frozen=True)
class Noise(Wrapper):
    """Add Gaussian noise to every channel, of `multiple` times the row's root mean square; with a `clip`, rows are shortened to that length
    first and the unit is the clip, sqrt(d) times as much; send it through `inner`.

    With a clip that is the analytic Gaussian mechanism with sensitivity 2 clip (arXiv 1805.06530). Its unit is one row sent once: the
    vector of one position. A word of text is in the rows of all later positions too, and each time they are sent: `epsilon_of_rows` counts
    them. Noise in root mean squares of a row at the clip is `multiple` * sqrt(d), far above what a model bears at any epsilon worth the
    name; so look at the audit. Without a clip (0) it is called obfuscation: no epsilon.

    The noise follows from the stream's key of 256 bits (client, round, place and packet are in it) and every bit of the packet's values:
    the same values sent again there are the same bytes. Values that differ in a bit get fresh noise, which averages out over many
    repetitions: so a client of a federation lets a round be opened only a few times. In a simulation the key follows from the run's seed,
    and whoever knows that can take the noise off; a client of a federation has a key of its own. Outermost, but for `entropy`: a codec
    outside would choose or make up for what it sends by values without noise.
    """

    number: ClassVar[int] = 13
    references: ClassVar[tuple[str, ...]] = ("1805.06530",)
    outermost: ClassVar[bool] = True
    clip: float = 0.0
    multiple: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("clip", "multiple"):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0.0 <= value <= 1e6:
                raise ConfigError(f"noise: {name} is {value!r}; allowed are numbers from 0 to 1e6.", "see docs/methods.md.")

    @property
    def draws(self) -> bool:
        return True

    @property
    def claims(self) -> bool:
        """Whether it is a mechanism with an epsilon, and not obfuscation."""
        return self.clip > 0 and self.multiple > 0

    def epsilon_of_rows(self, delta: float, rows: int = 1, sends: int = 1) -> float | None:
        """The epsilon of so many rows sent so many times each; None for obfuscation. One row sent once is the unit; a text of t tokens is t
        rows, and every epoch sends them again."""
        return epsilon_of(2.0 * math.sqrt(rows * sends) / self.multiple, delta) if self.claims else None

    def in_units_of_rms(self, width: int) -> float:
        """The noise of a channel over the root mean square of a row of `width` channels, of one at the clip where there is one."""
        return self.multiple * math.sqrt(width) if self.clip > 0 else self.multiple

    def pack_rows(self, rows: Tensor, parts: Parts) -> Packed:
        require_finite(rows, "tensor to send with noise")
        wide = rows.detach().to("cpu", torch.float64)
        made = zip(torch.split(wide, list(parts.counts)), parts.generators, strict=True)
        noisy = torch.cat([self._noisy(part, generator) for part, generator in made])
        limit = min(torch.finfo(rows.dtype).max, BF16_MAX)
        sent = noisy.clamp_(-limit, limit).to(rows.dtype)
        inner = self.inner.pack_rows(sent, parts.inside([state.inner for state in parts.states]))
        # What the inner codec knows of energy and error is about rows with noise, not about those of the packet.
        known = [{name: value for name, value in facts.items() if name not in ENERGIES} for facts in inner.facts]
        return Packed(inner.payloads, [Nested(None, state) for state in inner.states], known)

    def _noisy(self, rows: Tensor, generator: torch.Generator | None) -> Tensor:
        """The rows [q d] of one packet, clipped, with their noise, float64."""
        assert isinstance(generator, KeyedGenerator), "noise needs a generator with a key for every packet: rng.torch_stream"
        values = digest(repr(tuple(rows.shape)).encode(), to_bytes(rows))
        drawn = torch.from_numpy(secret_normals(generator.key, "noise on rows", values, rows.numel())).reshape(rows.shape)
        length = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
        shortened, deviation = rows, self.multiple / math.sqrt(rows.shape[1]) * length
        if self.clip > 0:
            shortened = rows * torch.where(length > self.clip, self.clip / length, torch.ones_like(length))
            deviation = torch.full_like(length, self.multiple * self.clip)
        return torch.addcmul(shortened, drawn, deviation)

    def unpack_rows(
        self, payloads: Sequence[Payload], parts: Parts, width: int, dtype: torch.dtype, device: torch.device
    ) -> tuple[Tensor, list[State]]:
        rows, states = self.inner.unpack_rows(payloads, parts.inside([state.inner for state in parts.states]), width, dtype, device)
        return rows, [Nested(None, state) for state in states]

    def payload_bytes(self, count: int, width: int, dtype: torch.dtype) -> int:
        return self.inner.payload_bytes(count, width, dtype)

    def expected_bytes(self, count: int, width: int, dtype: torch.dtype, visit: int = 0, samples: int = 1) -> float:
        # With noise in it no visit is like another.
        return self.inner.expected_bytes(count, width, dtype, 0, samples)


def noise_in(codec: Codec) -> Noise | None:
    """The noise that a codec puts on what it sends; None where there is none."""
    while isinstance(codec, Wrapper) and not isinstance(codec, Noise):
        codec = codec.inner
    return codec if isinstance(codec, Noise) else None
