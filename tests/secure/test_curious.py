"""A server that tries: it keeps all it hears, asks for what it may not have, forges drop-outs, swaps keys; and how a transcript looks."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import msgspec
import numpy as np
import pytest

from splitft.errors import ProtocolError
from splitft.secure import masks, shamir
from splitft.secure.client import Hidden, own_words
from splitft.secure.field import from_bytes
from splitft.secure.protocol import (
    Book,
    Confirmation,
    Confirmations,
    Keys,
    Survivors,
    Terms,
    Unmasking,
    keys_text,
    signer,
    survivors_text,
)
from splitft.secure.server import Sealing

from .scenes import Played, even_terms, identities, key_of, terms_of


def at_survivors(count: int = 5, threshold: int = 3) -> Played:
    """A sealing in which all inputs are in, and the server is about to say who came through."""
    return Played(even_terms(count, threshold=threshold)).play(until="confirmations")


# -- asking for both secrets of one client --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "threshold"), [(3, 2), (4, 3), (5, 3), (6, 4)])
def test_no_two_lists_can_both_be_confirmed(count: int, threshold: int) -> None:
    """Every way of showing one list to some and another to the rest: at most one gets a threshold of signatures, so at most one is
    answered, and no client's two secrets ever come together."""
    everyone = tuple(range(count))
    played = at_survivors(count, threshold)
    before = {client: (one.phase, dict(one.answers)) for client, one in played.clients.items()}
    for told in itertools.product((0, 1), repeat=count):
        for forged in (everyone[1:], everyone[:threshold]):
            if len(forged) < threshold or sum(told) == 0:
                continue
            for client, (phase, answers) in before.items():
                played.clients[client].phase, played.clients[client].answers = phase, dict(answers)
            lists = {0: everyone, 1: forged}
            signed: dict[int, list[Confirmation]] = {0: [], 1: []}
            for client in everyone:
                try:
                    answer = played.clients[client].answer(Survivors(lists[told[client]]))
                except ProtocolError:
                    assert client not in forged  # it is called silent though it spoke
                    continue
                assert isinstance(answer, Confirmation)
                signed[told[client]].append(answer)
            answered = []
            for which in (0, 1):
                for client in (one.client for one in signed[which]):
                    try:
                        answer = played.clients[client].answer(Confirmations(tuple(signed[which])))
                    except ProtocolError:
                        continue
                    assert isinstance(answer, Unmasking)
                    answered.append((which, answer))
            assert len({which for which, _ in answered}) <= 1
            for peer in everyone:
                kinds = {("key", peer in answer.keys) for _, answer in answered} | {
                    ("seed", peer in answer.seeds) for _, answer in answered
                }
                assert not {("key", True), ("seed", True)} <= kinds


def test_a_client_signs_one_list_and_answers_once() -> None:
    played = at_survivors()
    first = played.clients[0].answer(Survivors((0, 1, 2, 3, 4)))
    assert played.clients[0].answer(Survivors((0, 1, 2, 3, 4))) == first  # a letter that comes again, over a bad line
    with pytest.raises(ProtocolError, match="a second Survivors other than the first"):
        played.clients[0].answer(Survivors((0, 1, 2)))


def test_confirmations_of_another_list_open_nothing() -> None:
    played = at_survivors()
    everyone, forged = (0, 1, 2, 3, 4), (0, 1, 2)
    played.clients[0].answer(Survivors(everyone))
    others = tuple(
        Confirmation(k, signer(key_of(k))(survivors_text(played.terms.digest, played.server.book.digest, forged))) for k in forged
    )
    with pytest.raises(ProtocolError, match="not signed by it"):
        played.clients[0].answer(Confirmations(others))
    mine = played.clients[1].answer(Survivors(everyone))
    assert isinstance(mine, Confirmation)
    for signed in ((mine,), (mine, mine, mine), (mine, Confirmation(0, mine.signature), Confirmation(2, mine.signature))):
        with pytest.raises(ProtocolError):
            played.clients[1].answer(Confirmations(signed))


def test_a_survivors_list_that_is_short_or_strange_is_refused() -> None:
    for wrong in ((0, 1), (1, 2, 3), (0, 1, 2, 9), (0, 2, 1), (0, 0, 1, 2)):
        with pytest.raises(ProtocolError, match=r"survivors|inputs of 2 clients"):
            at_survivors().clients[0].answer(Survivors(wrong))


