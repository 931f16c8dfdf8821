"""Normal numbers that nobody can predict without the key, nor work out from others of the same stream.

A generator for simulations would not do: who knows some of its numbers (where a client's value is known, the noise there is) can find its
state and with it all the others. Here the bits are the key stream of ChaCha20 under a key made of a secret and a name.

The name holds a digest of what is protected. The same values under the same secret get the same noise, so what is sent again or computed
again after a crash tells nothing new; other values never get noise that was used before, whose difference would show them bare.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20

KEY_BYTES = 32
Floats = npt.NDArray[np.float64]


def digest(*parts: bytes | memoryview) -> bytes:
    """What stands for the values in a name."""
    made = hashlib.blake2b(digest_size=KEY_BYTES)
    for part in parts:
        made.update(len(part).to_bytes(8, "little"))
        made.update(part)
    return made.digest()


def secret_normals(secret: bytes, purpose: str, values: bytes, count: int) -> Floats:
    """So many standard normal numbers for (`secret`, `purpose`, digest of the `values` to protect), float64.

    Two uniform numbers of 53 bits make two normal ones (Box and Muller 1958); the largest there can be is 8.6.
    """
    key = hashlib.blake2b(digest(purpose.encode(), values), key=secret, digest_size=KEY_BYTES).digest()
    pairs = (count + 1) // 2
    stream = Cipher(ChaCha20(key, bytes(16)), mode=None).encryptor().update(bytes(16 * pairs))
    uniform = ((np.frombuffer(stream, "<u8") >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    radius, angle = np.sqrt(-2.0 * np.log(uniform[:pairs])), 2.0 * np.pi * uniform[pairs:]
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]
