"""A lossless stage over another codec's payload: bytes of one significance beside each other, then Zstandard.

The payload of a packet:

    u8 form | the inner codec's payload as it is (form 0), or shuffled and as one Zstandard frame that states its length (form 1)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import zstandard
from torch import Tensor

from splitft.compress.base import Facts, Packed, Parts, Payload, State
from splitft.compress.wrapper import Nested, Wrapper
from splitft.errors import CodecError, ConfigError

RAW, ZSTANDARD = b"\x00", b"\x01"
FORM_BYTES = 1
LEVELS = range(1, 20)
MOST_ITEM_BYTES = 8
# How much smaller numbers of so many bytes became: activations and their gradients, level 1 (bfloat16, float32, int8 per token).
TYPICAL_RATIOS = {2: 1.5, 4: 1.2, 1: 1.14}


@dataclass(frozen=True)
class Entropy(Wrapper):
    """Make the payload of `inner` smaller without loss: what arrives is what `inner` alone would give, bit for bit.

    Bytes of one significance of numbers of `item_bytes` bytes are put together (0: as wide as the inner codec's numbers are), since signs
    and exponents repeat and mantissas do not; then Zstandard at `level` (1 to 19; above 1 little is gained, for much time). A payload that
    would not become smaller travels as it is, at one byte more.
    """

    number: ClassVar[int] = 11
    references: ClassVar[tuple[str, ...]] = ()
    works_on_payload: ClassVar[bool] = True
    level: int = 1
    item_bytes: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        wrong = {
            f"level is {self.level!r}; allowed are whole numbers from 1 to 19": type(self.level) is not int or self.level not in LEVELS,
            f"item_bytes is {self.item_bytes!r}; allowed are whole numbers from 0 to {MOST_ITEM_BYTES}": type(self.item_bytes) is not int
            or not 0 <= self.item_bytes <= MOST_ITEM_BYTES,
        }
        if found := tuple(problem for problem, is_wrong in wrong.items() if is_wrong):
            raise ConfigError("entropy has wrong fields.", "see docs/methods.md.", found)

    @property
    def lossless(self) -> bool:  # type: ignore[override]  # of the codec inside, not of the class
        return self.inner.lossless

    @property
    def floating(self) -> bool:  # type: ignore[override]
        return self.inner.floating

    def stride_bytes(self, dtype: torch.dtype) -> int:
        return 1

    def error_bound(self, tensor: Tensor) -> Tensor | None:
        return self.inner.error_bound(tensor)

    def pack_rows(self, rows: Tensor, parts: Parts) -> Packed:
        inner = self.inner.pack_rows(rows, parts.inside([state.inner for state in parts.states]))
        stride = self._stride(rows.dtype)
        payloads = [self._smaller(payload, stride) for payload in inner.payloads]
        sizes = [(len(before), len(after)) for before, after in zip(inner.payloads, payloads, strict=True)]
        return Packed(
            [*payloads],
            [Nested(None, state) for state in inner.states],
            [_facts(facts, before, after) for facts, (before, after) in zip(inner.facts, sizes, strict=True)],
        )

    def unpack_rows(
        self, payloads: Sequence[Payload], parts: Parts, width: int, dtype: torch.dtype, device: torch.device
    ) -> tuple[Tensor, list[State]]:
        stride = self._stride(dtype)
        most = [self.inner.payload_bytes(count, width, dtype) for count in parts.counts]
        plain = [_restored(memoryview(payload), stride, limit) for payload, limit in zip(payloads, most, strict=True)]
        rows, states = self.inner.unpack_rows(plain, parts.inside([state.inner for state in parts.states]), width, dtype, device)
        return rows, [Nested(None, state) for state in states]

    def payload_bytes(self, count: int, width: int, dtype: torch.dtype) -> int:
        return FORM_BYTES + self.inner.payload_bytes(count, width, dtype)

    def expected_bytes(self, count: int, width: int, dtype: torch.dtype, visit: int = 0, samples: int = 1) -> float:
        return FORM_BYTES + self.inner.expected_bytes(count, width, dtype, visit, samples) / TYPICAL_RATIOS.get(self._stride(dtype), 1.0)

    def _stride(self, dtype: torch.dtype) -> int:
        return self.item_bytes or self.inner.stride_bytes(dtype)

    def _smaller(self, payload: Payload, stride: int) -> bytes:
        # One compressor for each payload: what it writes cannot depend on what it wrote before.
        frame = zstandard.ZstdCompressor(level=self.level, write_content_size=True).compress(_shuffled(payload, stride))
        return ZSTANDARD + frame if len(frame) < len(payload) else RAW + bytes(payload)


def _facts(inner: Facts, before_bytes: int, after_bytes: int) -> dict[str, float]:
    """What is known inside, and the bytes of this stage: the payload's, and how many fewer they are than the inner one's."""
    own = {"stage_entropy_bytes": after_bytes, "stage_entropy_saved_bytes": before_bytes - after_bytes}
    return {**inner, **{name: value + inner.get(name, 0.0) for name, value in own.items()}}


def _shuffled(payload: Payload, stride: int) -> bytes:
    """First bytes of all numbers of `stride` bytes, then second ones, and so on. What does not fill a number comes first, as it was: before
    their values, codecs say where these belong.
    """
    odd = len(payload) % stride
    if stride == 1 or odd == len(payload):
        return bytes(payload)
    data: Any = np.frombuffer(payload, dtype=np.uint8)
    return b"".join((data[:odd].tobytes(), data[odd:].reshape(-1, stride).T.tobytes()))


def _ordered(data: bytes, stride: int) -> Payload:
    """The inverse of `_shuffled`."""
    odd = len(data) % stride
    if stride == 1 or odd == len(data):
        return data
    shuffled: Any = np.frombuffer(data, dtype=np.uint8)
    return b"".join((data[:odd], shuffled[odd:].reshape(stride, -1).T.tobytes()))


def _restored(payload: memoryview, stride: int, limit_bytes: int) -> Payload:
    """The inner payload, of at most so many bytes. Raises CodecError for damaged bytes, before memory is taken for what they claim."""
    form, body = payload[:FORM_BYTES], payload[FORM_BYTES:]
    if form == RAW and len(body) <= limit_bytes:
        return body
    if form != ZSTANDARD or len(body) > limit_bytes:
        raise CodecError(
            f"entropy stage of {len(payload)} bytes has form {form.hex() or 'none'}, or is too long.", "the message is damaged."
        )
    try:
        claimed = zstandard.frame_content_size(body)
        if not 0 <= claimed <= limit_bytes:
            raise CodecError(f"a frame says it holds {claimed} bytes, at most {limit_bytes} can be.", "the message is damaged.")
        data = zstandard.ZstdDecompressor().decompress(body, max_output_size=limit_bytes, allow_extra_data=False)
    except zstandard.ZstdError as problem:
        raise CodecError(f"a Zstandard frame cannot be read ({problem}).", "the message is damaged.") from problem
    if len(data) != claimed:
        raise CodecError(f"a frame of {claimed} bytes holds {len(data)}.", "the message is damaged.")
    return _ordered(data, stride)