def test_a_low_threshold_would_give_a_client_away() -> None:
    """The broken twin: were half enough, two lists could both be confirmed. The terms cannot even be written down."""
    with pytest.raises(ProtocolError, match="needed is more than half"):
        even_terms(6, threshold=3)


def two_lists(threshold: int) -> np.ndarray | None:
    """The server with client 4 on its side against client 0, of five: what it makes of client 0's input, if it gets so far."""
    played = at_survivors(5, threshold)
    server, context, colluding = played.server, played.terms.digest, played.clients[4].phase
    everyone, without = (0, 1, 2, 3, 4), (1, 2, 3, 4)
    assert isinstance(colluding, Hidden)
    shares: dict[str, dict[int, bytes]] = {"seed": {5: colluding.held[0][1]}, "key": {5: colluding.held[0][0]}}
    for told, shown in ((everyone, (0, 1)), (without, (2, 3))):
        signed = [played.clients[k].answer(Survivors(told)) for k in shown]
        signed.append(Confirmation(4, signer(key_of(4))(survivors_text(context, server.book.digest, told))))
        for client in shown:
            try:
                answer = played.clients[client].answer(Confirmations(tuple(one for one in signed if isinstance(one, Confirmation))))
            except ProtocolError:
                continue
            assert isinstance(answer, Unmasking)
            if 0 in answer.keys:
                shares["key"][client + 1] = answer.keys[0]
            else:
                shares["seed"][client + 1] = answer.seeds[0][0]
    try:
        seed, private = (shamir.combine(shares[kind], threshold) for kind in ("seed", "key"))
    except ProtocolError:
        return None
    words = from_bytes(server.inputs[0].vectors[0])
    masks.add_mask(words, seed, context, 0, minus=True)
    for peer in without:
        shared = masks.agree(masks.pair_of(private), server.keys[peer].mask, context, b"pairwise", "")
        masks.add_mask(words, shared, context, 0, minus=True)
    truth = own_words(played.terms, 0, played.rows[0], played.weights[0])[0]
    assert np.array_equal(words, truth)
    return words


def test_colluding_clients_are_what_the_threshold_allows_for() -> None:
    """With a bare majority of five, one client on the server's side is enough to have two lists confirmed, and client 0 is read to the
    last bit; with the default, two thirds, the same server gets nothing. So the default is that."""
    assert two_lists(3) is not None
    assert two_lists(4) is None
    assert even_terms(5).threshold == 4


# -- reading the transcript ------------------------------------------------------------------------------------------------------------


def candidates(server: Sealing, helpers: set[int]) -> tuple[dict[int, bytes], dict[int, bytes]]:
    """Every secret that a server with these clients' answers can put together: mask keys and seeds, by client."""
    keys, seeds = {}, {}
    for client in server.shares:
        key_shares = {k + 1: server.answers[k].keys[client] for k in helpers if client in server.answers[k].keys}
        seed_shares = {k + 1: server.answers[k].seeds[client][0] for k in helpers if client in server.answers[k].seeds}
        if len(key_shares) >= server.terms.threshold:
            keys[client] = shamir.combine(key_shares, server.terms.threshold)
        if len(seed_shares) >= server.terms.threshold:
            seeds[client] = shamir.combine(seed_shares, server.terms.threshold)
    return keys, seeds


