"""Secure aggregation between processes, letter by letter: certificates, members that vanish or lie, and what a client refuses."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import cache
from pathlib import Path

import msgspec
import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from splitft.clock import monotonic_s, utc_time
from splitft.deploy.certificates import certificate_pem, make_authority, make_leaf, new_key, read_certificate
from splitft.deploy.letters import Letter, pack
from splitft.deploy.sealing import Came, Insider, Offer, Pledges, SealedLetter, SealingMember, seal
from splitft.errors import IdentityError, PolicyError, ProtocolError, SplitftError
from splitft.secure.client import own_words
from splitft.secure.protocol import Identities, Keys, Terms
from splitft.secure.server import Sealing

from .scenes import even_terms

COLUMNS = 20


@cache
def authority() -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    key = new_key()
    return make_authority("clinic", key), key


@cache
def leaf(name: str, days_ago: int = 0) -> tuple[bytes, ec.EllipticCurvePrivateKey]:
    key = new_key()
    now = utc_time() - timedelta(days=days_ago)
    return certificate_pem(make_leaf(authority(), ("clinic", name), key.public_key(), days=30, now=now)), key


def insider(seat: int, **changes: object) -> Insider:
    pem, key = leaf(f"site-{seat}")
    return replace(Insider(seat, read_certificate(pem), key, authority()[0]), **changes)  # type: ignore[arg-type]


def row(client: int) -> np.ndarray:
    return np.random.default_rng(client).uniform(-1, 1, COLUMNS).astype(np.float32)


def member(seat: int, folder: Path | None = None, **changes: object) -> SealingMember:
    pledges = Pledges((folder or Path(tempfile.mkdtemp())) / f"sealed-{seat}")
    return SealingMember(insider(seat, **changes), "run", 1, ((0, COLUMNS),), row(seat), 10 + seat, pledges)


def certificates(count: int) -> dict[int, bytes]:
    return {seat: leaf(f"site-{seat}")[0] for seat in range(count)}


def known(count: int) -> Identities:
    return {seat: leaf(f"site-{seat}")[1].public_key() for seat in range(count)}


@dataclass
class Town:
    """A line to members in this process. `fate` of a member at a letter: "silent", "gone", "absent" or "wrong"."""

    members: dict[int, SealingMember]
    fate: dict[int, tuple[int, str]] = field(default_factory=dict)
    waiting: list[Came] = field(default_factory=list)
    refused: dict[int, SplitftError] = field(default_factory=dict)
    sent: list[tuple[int, int, bytes]] = field(default_factory=list)

    def send(self, client: int, kind: int, payload: bytes) -> bool:
        at, what = self.fate.get(client, (99, ""))
        if kind >= at and what == "absent":
            return False
        self.sent.append((client, kind, payload))
        if kind >= at and what == "gone":
            self.waiting.append(Came(client))
        elif kind >= at and what == "wrong":
            self.waiting.append(Came(client, kind + 1, b"\xc1"))
        elif kind < at:
            answer = self.members[client].answer(kind, payload)
            self.waiting.append(Came(client) if answer[0] == Letter.REFUSED else Came(client, *answer))
        return True

    def receive(self, timeout_s: float) -> Sequence[Came]:
        found, self.waiting = self.waiting, []
        return found

    def refuse(self, client: int, problem: SplitftError) -> None:
        self.refused[client] = problem


@pytest.fixture(autouse=True)
def no_traces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def play(count: int = 5, fate: dict[int, tuple[int, str]] | None = None, patience_s: float = 30.0) -> tuple[Town, Sealing]:
    town = Town({seat: member(seat) for seat in range(count)}, fate or {})
    return town, seal(Sealing(even_terms(count, COLUMNS), known(count)), certificates(count), town, patience_s)


def check_sum(sealing: Sealing, survivors: tuple[int, ...]) -> None:
    opened = sealing.opened()
    assert opened.survivors == survivors
    plain = sum((own_words(sealing.terms, k, row(k), 10 + k)[0] for k in survivors), np.zeros(COLUMNS + 1, dtype=np.uint64))
    assert opened.sums[0].tolist() == plain.tolist()


def test_the_letters_carry_a_sealing_to_its_sum() -> None:
    town, sealing = play()
    check_sum(sealing, (0, 1, 2, 3, 4))
    assert {kind for _, kind, _ in town.sent} == {12, 14, 16, 18, 20}
    assert max(Letter) < min(SealedLetter)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("what", ["silent", "gone", "absent", "wrong"])
@pytest.mark.parametrize("at", [12, 14, 16, 18, 20])
def test_whoever_falls_out_leaves_the_sum_of_the_others(at: int, what: str) -> None:
    """Only one that is merely silent is waited for, and not for longer than patience."""
    began_s = monotonic_s()
    town, sealing = play(fate={3: (at, what)}, patience_s=0.2 if what == "silent" else 30.0)
    check_sum(sealing, (0, 1, 2, 3, 4) if at >= 18 else (0, 1, 2, 4))
    assert monotonic_s() - began_s < 10
    assert set(town.refused) == ({3} if what == "wrong" else set())


@pytest.mark.parametrize("at", [12, 16, 20])
def test_too_few_left_end_it(at: int) -> None:
    with pytest.raises(ProtocolError, match="of 3 clients; a sealing of 5 needs 4"):
        play(fate={1: (at, "gone"), 3: (at, "gone")})


def test_a_round_that_is_done_again_is_summed_over_the_same_clients_or_not_at_all(tmp_path: Path) -> None:
    """A server that feigns a restart gets the same updates again: the sum of all less the sum without client 3 would be client 3's."""

    def again(fate: dict[int, tuple[int, str]]) -> Sealing:
        town = Town({seat: member(seat, tmp_path) for seat in range(5)}, fate)
        return seal(Sealing(even_terms(5, COLUMNS), known(5)), certificates(5), town, 30.0)

    check_sum(again({}), (0, 1, 2, 3, 4))
    check_sum(again({}), (0, 1, 2, 3, 4))
    with pytest.raises(ProtocolError, match="confirmations of 0 clients; a sealing of 5 needs 4"):
        again({3: (16, "gone")})
    pledges = Pledges(tmp_path / "sealed-0")
    pledges.keep(2, (0, 1, 2))
    with pytest.raises(ProtocolError, match=r"a sealing of round 1 .* confirmed was round 2"):
        pledges.keep(1, (0, 1, 2, 3, 4))


