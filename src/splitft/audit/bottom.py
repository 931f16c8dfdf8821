"""A copy of the client's blocks in the attacker's hands: whole texts at once, or one more token behind a prefix for many candidates.

The prefix is kept as keys and values, so that a candidate costs one token and not a whole text; where a family's cache does not give what
its plain pass gives, the whole text is run instead.

Axes: s sequences, k candidates of each, t tokens, d hidden width, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from splitft.engine.narrow import encode
from splitft.lora import AdapterBank
from splitft.split import Route, SplitModel

# Keys and values that one batch of candidates may take, as numbers, and candidates in it.
CACHE_NUMBERS = 1 << 26
MOST_ROWS = 512
# How far a pass with a cache may be from one without, relative to the channel's own size.
AGREES = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}


@dataclass(frozen=True)
class Prefix:
    """What is known of some sequences so far: their tokens [s t], and the keys and values [s heads t width] of every block."""

    ids: Tensor
    kept: tuple[tuple[Tensor, Tensor], ...] = ()

    def taken(self, rows: Tensor) -> Prefix:
        """Some of the sequences, in this order, any of them more than once."""
        return Prefix(self.ids[rows], tuple((keys[rows.to(keys.device)], values[rows.to(values.device)]) for keys, values in self.kept))


class Bottom:
    """The first `blocks` blocks (None: the model up to its LM head) with the adapters of `bank`, or without any (None: base weights).
    With `pairs` the states are what leaves the bottleneck there [s t c] (none: there is no such thing in the run)."""

    def __init__(self, split: SplitModel, bank: AdapterBank | None, blocks: int | None, pairs: AdapterBank | None = None) -> None:
        self.split, self.bank, self.blocks, self.pairs = split, bank, blocks, pairs
        self.device = split.model.get_input_embeddings().weight.device
        self.cached = True

    def _route(self, rows: int) -> Route:
        return Route(rows, last=None if self.blocks is None else self.blocks - 1, bank=self.bank)

    def _leaves(self, cut: int | None, hidden: Tensor) -> Tensor:
        """What of states [s t d] behind so many blocks leaves a client."""
        return hidden if self.pairs is None or cut is None else encode(self.pairs, "cut", cut, hidden)

    def hidden(self, ids: Tensor) -> Tensor:
        """The state [s t d] behind the last of the blocks (in front of the LM head where they are the model)."""
        with torch.no_grad():
            return self._leaves(self.blocks, self.split.run(self._route(ids.shape[0]), ids.to(self.device), None))

    def at_cuts(self, ids: Tensor, cuts: Sequence[int]) -> Mapping[int, Tensor]:
        """The states [s t d] behind so many blocks, in one pass."""
        found: dict[int, Tensor] = {}

        def cross(block: int, hidden: Tensor) -> Tensor:
            if block + 1 in cuts:
                found[block + 1] = self._leaves(block + 1, hidden)
            return hidden

        route = Route(ids.shape[0], last=max(cuts) - 1, bank=self.bank, cross=cross)
        with torch.no_grad():
            self.split.run(route, ids.to(self.device), None)
        return found

    def replay(self, ids: Tensor) -> Tensor:
        """The states [s t d] of texts [s t] as an attacker finds them, token by token. The cache is given up when it does not agree."""
        plain = self.hidden(ids).float()
        try:
            prefix, steps = self.start(ids.shape[0]), []
            for place in range(ids.shape[1]):
                prefix, last = self.extend(prefix, ids[:, place])
                steps.append(last)
        except (TypeError, ValueError, IndexError, AttributeError, RuntimeError):  # a family that knows no such cache
            self.cached = False
            return plain
        found = torch.stack(steps, 1).float()
        size = plain.square().mean((0, 1)).sqrt().clamp_min(1e-6)
        if bool(((found - plain) / size).square().mean().sqrt() < AGREES.get(self.split.dtype, 1e-3)):
            return found
        self.cached = False
        return plain

    def start(self, sequences: int) -> Prefix:
        return Prefix(torch.zeros(sequences, 0, dtype=torch.int64))

    def extend(self, prefix: Prefix, tokens: Tensor) -> tuple[Prefix, Tensor]:
        """The prefix with one more token [s] each, and the state [s d] there."""
        ids = torch.cat([prefix.ids, tokens.cpu()[:, None]], 1)
        if not self.cached:
            return Prefix(ids), self.hidden(ids)[:, -1]
        cache = self._cache(prefix.kept)
        last = self._step(tokens[:, None], cache)
        return Prefix(ids, tuple((layer.keys, layer.values) for layer in cache.layers)), last

    def try_(self, prefix: Prefix, candidates: Tensor) -> Tensor:
        """The states [s k d] that each of the candidates [s k] would give behind the prefix."""
        sequences, count = candidates.shape
        rows = torch.arange(sequences).repeat_interleave(count)
        tokens = candidates.reshape(-1).cpu()
        size = self._rows_at_once(prefix)
        parts = [self._try(prefix, rows[at : at + size], tokens[at : at + size]) for at in range(0, len(rows), size)]
        return torch.cat(parts).reshape(sequences, count, -1)

    def _try(self, prefix: Prefix, rows: Tensor, tokens: Tensor) -> Tensor:
        if not self.cached:
            return self.hidden(torch.cat([prefix.ids[rows], tokens[:, None]], 1))[:, -1]
        place = rows.to(self.device)
        return self._step(tokens[:, None], self._cache([(keys[place], values[place]) for keys, values in prefix.kept]))

    def _rows_at_once(self, prefix: Prefix) -> int:
        if not self.cached:
            return max(1, MOST_ROWS * 8 // (prefix.ids.shape[1] + 1))
        each = sum(keys[0].numel() + values[0].numel() for keys, values in prefix.kept)
        return max(1, min(MOST_ROWS, CACHE_NUMBERS // max(1, each)))

    def _cache(self, kept: Sequence[tuple[Tensor, Tensor]]) -> DynamicCache:
        cache = DynamicCache()
        for block, (keys, values) in enumerate(kept):
            cache.update(keys, values, block)
        return cache

    def _step(self, ids: Tensor, cache: DynamicCache) -> Tensor:
        with torch.no_grad():
            return self._leaves(self.blocks, self.split.run(self._route(ids.shape[0]), ids.to(self.device), None, cache)[:, -1:])[:, 0]


class LanguageModel:
    """What the model expects next behind a prefix that grows, with the adapters of `bank` or without any; `unigram` [v] is what it expects
    of a first token."""

    def __init__(self, split: SplitModel, unigram: Tensor, sequences: int, sample: Tensor, bank: AdapterBank | None = None) -> None:
        self.bottom, self.vocabulary = Bottom(split, bank, None), len(unigram)
        self.bottom.replay(sample)
        self.prefix = self.bottom.start(sequences)
        self.log_share = (unigram.float() + 1e-6).log().expand(sequences, -1)

    def accept(self, tokens: Tensor) -> None:
        """Go on with one more token [s]; `log_share` [s v] is of what comes behind it."""
        self.prefix, last = self.bottom.extend(self.prefix, tokens)
        with torch.no_grad():
            self.log_share = self.bottom.split.logits(last)[:, : self.vocabulary].float().log_softmax(-1).cpu()

    def keep(self, rows: Tensor) -> None:
        """Go on with these of the prefixes, any of them more than once."""
        self.prefix = self.prefix.taken(rows)
        self.log_share = self.log_share[rows]