def test_no_subset_of_an_honest_transcript_shows_a_single_update() -> None:
    """The server takes every subset of inputs it has, adds or subtracts every mask it can compute, and compares with what each client put
    in: only the whole set gives the sum of its members."""
    played = Played(even_terms(5, columns=6, threshold=3), silent={4: "inputs", 2: "answers"}).play()
    server, context = played.server, played.terms.digest
    inputs = {client: from_bytes(one.vectors[0]) for client, one in server.inputs.items()}
    keys, seeds = candidates(server, set(server.answers))
    assert set(keys) == {4}
    assert set(seeds) == set(inputs) == {0, 1, 2, 3}
    known = {}
    for client, words in inputs.items():  # all that can be taken off alone: its own mask, and that with the client who fell silent
        opened = words.copy()
        masks.add_mask(opened, seeds[client], context, 0, minus=True)
        pair = masks.pair_of(keys[4])
        masks.add_mask(opened, masks.agree(pair, server.keys[client].mask, context, b"pairwise", ""), context, 0, minus=client < 4)
        known[client] = opened
    plain = {client: own_words(played.terms, client, played.rows[client], played.weights[client])[0] for client in inputs}
    for size in range(1, 5):
        for chosen in itertools.combinations(inputs, size):
            guess = sum((known[client] for client in chosen), np.zeros(7, dtype=np.uint64))
            truth = sum((plain[client] for client in chosen), np.zeros(7, dtype=np.uint64))
            assert np.array_equal(guess, truth) == (size == 4)
            if size < 4:
                assert not (guess == truth).any()


def test_shares_below_the_threshold_do_not_open_and_envelopes_stay_shut() -> None:
    played = Played(even_terms(5, columns=6, threshold=3)).play()
    for helpers in itertools.combinations(range(5), 2):
        assert candidates(played.server, set(helpers)) == ({}, {})
    # The server passes envelopes on; with every public key and none of the private ones it cannot read them.
    server, context = played.server, played.terms.digest
    for sender, shares in server.shares.items():
        for recipient, data in shares.envelopes.items():
            for pair in (masks.new_pair(), masks.KeyPair(masks.new_pair().private, server.keys[sender].channel)):
                secret = masks.agree(pair, server.keys[recipient].channel, context, b"channel", "")
                with pytest.raises(ProtocolError, match="changed on their way"):
                    masks.open_envelope(secret, context, sender, recipient, data)


def chi_square(data: bytes) -> float:
    """Of bytes against the uniform distribution; 255 degrees of freedom: mean 255, standard deviation 22.6."""
    counts = np.bincount(np.frombuffer(data, dtype=np.uint8), minlength=256)
    expected = len(data) / 256
    return float(((counts - expected) ** 2 / expected).sum())


def test_a_masked_input_is_uniform_and_what_it_hides_is_not() -> None:
    played = Played(even_terms(4, columns=20_000)).play()
    for client in played.terms.members:
        vector = played.server.inputs[client].vectors[0]
        assert chi_square(vector) < 255 + 6 * 22.6
        assert chi_square(own_words(played.terms, client, played.rows[client], played.weights[client])[0].tobytes()) > 10_000
        for byte in range(8):  # at every place of a word as well
            assert chi_square(vector[byte::8]) < 255 + 6 * 22.6
    # Also of nothing at all: what is seen does not depend on the values.
    empty = Played(even_terms(4, columns=20_000))
    empty.rows = {client: np.zeros(20_000, dtype=np.float32) for client in empty.rows}
    empty.clients = {client: empty.client(client, identities(empty.terms.members)) for client in empty.terms.members}
    assert all(chi_square(one.vectors[0]) < 255 + 6 * 22.6 for one in empty.play().server.inputs.values())


def test_masks_are_fresh_every_time() -> None:
    """The same values, clients and certificates again: nothing that was sent comes twice, and the masked inputs' difference, which would be
    zero had a mask been used twice, is itself uniform. In the same round too, as after a restart."""
    for second in (1, 2):
        runs = [Played(even_terms(4, columns=20_000, round_index=index)).play() for index in (1, second)]
        for client in range(4):
            one, other = (from_bytes(played.server.inputs[client].vectors[0]) for played in runs)
            assert chi_square((one - other).tobytes()) < 255 + 6 * 22.6
            assert not (one == other).any()
            first, again = (played.server.keys[client] for played in runs)
            assert len({first.mask, again.mask, first.channel, again.channel}) == 4
            assert not set(runs[0].server.shares[client].commitments) & set(runs[1].server.shares[client].commitments)
        assert runs[0].server.opened().sums[0].tolist() == runs[1].server.opened().sums[0].tolist()


def test_a_client_keeps_its_secrets_out_of_its_repr() -> None:
    played = at_survivors()
    phase = played.clients[0].phase
    assert phase is not None
    shown = repr(phase)
    for secret in (phase.drawn.mask.private, phase.drawn.channel.private, *phase.drawn.seeds.values()):
        assert repr(secret) not in shown


