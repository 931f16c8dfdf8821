"""Documents to tokens, and tokens to rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from splitft.data.base import Document, Ids, Mask, Segment, TokenRows
from splitft.data.chat import ChatEncoder
from splitft.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BATCH_DOCUMENTS = 1000


class TokenDocument(NamedTuple):
    """One document as tokens [t] and which of them are targets [t]."""

    ids: Ids
    trained: Mask

    def cut(self, start: int, stop: int | None = None) -> TokenDocument:
        """Tokens `start` to `stop`."""
        return TokenDocument(self.ids[start:stop], self.trained[start:stop])


def tokenise(documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase) -> list[TokenDocument]:
    """Every document as tokens, in order.

    A document begins with what the tokenizer puts in front of every text (often a beginning-of-text token, not trained) and
    ends with its end-of-text token, if it has one (trained, so that the model learns to stop). The segments of a document are
    tokenised separately and joined, so no token spans prompt and completion. Text that looks like a special token stays text.
    Conversations follow the tokenizer's chat template instead; DataError if it has none.
    """
    opening = _opening(tokenizer)
    end = tokenizer.eos_token_id
    closing = [] if end is None else [int(end)]
    chat = ChatEncoder(tokenizer)
    result: list[TokenDocument] = []
    remaining = iter(documents)
    while group := list(islice(remaining, _BATCH_DOCUMENTS)):
        pieces = iter(_encode([segment.text for document in group for segment in document.segments], tokenizer))
        for document in group:
            if document.messages is not None:
                result.append(TokenDocument(*chat.tokens(document.messages, document.origin)))
            else:
                result.append(_join(document.segments, pieces, opening, closing))
    return result


def _encode(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Ids of many texts at once, without anything added and without special tokens read out of the text."""
    if not texts:
        return []
    options = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
    found: list[list[int]] = tokenizer(texts, add_special_tokens=False, split_special_tokens=True, **options)["input_ids"]
    return found


def _opening(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens the tokenizer puts in front of a text by itself."""
    bare, full = (list(tokenizer("a", add_special_tokens=added)["input_ids"]) for added in (False, True))
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start]
    return []


def _join(segments: Sequence[Segment], pieces: Iterator[list[int]], opening: list[int], closing: list[int]) -> TokenDocument:
    ids, trained = list(opening), [False] * len(opening)
    for segment, piece in zip(segments, pieces, strict=False):  # the iterator goes on with the next document
        ids += piece
        trained += [segment.trained] * len(piece)
    return TokenDocument(np.array(ids + closing, np.int32), np.array(trained + [True] * len(closing), np.bool_))


def _learns(trained: Mask) -> bool:
    """Whether a row has a target: a trained token that is not the first."""
    return bool(trained[1:].any())


def pack(documents: Sequence[TokenDocument], block_tokens: int) -> TokenRows:
    """The documents one after another, cut into blocks of `block_tokens`.

    The remainder is dropped, unless there is no other row: then it is kept as one shorter row. Blocks without a target (inside
    a long prompt) are dropped. `dropped_tokens` says how much that was.
    """
    _check_length(block_tokens)
    whole = TokenDocument(
        np.concatenate([np.zeros(0, np.int32), *(document.ids for document in documents)]),
        np.concatenate([np.zeros(0, np.bool_), *(document.trained for document in documents)]),
    )
    count = len(whole.ids) // block_tokens
    ids = whole.ids[: count * block_tokens].reshape(count, block_tokens)
    trained = whole.trained[: count * block_tokens].reshape(count, block_tokens)
    learning = trained[:, 1:].any(1)
    if not learning.any():
        remainder = whole.cut(count * block_tokens)
        kept = [remainder] if _learns(remainder.trained) else []
        return TokenRows.build(kept, dropped_tokens=len(whole.ids) - sum(len(row.ids) for row in kept))
    kept_blocks = int(learning.sum())
    offsets = np.arange(kept_blocks + 1, dtype=np.int64) * block_tokens
    dropped = len(whole.ids) - kept_blocks * block_tokens
    return TokenRows(ids[learning].reshape(-1), trained[learning].reshape(-1), offsets, dropped_tokens=dropped)


def rows(documents: Sequence[TokenDocument], max_tokens: int) -> TokenRows:
    """One document a row, cut after `max_tokens`.

    `truncated` counts the documents cut. Those without a target in what remains (the prompt alone fills the row) are dropped.
    """
    _check_length(max_tokens)
    cut = [document.cut(0, max_tokens) for document in documents]
    kept = [document for document in cut if _learns(document.trained)]
    truncated = sum(len(document.ids) > max_tokens for document in documents)
    dropped = sum(len(document.ids) for document in documents) - sum(len(document.ids) for document in kept)
    return TokenRows.build(kept, truncated, dropped)


def lengthened(made: TokenRows, bucket_tokens: int) -> TokenRows:
    """The rows with every length raised to the next multiple of `bucket_tokens`; 0: as they are.

    What is added is the row's own beginning once more, never a target: it reveals no other text, and its states are like those of any
    text in size and spread, where states of one token repeated would be told apart by any codec of variable rate. Causal attention lets
    no target see it, so what is learned does not change.
    """
    if bucket_tokens <= 1 or not len(made) or not (made.lengths % bucket_tokens).any():
        return made
    lengths = -(-made.lengths // bucket_tokens) * bucket_tokens
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    place = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths)
    own = np.repeat(made.lengths, lengths)
    source = np.repeat(made.offsets[:-1], lengths) + place % own
    return TokenRows(made.ids[source], made.trained[source] & (place < own), offsets, made.truncated, made.dropped_tokens)


def _check_length(tokens: int) -> None:
    if tokens < 2:
        raise ConfigError(f"tokens.block_tokens is {tokens}.", "A row needs at least 2 tokens: one to see and one to predict.")
