"""Where masks come from: X25519 agreement, HKDF-SHA256 and the ChaCha20 stream; sealed envelopes with ChaCha20-Poly1305.

Every key is derived for one purpose, one context (the digest of a sealing's terms) and one use, from keys made afresh for the sealing:
no mask and no nonce can come twice.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from splitft.errors import ProtocolError
from splitft.rng import fresh_bytes
from splitft.secure.field import WORD_BYTES, Words
from splitft.secure.shamir import SAME_VERSION

KEY_BYTES = 32
TAG_BYTES = 16
# The stream is taken in pieces, so that a mask of a large adapter does not take its size twice over.
PIECE_WORDS = 1 << 20
# A ChaCha20 key gives 2^32 blocks of 64 bytes before its counter comes round.
MOST_MASK_WORDS = (1 << 38) // WORD_BYTES


class KeyPair(NamedTuple):
    """An X25519 key of one sealing."""

    private: bytes
    public: bytes


def new_pair() -> KeyPair:
    """A fresh key."""
    return pair_of(fresh_bytes(KEY_BYTES))


def pair_of(private: bytes) -> KeyPair:
    """The key with this private half."""
    return KeyPair(private, X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw())


def derive(secret: bytes, context: bytes, purpose: bytes) -> bytes:
    """32 bytes for one purpose in one context."""
    return HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=context, info=b"splitft secure aggregation, " + purpose).derive(secret)


def agree(mine: KeyPair, theirs: bytes, context: bytes, purpose: bytes, whose: str) -> bytes:
    """The secret two keys share, the same from both sides. Raises ProtocolError for a public key that is none, or of a small order."""
    try:
        shared = X25519PrivateKey.from_private_bytes(mine.private).exchange(X25519PublicKey.from_public_bytes(theirs))
    except ValueError as problem:
        raise ProtocolError(f"the public key of {whose} is no point to agree on a secret with.", SAME_VERSION) from problem
    first, second = sorted((mine.public, theirs))
    return derive(shared, context, purpose + first + second)


def mask(seed: bytes, context: bytes, cohort: int, words: int) -> Words:
    """`words` numbers that nobody without `seed` can tell from uniform ones."""
    total = np.zeros(words, dtype=np.uint64)
    add_mask(total, seed, context, cohort)
    return total


def add_mask(total: Words, seed: bytes, context: bytes, cohort: int, minus: bool = False) -> None:
    """Add a mask to words, in place and modulo 2^64, or take it off again."""
    assert len(total) < MOST_MASK_WORDS
    key = derive(seed, context, b"mask of cohort " + cohort.to_bytes(4, "little"))
    stream = Cipher(ChaCha20(key, bytes(16)), mode=None).encryptor()  # a key of one use: its nonce may be zero
    for start in range(0, len(total), PIECE_WORDS):
        part = total[start : start + PIECE_WORDS]
        words = np.frombuffer(stream.update(bytes(len(part) * WORD_BYTES)), dtype="<u8")
        np.subtract(part, words, out=part) if minus else np.add(part, words, out=part)


def close_envelope(secret: bytes, context: bytes, sender: int, recipient: int, text: bytes) -> bytes:
    """`text` so that only the other holder of `secret` can read it, and sees who sent it to whom."""
    return _envelope(secret, context, sender, recipient).encrypt(bytes(12), text, context)


def open_envelope(secret: bytes, context: bytes, sender: int, recipient: int, data: bytes) -> bytes:
    """The text of an envelope. Raises ProtocolError when it is not from `sender` to `recipient` in this context."""
    try:
        return _envelope(secret, context, sender, recipient).decrypt(bytes(12), data, context)
    except InvalidTag as problem:
        raise ProtocolError(f"the shares of client {sender} were changed on their way to client {recipient}.", SAME_VERSION) from problem


def _envelope(secret: bytes, context: bytes, sender: int, recipient: int) -> ChaCha20Poly1305:
    ends = sender.to_bytes(4, "little") + recipient.to_bytes(4, "little")
    return ChaCha20Poly1305(derive(secret, context, b"shares from and to " + ends))  # a key of one use and one direction