# -- a server in between ---------------------------------------------------------------------------------------------------------------


def forged_book(change: Callable[[Keys, Terms], Keys]) -> tuple[Played, Book]:
    played = Played(even_terms(5, threshold=3)).play(until="shares")
    keys = {one.client: one for one in played.server.book.keys}
    keys[2] = change(keys[2], played.terms)
    return played, Book(tuple(keys[client] for client in sorted(keys)))


def own_key(keys: Keys, terms: Terms) -> Keys:
    """The server's key under client 2's name, with 2's old signature."""
    return msgspec.structs.replace(keys, mask=masks.new_pair().public)


def signed_by_another(keys: Keys, terms: Terms) -> Keys:
    mask = masks.new_pair().public
    return Keys(2, keys.channel, mask, signer(key_of(3))(keys_text(terms.digest, 2, keys.channel, mask)))


def of_another_round(keys: Keys, terms: Terms) -> Keys:
    other = msgspec.structs.replace(terms, round=terms.round + 1)
    return msgspec.structs.replace(keys, signature=signer(key_of(2))(keys_text(other.digest, 2, keys.channel, keys.mask)))


@pytest.mark.parametrize("change", [own_key, signed_by_another, of_another_round])
def test_keys_that_their_owner_did_not_sign_are_refused(change: Callable[[Keys, Terms], Keys]) -> None:
    played, book = forged_book(change)
    for client in (0, 1, 2, 3, 4):
        with pytest.raises(ProtocolError, match="client 2"):
            played.clients[client].answer(book)


def test_a_member_whose_certificate_was_not_shown_is_refused() -> None:
    played = Played(even_terms(5, threshold=3)).play(until="shares")
    played.clients[0].identities = identities((0, 1, 3, 4))
    with pytest.raises(ProtocolError, match="client 2, whose certificate was not shown"):
        played.clients[0].answer(played.server.book)


def test_books_that_lack_keys_or_have_one_twice_are_refused() -> None:
    played = Played(even_terms(5, threshold=3)).play(until="shares")
    keys = played.server.book.keys
    stolen_text = keys_text(played.terms.digest, 2, keys[2].channel, keys[1].mask)
    stolen = Keys(2, keys[2].channel, keys[1].mask, signer(key_of(2))(stolen_text))
    for wrong, match in (
        (keys[:2], "keys of 2 clients"),
        (keys[1:], "other keys of client 0"),
        (keys[::-1], "out of order"),
        ((keys[0], *keys), "out of order"),
        ((*keys[:2], stolen, *keys[3:]), "a key stands twice"),
    ):
        with pytest.raises(ProtocolError, match=match):
            played.clients[0].answer(Book(wrong))


def test_terms_with_other_columns_than_the_plan_s_are_refused() -> None:
    """Else a server could call a block shared that lies at one client alone."""
    client = Played(terms_of({0: ((0, 10),), 1: ((0, 20),), 2: ((0, 20),), 3: ((0, 20),)}, 20)).clients[0]
    everyone = dict.fromkeys(range(4), ((0, 20),))
    for wrong in (terms_of(everyone, 20), terms_of(dict.fromkeys(range(1, 5), ((0, 20),)), 20)):
        with pytest.raises(ProtocolError, match="columns that its plan does not"):
            client.answer(wrong)
    assert isinstance(client.answer(terms_of({**everyone, 0: ((2, 9),)}, 20)), Keys)  # to leave some out gives nothing away


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"threshold": 2}, "more than half"),
        ({"threshold": 6}, "more than half"),
        ({"minimum": 2}, "minimum cohort"),
        ({"members": (0, 1)}, "2 members"),
        ({"members": (0, 1, 1, 2, 3)}, "ascending"),
        ({"columns": 30}, "columns that are not"),
    ],
)
def test_terms_no_honest_server_proposes_are_refused_on_arrival(changes: dict[str, object], match: str) -> None:
    fields = msgspec.to_builtins(even_terms(5)) | changes
    with pytest.raises((ProtocolError, msgspec.ValidationError), match=match):
        msgspec.msgpack.decode(msgspec.msgpack.encode(fields), type=Terms)
