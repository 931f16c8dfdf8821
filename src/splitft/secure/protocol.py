"""What is said in secure aggregation: terms and letters, what is signed, what is checked on arrival.

Practical Secure Aggregation, Bonawitz et al. 2017 (doi 10.1145/3133956.3133982), against a server that may lie, which takes its fifth,
confirming phase:

    server                                      client
    Terms (who, threshold, whose columns)   ->
                                            <-  Keys: two fresh public keys, signed with the key of the client's certificate
    Book (everybody's Keys)                 ->
                                            <-  Shares: of its mask key and its own seeds, an envelope for every other
    Envelopes (what the others sent it)     ->
                                            <-  Masked: values + own mask + pairwise masks
    Survivors (whose input came)            ->
                                            <-  Confirmation: a signature under exactly this list
    Confirmations (a threshold of them)     ->
                                            <-  Unmasking: of every survivor its own seeds' shares, of every other its mask key's share

A client may fall silent at any point; as long as `threshold` are left the sum is that of the survivors, exactly. What it does not do:
a client that lies about its values is not found out (nobody sees them), and the server together with c clients learns what those know,
where 2 threshold > members + c; see `secure_threshold`. Each cohort's sum is seen: with three owners two of them can read the third's.
Trust comes from certificates: whoever can have false clients certified can surround an honest one with them.

All of this is about these letters. Whoever also sees a client's activations, labels and gradients computes its update again without them;
whoever gives those gradients chooses what the clients' updates are, and can make a sum that is one client's (Pasquini, Francati, Ateniese
2022, arXiv 2111.07380). The server of a split training does both.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import TypeAlias

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256

from splitft.errors import ConfigError, ProtocolError
from splitft.secure.cohorts import LEAST_COHORT, Cohort, joined, owned_by
from splitft.secure.field import FixedPoint
from splitft.secure.masks import KEY_BYTES, TAG_BYTES
from splitft.secure.shamir import SAME_VERSION, SHARE_BYTES

MOST_MEMBERS = 1000
LONGEST_SIGNATURE_BYTES = 80
COMMITMENT_BYTES = 32

# Signs with the key of the client's certificate.
Sign: TypeAlias = Callable[[bytes], bytes]
# The public key of every member's certificate, which the reader has checked against the federation's authority.
Identities: TypeAlias = Mapping[int, ec.EllipticCurvePublicKey]


class Terms(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a sealing is: the same for all members, who sign it. `members` ascending; one column past the adapter's holds the weights.

    Raises ProtocolError for terms that no honest server would propose.
    """

    run: str
    round: int
    members: tuple[int, ...]
    threshold: int
    minimum: int
    number: FixedPoint
    columns: int
    cohorts: tuple[Cohort, ...]

    def __post_init__(self) -> None:
        count = len(self.members)
        problem = ""
        if not LEAST_COHORT <= count <= MOST_MEMBERS or list(self.members) != sorted(set(self.members)) or min(self.members) < 0:
            problem = f"{count} members; allowed are {LEAST_COHORT} to {MOST_MEMBERS}, ascending"
        elif not count < 2 * self.threshold <= 2 * count:
            problem = f"a threshold of {self.threshold} of {count} members; needed is more than half"
        elif self.minimum < LEAST_COHORT:
            problem = f"a minimum cohort of {self.minimum}; needed are {LEAST_COHORT}"
        elif self.number.clients < count:
            problem = f"a fixed point for {self.number.clients} clients where {count} take part"
        else:
            problem = _cohort_problem(self)
        if problem:
            raise ProtocolError(f"the terms of a sealing have {problem}.", "check the server's version and configuration.")

    @property
    def digest(self) -> bytes:
        """What every key and signature of this sealing is bound to."""
        return hashlib.sha256(b"splitft sealing, terms" + msgspec.msgpack.encode(self)).digest()

    def own(self, client: int) -> tuple[int, ...]:
        """The numbers of a client's cohorts."""
        return tuple(number for number, cohort in enumerate(self.cohorts) if client in cohort.owners)


def _cohort_problem(terms: Terms) -> str:
    """What is wrong with the cohorts, or nothing."""
    members, taken = set(terms.members), []
    for cohort in terms.cohorts:
        owners = set(cohort.owners)
        if len(owners) != len(cohort.owners) or not owners <= members or len(owners) < max(terms.minimum, LEAST_COHORT):
            return f"a cohort of clients {cohort.owners}; needed are {terms.minimum} or more of the members"
        if joined(cohort.ranges) != cohort.ranges or cohort.size < 1:
            return "columns of a cohort out of order"
        taken += list(cohort.ranges)
    taken.sort()
    if any(before[1] > after[0] for before, after in pairwise(taken)):
        return "a column in two cohorts"
    if not taken or taken[0][0] < 0 or taken[-1][1] != terms.columns:
        return f"columns that are not those up to {terms.columns}"
    if any((own := owned_by(terms.cohorts, member)) == () or own[-1][1] != terms.columns for member in members):
        return "a member without a weight"
    return ""


def secure_threshold(members: int, colluding: int | None = None) -> int:
    """The fewest clients that must stay to open a sum, such that the server with so many clients on its side (None: just under a third)
    learns nothing but sums from these letters. Raises ConfigError where no threshold can do that."""
    wanted = (2 * members) // 3 + 1 if colluding is None else (members + colluding) // 2 + 1
    if wanted > members or members < LEAST_COHORT:
        raise ConfigError(
            f"secure aggregation of {members} clients, {colluding or 0} of them on the server's side, is not possible.",
            f"take {LEAST_COHORT} clients or more, and fewer than all but two of them dishonest.",
        )
    return wanted


