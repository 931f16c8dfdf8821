"""A server whose codecs remember by sample: what names samples or claims tokens wrongly is refused before anything is decoded."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from splitft.compress.residual import Residual
from splitft.errors import CodecError, ProtocolError, SplitftError
from splitft.messages import decode

from .drive import Drive, federation_of


def drive() -> Drive:
    return Drive(federation_of(uplink=Residual(), downlink=Residual()))


def with_numbers(message: bytes, numbers: tuple[int, ...]) -> bytes:
    return replace(decode(message), lengths=numbers).encode()


@pytest.mark.parametrize(
    ("numbers", "error", "words"),
    [
        (lambda all: all[:2], ProtocolError, "sent 1 sequences with their samples"),
        (lambda all: (*all[:2], 0, 10_000), ProtocolError, "names sample 10000, it has"),
        (lambda all: (*all[:2], 2**32 - 1, 0), ProtocolError, "names sample 4294967295"),
        (lambda all: (4_000_000, *all[1:]), ProtocolError, "a sequence of 4000000 tokens, at most"),
        (lambda all: (all[0] + 1, *all[1:]), ProtocolError, "a tensor of shape"),
    ],
    ids=["no samples", "a sample it has not", "the largest number", "a bomb", "one token more"],
)
def test_wrong_numbers_are_refused_by_name(numbers: object, error: type[SplitftError], words: str) -> None:
    scene = drive()
    message = scene.waiting[0]
    with pytest.raises(error, match=words):
        scene.server.handle([(0, with_numbers(message, numbers(decode(message).lengths)))])  # type: ignore[operator]
    scene.play()  # nothing has changed: the round goes on with the right message
    assert all(session.finished for session in scene.server.sessions.values())


def test_ends_that_do_not_know_the_same_samples_notice() -> None:
    """A client that remembers more than its server would be decoded against nothing."""
    scene = drive()
    session = scene.server.sessions[0]
    message = scene.waiting[0]
    samples, tokens = decode(message).lengths[2:], decode(message).lengths[:2]
    state = session.uplink.codec.init()
    for sample, count in zip(samples, tokens, strict=True):
        state = state._replace(own=state.own.put(_one(sample, count), torch.ones(count, scene.federation.split.hidden_size)))
    session.uplink.receiver = state
    with pytest.raises(CodecError, match="do not know the same samples"):
        scene.server.handle([(0, message)])


def _one(sample: int, rows: int):  # type: ignore[no-untyped-def]
    from splitft.compress.base import Samples

    return Samples((sample,), (rows,))


def test_labels_of_a_known_sample_are_not_sent_again() -> None:
    """Two rounds' worth of steps over few rows: the server has every label the client has, and later batches carry fewer."""
    fed = federation_of(uplink=Residual(), downlink=Residual(), rows=2)
    scene = Drive(fed, steps=3)
    sizes = []
    scene.play(lambda one, turn, client, message: sizes.append(len(decode(message).packets[1])) if client == 0 and turn < 3 else None)
    assert sizes[1] == sizes[2] == 32, "a header and nothing in it"
    assert sizes[0] > 32
    known = scene.server.sessions[0].labels
    assert set(known) == {0, 1}
