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
    import torch


def stream_seed(seed: int, purpose: str, *indices: int) -> int:
    """A 63-bit seed for the stream called (`seed`, `purpose`, `indices`), by BLAKE2b over its name."""
    name = f"splitft/{seed}/{purpose}/" + "/".join(str(int(index)) for index in indices)
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little") >> 1


def numpy_stream(seed: int, purpose: str, *indices: int) -> np.random.Generator:
    """A NumPy generator (PCG64) for that stream."""
    import numpy as np

    return np.random.Generator(np.random.PCG64(stream_seed(seed, purpose, *indices)))


def torch_stream(seed: int, purpose: str, *indices: int) -> torch.Generator:
    """A PyTorch CPU generator for that stream."""
    import torch

    return torch.Generator(device="cpu").manual_seed(stream_seed(seed, purpose, *indices))


def fresh_bytes(count: int) -> bytes:
    """Bytes nobody can guess, from the operating system: for keys, tokens and names of processes, never for training."""
    return secrets.token_bytes(count)
