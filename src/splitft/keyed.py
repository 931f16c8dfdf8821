"""A generator that carries a key: its own numbers are good for rounding, what must not be guessed is made of the key."""

from __future__ import annotations

import torch


class KeyedGenerator(torch.Generator):
    """PyTorch's generator of a stream and the stream's `key` of 256 bits. The generator itself starts from 32 bits, which can be tried out
    one after the other; noise that protects something is drawn from the key."""

    key: bytes
