"""Letters of secure aggregation that are malformed, out of order, or wrong: refused by name, and never a wrong sum."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from splitft.errors import ProtocolError
from splitft.secure import shamir
from splitft.secure.protocol import (
    Book,
    Confirmation,
    Envelopes,
    Keys,
    Masked,
    Shares,
    Survivors,
    Unmasking,
    keys_text,
    signer,
)

from .scenes import Played, even_terms, key_of


def test_letters_out_of_order_are_refused_on_both_sides() -> None:
    played = Played(even_terms(3))
    with pytest.raises(ProtocolError, match="Book after anything"):
        played.clients[0].answer(Book(()))
    played.play(until="inputs")
    with pytest.raises(ProtocolError, match="Survivors after shared"):
        played.clients[0].answer(Survivors((0, 1, 2)))
    with pytest.raises(ProtocolError, match="Unmasking of client 0 is not due"):
        played.server.take(0, Unmasking({}, {}))
    with pytest.raises(ProtocolError, match="client 9 is not due"):
        played.server.take(9, Masked(()))
    masked = played.clients[0].answer(played.letters[0])
    with pytest.raises(ProtocolError, match="Masked of client 0 is not due"):
        played.server.take(0, masked).take(0, masked)


def test_an_envelope_that_was_changed_costs_its_recipient_nothing() -> None:
    played = Played(even_terms(3)).play(until="inputs")
    letter = played.letters[0]
    assert isinstance(letter, Envelopes)
    broken = Envelopes({sender: data[:-1] + bytes([data[-1] ^ 1]) for sender, data in letter.envelopes.items()})
    for wrong, match in (
        (broken, "the shares of client 1 were changed"),
        (Envelopes({1: letter.envelopes[2], 2: letter.envelopes[1]}), "changed"),
        (Envelopes({1: letter.envelopes[1]}), "shares of 2 clients"),
        (Envelopes({**letter.envelopes, 7: b""}), "not in the book"),
    ):
        with pytest.raises(ProtocolError, match=match):
            played.clients[0].answer(wrong)
    assert isinstance(played.clients[0].answer(letter), Masked)


def wrong_answers() -> list[tuple[str, Callable[[Unmasking], Unmasking], str]]:
    other = shamir.split(bytes(32), 2, [1, 2])[1]
    return [
        ("length", lambda one: Unmasking({4: b""}, one.seeds), "client 1 answered is no share"),
        ("field", lambda one: Unmasking({4: b"\xff" * 33}, one.seeds), "client 1 answered is no share"),
        ("whose", lambda one: Unmasking({}, one.seeds), "for others than were asked"),
        ("both", lambda one: Unmasking({**one.keys, 0: other}, one.seeds), "for others than were asked"),
        ("key", lambda one: Unmasking({4: other}, one.seeds), "do not give its key|different secrets"),
        ("seed", lambda one: Unmasking(one.keys, {**one.seeds, 0: (other,)}), "what it committed to|different secrets"),
    ]


@pytest.mark.parametrize(("change", "match"), [one[1:] for one in wrong_answers()], ids=[one[0] for one in wrong_answers()])
def test_wrong_shares_are_refused_by_name_and_never_give_a_wrong_sum(change: Callable[[Unmasking], Unmasking], match: str) -> None:
    def tamper(phase: str, client: int, letter: object) -> object:
        return change(letter) if phase == "answers" and client == 1 and isinstance(letter, Unmasking) else letter

    with pytest.raises(ProtocolError, match=match):
        Played(even_terms(5, threshold=4), silent={4: "inputs"}, tamper=tamper).opened()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("phase", "wrong", "match"),
    [
        ("keys", Keys(0, bytes(32), bytes(31), b""), "wrong length"),
        ("keys", Keys(1, bytes(32), bytes(32), b""), "sent keys of client 1"),
        ("keys", Keys(0, bytes(32), bytes(32), bytes(200)), "not signed"),
        ("shares", Shares({1: b"", 2: b""}, (bytes(32),)), "one for every other"),
        ("shares", Shares({1: bytes(82)}, (bytes(32),)), "one for every other"),
        ("shares", Shares({1: bytes(82), 2: bytes(82)}, ()), "one for every cohort"),
        ("inputs", Masked((bytes(8),)), "wrong length"),
        ("inputs", Masked(()), "wrong length"),
        ("confirmations", Confirmation(0, bytes(8)), "not signed"),
        ("confirmations", Confirmation(1, bytes(8)), "confirmation of client 1"),
    ],
)
def test_malformed_letters_are_refused_by_the_server(phase: str, wrong: Keys, match: str) -> None:
    played = Played(even_terms(3)).play(until=phase)
    with pytest.raises(ProtocolError, match=match):
        played.server.take(0, wrong)


def test_a_key_of_small_order_is_refused_by_name_though_its_owner_signed_it() -> None:
    played = Played(even_terms(5, threshold=3)).play(until="shares")
    keys = {one.client: one for one in played.server.book.keys}
    channel = bytes(32)
    keys[2] = Keys(2, channel, keys[2].mask, signer(key_of(2))(keys_text(played.terms.digest, 2, channel, keys[2].mask)))
    with pytest.raises(ProtocolError, match="the public key of client 2 is no point"):
        played.clients[0].answer(Book(tuple(keys.values())))
