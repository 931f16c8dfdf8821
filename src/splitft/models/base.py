"""What the rest of the system knows of a model: where its blocks and head are, what a block returns, what follows the head.

There is no class per family. Any Hugging Face causal LM is taken as it is; `selfcheck.py` finds these facts by running a shrunken copy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

AfterHead = Literal["nothing", "divide", "multiply", "softcap"]


@dataclass(frozen=True)
class Anatomy:
    """How a family is built. `blocks_path` and `head_path` are module paths in the causal LM.

    `after_head` is what the model does to the LM head's output before the loss (Granite divides by a scale, Cohere multiplies,
    Gemma 2 applies a soft cap), `after_head_value` its constant. `ragged` says whether sessions with different cuts may share a pass;
    `bypassed` names projections whose weight the family reads around their module, which therefore take no adapter. `maskless` says that
    padding behind a row's last token changes nothing in front of it, so that such batches need no mask.
    """

    blocks_path: str
    head_path: str
    returns_tuple: bool
    after_head: AfterHead = "nothing"
    after_head_value: float = 1.0
    ragged: bool = True
    bypassed: tuple[str, ...] = ()
    maskless: bool = False

    def finish(self, raw: Tensor) -> Tensor:
        """Logits [.. v] from the LM head's raw output [.. v]."""
        if self.after_head == "divide":
            return raw / self.after_head_value
        if self.after_head == "multiply":
            return raw * self.after_head_value
        if self.after_head == "softcap":
            return torch.tanh(raw / self.after_head_value) * self.after_head_value
        return raw