class Keys(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A client's public keys for one sealing: `channel` to seal envelopes, `mask` to agree on pairwise masks."""

    client: int
    channel: bytes
    mask: bytes
    signature: bytes


class Book(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The keys of everyone who advertised, by client."""

    keys: tuple[Keys, ...]

    @property
    def digest(self) -> bytes:
        return hashlib.sha256(b"splitft sealing, keys" + msgspec.msgpack.encode(self)).digest()

    @property
    def clients(self) -> tuple[int, ...]:
        return tuple(one.client for one in self.keys)


class Shares(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A client's shares, an envelope for every other in the book, and what commits it to its own seeds, one per cohort of its."""

    envelopes: dict[int, bytes]
    commitments: tuple[bytes, ...]


class Envelopes(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the others have sent to one client, by sender."""

    envelopes: dict[int, bytes]


class Masked(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A client's masked words, one vector per cohort of its."""

    vectors: tuple[bytes, ...]


class Survivors(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Whose masked inputs have come, ascending."""

    clients: tuple[int, ...]


class Confirmation(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A client's word that it has been shown this list of survivors and will answer for no other."""

    client: int
    signature: bytes


class Confirmations(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """At least `threshold` of them."""

    signed: tuple[Confirmation, ...]


class Unmasking(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Shares: of the mask keys of those who fell silent, and of the survivors' own seeds, one per cohort that may be opened."""

    keys: dict[int, bytes]
    seeds: dict[int, tuple[bytes, ...]]


ToClient: TypeAlias = Terms | Book | Envelopes | Survivors | Confirmations
ToServer: TypeAlias = Keys | Shares | Masked | Confirmation | Unmasking


def keys_text(terms: bytes, client: int, channel: bytes, mask: bytes) -> bytes:
    """What a client signs when it advertises."""
    return b"splitft sealing, my keys" + terms + client.to_bytes(4, "little") + channel + mask


def survivors_text(terms: bytes, book: bytes, survivors: Sequence[int]) -> bytes:
    """What a client signs when it confirms."""
    return b"splitft sealing, these came through" + terms + book + b"".join(one.to_bytes(4, "little") for one in survivors)


def commitment(terms: bytes, client: int, cohort: int, seed: bytes) -> bytes:
    """Binds a client to a seed before anybody sees a share of it."""
    place = client.to_bytes(4, "little") + cohort.to_bytes(4, "little")
    return hashlib.sha256(b"splitft sealing, seed" + terms + place + seed).digest()


def signer(key: ec.EllipticCurvePrivateKey) -> Sign:
    """Signs with a certificate's key (ECDSA, SHA-256)."""
    return lambda text: key.sign(text, ec.ECDSA(SHA256()))


def check_signature(identities: Identities, client: int, signature: bytes, text: bytes, what: str) -> None:
    """Raises ProtocolError unless `client` signed `text` with the key of its certificate."""
    identity = identities.get(client)
    if identity is None:
        raise ProtocolError(f"{what} of client {client}, whose certificate was not shown.", "the server must show the whole roster.")
    try:
        if len(signature) > LONGEST_SIGNATURE_BYTES:
            raise InvalidSignature
        identity.verify(signature, text, ec.ECDSA(SHA256()))
    except InvalidSignature as problem:
        raise ProtocolError(f"{what} of client {client}: not signed by it.", "somebody in between has changed them.") from problem


def check_keys(terms: Terms, keys: Keys, identities: Identities) -> None:
    """Raises ProtocolError unless these are the keys of a member of this sealing, and its own."""
    if keys.client not in terms.members:
        raise ProtocolError(f"keys of client {keys.client}, which is no member of the sealing.", SAME_VERSION)
    if len(keys.channel) != KEY_BYTES or len(keys.mask) != KEY_BYTES:
        raise ProtocolError(f"the keys of client {keys.client} have a wrong length.", SAME_VERSION)
    text = keys_text(terms.digest, keys.client, keys.channel, keys.mask)
    check_signature(identities, keys.client, keys.signature, text, "the keys")


def check_book(terms: Terms, book: Book, identities: Identities) -> None:
    """Raises ProtocolError unless the book has enough members' own keys, each once."""
    if list(book.clients) != sorted(set(book.clients)):
        raise ProtocolError("the book of keys is out of order.", SAME_VERSION)
    require_enough(terms, len(book.keys), "keys")
    points = {point for one in book.keys for point in (one.channel, one.mask)}
    if len(points) != 2 * len(book.keys):
        raise ProtocolError("a key stands twice in the book of keys.", SAME_VERSION)
    for one in book.keys:
        check_keys(terms, one, identities)


def check_confirmations(terms: Terms, book: Book, survivors: Sequence[int], signed: Sequence[Confirmation], identities: Identities) -> None:
    """Raises ProtocolError unless a threshold of survivors has signed this list and no client counts twice."""
    clients = [one.client for one in signed]
    if len(set(clients)) != len(clients) or not set(clients) <= set(survivors):
        raise ProtocolError("confirmations of somebody who is no survivor, or one twice.", SAME_VERSION)
    require_enough(terms, len(clients), "confirmations")
    text = survivors_text(terms.digest, book.digest, survivors)
    for one in signed:
        check_signature(identities, one.client, one.signature, text, "the confirmation")


def require_enough(terms: Terms, count: int, what: str) -> None:
    """Raises ProtocolError when fewer than the threshold are left: then nothing can be opened, and nothing is given away."""
    if count < terms.threshold:
        raise ProtocolError(
            f"{what} of {count} clients; a sealing of {len(terms.members)} needs {terms.threshold}.", "the round goes without them."
        )


def envelope_bytes(cohorts: int) -> int:
    """The length of an envelope with the shares of a client in so many cohorts."""
    return (1 + cohorts) * SHARE_BYTES + TAG_BYTES
