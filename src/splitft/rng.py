"""Named random streams, derived from (seed, purpose, client, round, step). The only file that may make randomness.

Two streams with different names are independent; the same name gives the same numbers on every machine and in any order of
calls. There is no global seeding, so nothing a library draws can shift what splitft draws.
"""

from __future__ import annotations

import hashlib
import secrets
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    from splitft.keyed import KeyedGenerator

KEY_BYTES = 32


def stream_seed(seed: int, purpose: str, *indices: int) -> int:
    """A 63-bit seed for the stream called (`seed`, `purpose`, `indices`), by BLAKE2b over its name."""
    return int.from_bytes(hashlib.blake2b(_name(seed, purpose, *indices), digest_size=8).digest(), "little") >> 1


def stream_key(seed: int, purpose: str, *indices: int) -> bytes:
    """The 256-bit key of that stream, as hard to guess as `seed` is: all of its bits count, whatever its size."""
    return hashlib.blake2b(_name(seed, purpose, *indices), digest_size=KEY_BYTES, person=b"splitft key").digest()


def _name(seed: int, purpose: str, *indices: int) -> bytes:
    return (f"splitft/{seed}/{purpose}/" + "/".join(str(int(index)) for index in indices)).encode()


def numpy_stream(seed: int, purpose: str, *indices: int) -> np.random.Generator:
    """A NumPy generator (PCG64) for that stream."""
    import numpy as np

    return np.random.Generator(np.random.PCG64(stream_seed(seed, purpose, *indices)))


def torch_stream(seed: int, purpose: str, *indices: int) -> KeyedGenerator:
    """A PyTorch CPU generator for that stream, with the stream's key beside it for noise that must not be guessed."""
    from splitft.keyed import KeyedGenerator

    generator = KeyedGenerator(device="cpu")
    generator.manual_seed(stream_seed(seed, purpose, *indices))
    generator.key = stream_key(seed, purpose, *indices)
    return generator


def fresh_bytes(count: int) -> bytes:
    """Bytes nobody can guess, from the operating system: for keys, tokens and names of processes, never for training."""
    return secrets.token_bytes(count)
