"""The contract of a codec's memory: both ends stay in step whatever is sent, a state is a value, a restart through tensors changes nothing,
a dial may turn between any two packets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from splitft.compress.base import Codec, Samples, State
from splitft.compress.error_bounded import ErrorBounded
from splitft.compress.residual import Residual
from splitft.engine import tensor_file
from splitft.rng import numpy_stream, torch_stream

from .codec_scenes import KINDS, draw, frozen, held, same_bits, same_state, turns
from .variants import ALL_CODEC_VARIANTS, Variant

TAME = ("normal", "drift", "drift", "same", "same", "zero", "constant", "outlier", "subnormal")
every_codec = pytest.mark.parametrize("variant", ALL_CODEC_VARIANTS, ids=repr)
REMEMBERING = [variant for variant in ALL_CODEC_VARIANTS if variant.build().hears_samples]


def kinds_for(variant: Variant) -> tuple[str, ...]:
    """float16 and absolute bounds do not take the largest numbers; what is fed back through unbounded errors grows."""
    codec = variant.build()
    absolute = isinstance(codec, ErrorBounded) and codec.of == "absolute"
    return TAME if absolute or "Cast(dtype='float16')" in repr(codec) or "Feedback(" in repr(codec) else KINDS


@every_codec
def test_a_state_is_a_value(variant: Variant) -> None:
    """Given twice it gives the same twice, in either order of the ends, and it is itself never changed."""
    codec: Codec = variant.build()
    sender, receiver = codec.init(), codec.init()
    for turn, now in enumerate(turns(3, 4, 1, 6, torch.float32, 5, TAME)):
        before = frozen(codec, sender), frozen(codec, receiver)
        rows = now.rows.clone()
        packet, after = codec.encode(rows, sender, draw(codec, turn), now.samples[0])
        again, after_again = codec.encode(rows, sender, draw(codec, turn), now.samples[0])
        assert torch.equal(rows, now.rows)
        assert bytes(packet.payload) == bytes(again.payload)
        assert same_state(codec, after, after_again)
        decoded, heard = codec.decode(packet, receiver, now.samples[0])
        kept = decoded.clone()
        decoded.fill_(7.0)
        repeated, heard_again = codec.decode(packet, receiver, now.samples[0])
        assert same_bits(kept, repeated)
        assert same_state(codec, heard, heard_again)
        for state, old in zip((sender, receiver), before, strict=True):
            now_held = codec.flatten(state)
            assert now_held.keys() == old.keys()
            assert all(same_bits(now_held[name], old[name]) for name in old)
        sender, receiver = after, heard


@pytest.mark.parametrize("variant", [variant for variant in ALL_CODEC_VARIANTS if variant.build().mirrored], ids=repr)
def test_without_commit_the_receiver_s_step_is_the_sender_s_too(variant: Variant) -> None:
    codec: Codec = variant.build()
    state = codec.init()
    for turn, now in enumerate(turns(4, 4, 1, 6, torch.bfloat16, 5, TAME)):
        told = now.samples
        [packet], [committed] = codec.encode_batch(now.rows, now.counts, [state], [draw(codec, turn)], told)
        [other], _ = codec.encode_batch(now.rows, now.counts, [state], [draw(codec, turn)], told, commit=False)
        assert bytes(packet.payload) == bytes(other.payload)
        assert dict(packet.facts) == dict(other.facts)
        _, [decoded] = codec.decode_batch([packet], [state], samples=told)
        assert same_state(codec, committed, decoded)
        state = decoded


def restarted(codec: Codec, state: State, path: Path | None) -> State:
    """A state through tensors, and through a file where there is one."""
    tensors = codec.flatten(state)
    if path is not None:
        tensor_file.write(path, tensors)
        tensors = tensor_file.read(path)
    return codec.restore(tensors)


def long_run(codec: Codec, steps: int, kinds: tuple[str, ...], seed: int, path: Path | None = None) -> dict[str, float]:
    """Two lanes, of which one is restarted now and then: packets, values and states must be the same for ever. Sums of the facts."""
    sender, receiver, other_sender, other_receiver = (codec.init() for _ in range(4))
    choice, dtypes, sums = numpy_stream(seed, "long-run"), [torch.float32, torch.bfloat16], dict[str, float]()
    lanes = [iter(turns(seed + k, steps, 1, 5, dtype, 9, kinds)) for k, dtype in enumerate(dtypes)]
    for turn in range(steps):
        now = next(lanes[int(choice.integers(2))])
        told, used = now.samples[0], codec.scaled(float(choice.choice([0.5, 1.0, 1.0, 2.0])))
        packet, sender = used.encode(now.rows, sender, draw(codec, turn), told)
        twin, other_sender = used.encode(now.rows, other_sender, draw(codec, turn), told)
        assert bytes(packet.payload) == bytes(twin.payload)
        # The receiver has the dial too: it is told with every plan.
        decoded, receiver = used.decode(packet, receiver, told)
        repeated, other_receiver = used.decode(twin, other_receiver, told)
        assert same_bits(decoded, repeated)
        assert len(packet.payload) <= used.payload_bytes(now.rows.shape[0], now.rows.shape[1], now.rows.dtype)
        if turn % 9 == 0 or turn == steps - 1:
            assert same_state(codec, sender, other_sender)
            assert same_state(codec, receiver, other_receiver)
            assert not codec.mirrored or same_state(codec, sender, receiver)
            assert not codec.keyed or type(codec).__name__ == "Feedback" or held(codec, sender)[:1] == held(codec, receiver)[:1]
        if choice.random() < 0.1:
            other_sender = restarted(codec, other_sender, path)
            other_receiver = restarted(codec, other_receiver, path)
        for name, amount in packet.facts.items():
            sums[name] = sums.get(name, 0.0) + amount
    return sums


@pytest.mark.parametrize("variant", REMEMBERING, ids=repr)
def test_both_ends_stay_in_step_through_skips_evictions_restarts_and_turns_of_the_dial(variant: Variant) -> None:
    codec: Codec = variant.build()
    long_run(codec, 24, kinds_for(variant), 5)


BUDGETS: list[dict[str, Any]] = [
    {"cache_mb": 0.0002},
    {"cache_mb": 0.0002, "evict": "oldest"},
    {"cache_mb": 0.0001, "spill": True},
    {"cache_mb": 0.0001, "evict": "oldest", "spill": True, "cache_dtype": "float32"},
]


@pytest.mark.parametrize("fields", BUDGETS, ids=str)
@pytest.mark.parametrize("name", ["residual", "temporal", "lowrank"])
def test_both_ends_stay_in_step_for_hundreds_of_packets_under_a_tiny_budget(name: str, fields: dict[str, Any], tmp_path: Path) -> None:
    """Restarts here go through a file. Caches drop and spill all the time: a sample is known less often than it comes back."""
    steps = 60 if name == "lowrank" else 150
    sums = long_run(Variant("uplink", name, fields).build(), steps, TAME, 6, tmp_path / "state.safetensors")
    assert sums["samples"] > 2 * steps
    if name == "temporal":
        assert 0 < sums["skipped"] < sums["samples"]


@pytest.mark.parametrize("name", ["residual", "temporal", "lowrank"])
def test_what_lies_in_a_file_is_as_good_as_what_lies_in_memory(name: str) -> None:
    """A cache that spills sends the same packets as one without a limit; one that drops sends others."""
    boundless, spilling, dropping = (
        Variant("uplink", name, fields).build() for fields in ({}, {"cache_mb": 0.0001, "spill": True}, {"cache_mb": 0.0001})
    )
    sizes: list[list[int]] = []
    found: list[list[torch.Tensor]] = []
    for codec in (boundless, spilling, dropping):
        sender, receiver = codec.init(), codec.init()
        sizes.append([])
        found.append([])
        for turn, now in enumerate(turns(7, 80, 1, 5, torch.float32, 9, TAME)):
            packet, sender = codec.encode(now.rows, sender, draw(codec, turn), now.samples[0])
            decoded, receiver = codec.decode(packet, receiver, now.samples[0])
            sizes[-1].append(len(packet.payload))
            found[-1].append(decoded)
    assert sizes[0] == sizes[1]
    assert all(same_bits(one, other) for one, other in zip(found[0], found[1], strict=True))
    assert sizes[0] != sizes[2]


@pytest.mark.parametrize("drift", [True, False])
@pytest.mark.parametrize("bound", [0.5, 0.05])
@pytest.mark.parametrize("cache_dtype", ["bfloat16", "float32"])
def test_errors_of_changes_do_not_add_up(bound: float, cache_dtype: str, drift: bool) -> None:
    """Closed loop: after any number of visits a value is within the bound of its packet's root mean square, and the cache's rounding."""
    codec = Residual(inner=ErrorBounded(bound=bound, of="absolute"), drift=drift, cache_dtype=cache_dtype)  # type: ignore[arg-type]
    samples, sender, receiver = Samples((4, 9), (5, 3)), codec.init(), codec.init()
    rows = torch.randn(8, 12, generator=torch_stream(1, "closed-loop"))
    for visit in range(120):
        rows = rows * 0.999 + 0.03 * torch.randn(8, 12, generator=torch_stream(2, "closed-loop", visit))
        packet, sender = codec.encode(rows, sender, None, samples)
        decoded, receiver = codec.decode(packet, receiver, samples)
        step = bound * float(rows.square().mean().sqrt())
        allowed = step + (rows.abs() + step) * (2.0**-8 if cache_dtype == "bfloat16" else 2.0**-22)
        assert bool(((decoded - rows).abs() <= allowed).all()), visit
    assert same_state(codec, sender, receiver)