def offer(terms: Terms | None = None, **pems: bytes) -> Offer:
    shown = {**certificates(5), **{int(seat[1:]): pem for seat, pem in pems.items()}}
    return Offer(terms or even_terms(5, COLUMNS), list(shown.values()))


@pytest.mark.parametrize(
    ("given", "error", "match"),
    [
        (lambda: offer(s2=leaf("site-3")[0]), ProtocolError, "one client stands twice"),
        (lambda: offer(s0=leaf("site-9")[0]), ProtocolError, "another certificate in this client's place"),
        (lambda: offer(s2=leaf("site-8", 90)[0]), IdentityError, "the certificate of client 2 expired"),
        (lambda: offer(s2=b"nothing"), IdentityError, "the certificate of client 2 is no certificate"),
        (lambda: Offer(even_terms(5, COLUMNS), list(certificates(4).values())), ProtocolError, "4 certificates for 5 members"),
        (lambda: offer(even_terms(5, COLUMNS, round_index=2)), ProtocolError, "a sealing of round 2"),
        (lambda: offer(even_terms(5, COLUMNS + 1)), ProtocolError, "columns that its plan does not"),
    ],
)
def test_terms_that_a_client_refuses(given: Callable[[], Offer], error: type[SplitftError], match: str) -> None:
    client = member(0)
    with pytest.raises(error, match=match):
        client.answer(SealedLetter.SEALED_TERMS, pack(given()))


def test_a_certificate_of_another_authority_is_refused() -> None:
    key, own = new_key(), new_key()
    other = make_leaf((make_authority("clinic", own), own), ("clinic", "site-2"), key.public_key())
    with pytest.raises(IdentityError, match="not signed by this federation's authority"):
        member(0).answer(SealedLetter.SEALED_TERMS, pack(offer(s2=certificate_pem(other))))


def test_a_server_s_certificate_is_no_client_s() -> None:
    key = new_key()
    server = make_leaf(authority(), ("clinic", "server"), key.public_key(), ["localhost"])
    with pytest.raises(IdentityError, match="is not that of a client"):
        member(0).answer(SealedLetter.SEALED_TERMS, pack(offer(s2=certificate_pem(server))))


def test_a_client_s_policy_names_its_peers_and_its_threshold() -> None:
    everyone = frozenset(f"site-{seat}" for seat in range(1, 5))
    kind, _ = member(0, peers=everyone).answer(SealedLetter.SEALED_TERMS, pack(offer()))
    assert kind == SealedLetter.SEALED_KEYS
    with pytest.raises(PolicyError, match="a sealing with site-3, site-4"):
        member(0, peers=everyone - {"site-3", "site-4"}).answer(SealedLetter.SEALED_TERMS, pack(offer()))
    with pytest.raises(PolicyError, match="3 of 5 members can open"):
        member(0, least_threshold=2 / 3).answer(SealedLetter.SEALED_TERMS, pack(offer(even_terms(5, COLUMNS, threshold=3))))


def test_letters_before_the_terms_and_a_second_offer_are_refused() -> None:
    client = member(0)
    for kind in (SealedLetter.SEALED_BOOK, SealedLetter.SEALED_KEYS, 3):
        with pytest.raises(ProtocolError, match="before the terms"):
            client.answer(kind, b"")
    first = client.answer(SealedLetter.SEALED_TERMS, pack(offer()))
    assert client.answer(SealedLetter.SEALED_TERMS, pack(offer())) == first
    with pytest.raises(ProtocolError, match="a second offer"):
        client.answer(SealedLetter.SEALED_TERMS, pack(offer(even_terms(5, COLUMNS, threshold=5))))


@pytest.mark.parametrize("data", [b"", b"\xc1", b"\x80", pack(Keys(0, b"", b"", b""))])
def test_bytes_that_are_no_letter_are_refused(data: bytes) -> None:
    client = member(0)
    with pytest.raises(ProtocolError):
        client.answer(SealedLetter.SEALED_TERMS, data)
    client.answer(SealedLetter.SEALED_TERMS, pack(offer()))
    with pytest.raises(ProtocolError):
        client.answer(SealedLetter.SEALED_BOOK, data)


def test_a_fixed_point_that_could_overflow_is_refused() -> None:
    fields = msgspec.to_builtins(offer())
    fields["terms"]["number"]["fraction_bits"] = 60
    with pytest.raises(ProtocolError, match="could overflow 63 bits"):
        member(0).answer(SealedLetter.SEALED_TERMS, pack(fields))


def test_an_offer_stays_within_a_letter_for_a_thousand_members() -> None:
    """The certificates are most of it."""
    pem = leaf("site-0")[0]
    assert 1000 * len(pem) + len(pack(even_terms(1000, COLUMNS))) < 1 << 20
