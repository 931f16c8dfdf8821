"""Labels on their way: sent once for each sample, restored from what both ends remember, refused when they are not those due."""

from __future__ import annotations

import pytest
import torch

from splitft.compress.base import Samples
from splitft.engine.labels import MEMORY, Known, count_labels, fresh_of, known_labels, receive_labels, send_labels, with_labels
from splitft.engine.streams import StreamStates, flattened, unflattened
from splitft.errors import ProtocolError
from splitft.rng import numpy_stream
from splitft.types import IGNORE_LABEL

VOCABULARY = 300


def labels_of(ids: tuple[int, ...], rows: tuple[int, ...]) -> torch.Tensor:
    """What a sample's labels are follows from its id alone; the first is no target."""
    parts = [torch.arange(count) * (one + 3) % VOCABULARY for one, count in zip(ids, rows, strict=True)]
    for part in parts:
        part[0] = IGNORE_LABEL
    return torch.cat(parts)


def told(*ids: int) -> Samples:
    return Samples(ids, tuple(1 + one % 5 for one in ids))


@pytest.mark.parametrize("vocabulary", [VOCABULARY, 70_000])
def test_both_ends_and_the_one_that_only_counts_agree_for_hundreds_of_steps(vocabulary: int) -> None:
    sender: Known = {}
    receiver: Known = {}
    counted: Known = {}
    choice, total = numpy_stream(1, "labels-test"), 0
    for step in range(300):
        samples = told(*(int(one) for one in choice.integers(0, 40, choice.integers(1, 5))))
        labels = labels_of(samples.ids, samples.rows)
        packet, sender = send_labels(labels, vocabulary, sender, samples)
        size, counted = count_labels(len(labels), vocabulary, counted, samples)
        assert size == packet.size_bytes
        found, receiver = receive_labels(packet, vocabulary, len(labels), receiver, samples)
        assert torch.equal(found, labels)
        assert list(sender) == list(receiver) == list(counted)
        total += packet.shape[0]
        if step % 50 == 49:
            receiver = MEMORY.restore(MEMORY.flatten(receiver))
    assert total == sum(1 + one % 5 for one in sender), "each sample's labels have been sent once"


def test_of_a_sample_that_stands_twice_only_the_first_is_sent() -> None:
    assert fresh_of({}, told(4, 4, 2)) == [True, False, True]
    labels = labels_of(told(4, 4).ids, told(4, 4).rows)
    packet, known = send_labels(labels, VOCABULARY, {}, told(4, 4))
    assert packet.shape == (5,)
    assert torch.equal(receive_labels(packet, VOCABULARY, 10, {}, told(4, 4))[0], labels)
    assert list(known) == [4]


def test_what_is_known_is_not_changed_by_a_step() -> None:
    known: Known = {}
    send_labels(labels_of((3,), (4,)), VOCABULARY, known, told(3))
    assert known == {}


def test_without_samples_all_labels_are_sent() -> None:
    labels = labels_of((3,), (4,))
    packet, known = send_labels(labels, VOCABULARY, {}, None)
    assert (packet.shape, known) == ((4,), {})
    assert torch.equal(receive_labels(packet, VOCABULARY, 4, {}, None)[0], labels)
    assert count_labels(4, VOCABULARY, {}, None)[0] == packet.size_bytes


def test_labels_that_are_not_those_due_are_refused() -> None:
    labels = labels_of((3,), (4,))
    packet, known = send_labels(labels, VOCABULARY, {}, told(3))
    with pytest.raises(ProtocolError, match="for 0 tokens"):
        receive_labels(packet, VOCABULARY, 4, known, told(3))
    nothing, _ = send_labels(labels, VOCABULARY, known, told(3))
    with pytest.raises(ProtocolError, match="4 tokens"):
        receive_labels(nothing, VOCABULARY, 4, {}, told(3))
    with pytest.raises(ProtocolError, match="came with 2 tokens, it had 4"):
        receive_labels(nothing, VOCABULARY, 2, known, Samples((3,), (2,)))
    with pytest.raises(ProtocolError, match="4 tokens for a batch of 5"):
        receive_labels(nothing, VOCABULARY, 5, known, told(3))


def test_what_is_known_survives_a_checkpoint() -> None:
    _, known = send_labels(labels_of((3, 7), (4, 3)), VOCABULARY, {}, told(3, 7))
    states = with_labels(StreamStates(), known)
    again = unflattened(states.forms, flattened(states))
    for receiver in (False, True):
        found = known_labels(again, receiver)
        assert list(found) == [3, 7]
        assert all(torch.equal(found[one], known[one]) for one in known)
    assert known_labels(None) == {}
    assert with_labels(StreamStates(), {}) == StreamStates()
