"""Public text for an attacker to learn from: the documentation of the running Python, never from a file the client's documents are from.

Axes: v vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from splitft.data.base import Document, Source, TokenRows
from splitft.data.federate import public_rows
from splitft.data.python_docs import PythonDocs
from splitft.errors import DataError
from splitft.rng import numpy_stream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BUNDLED_DOCUMENTS = 800
MARKS = "\N{LATIN CAPITAL LETTER G WITH DOT ABOVE}\N{LOWER ONE EIGHTH BLOCK} \N{LATIN CAPITAL LETTER C WITH DOT ABOVE}"


def place_of(document: Document) -> str:
    """The file a document is from."""
    return document.origin.rpartition(":")[0]


def apart(documents: Iterable[Document], private: Iterable[Document]) -> list[Document]:
    """The documents that share neither text nor file with any private one."""
    own = list(private)
    texts, places = {one.digest() for one in own}, {place_of(one) for one in own} - {""}
    return [one for one in documents if one.digest() not in texts and place_of(one) not in places]


def public_text(
    tokenizer: PreTrainedTokenizerBase, private: Iterable[Document], tokens: int, vocabulary: int, source: Source | None = None
) -> TokenRows:
    """Rows of `tokens` tokens of public text (the bundled one unless a `source` is given). DataError when nothing is left of it, or when it
    has tokens the model does not know."""
    own = list(private)
    # Where the client's text is Python documentation too, its files are left out: so much more is read.
    alike = len(own) if any("module" in one.columns for one in own) else 0
    documents = apart((source or PythonDocs(max_documents=BUNDLED_DOCUMENTS + alike)).documents(), own)
    rows = public_rows(documents, tokenizer, "blocks", tokens) if documents else None
    if rows is None:
        raise DataError("All of the public text is the client's own.", "give other public text with --public FILE.")
    if int(rows.ids.max()) >= vocabulary:
        raise DataError(
            f"The public text has a token beyond the model's vocabulary of {vocabulary}.", "give other text with --public FILE."
        )
    return rows


def shuffled(rows: TokenRows, count: int, seed: int) -> TokenRows:
    """At most `count` rows in an order drawn from the seed, all as long as the longest."""
    full = np.flatnonzero(rows.lengths == rows.lengths.max())
    order = numpy_stream(seed, "audit public").permutation(len(full))[:count]
    return rows.select(full[order])


def frequencies(rows: TokenRows, vocabulary: int) -> Tensor:
    """Share of each token [v] in the rows."""
    counts = np.bincount(rows.ids, minlength=vocabulary)[:vocabulary]
    return torch.from_numpy(counts / max(1, len(rows.ids)))


def notable_tokens(tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> Tensor:
    """Which tokens [v] have a digit or begin with a capital: names and numbers are what hurts."""
    found = torch.zeros(vocabulary, dtype=torch.bool)
    for number, text in enumerate(tokenizer.convert_ids_to_tokens(list(range(min(vocabulary, len(tokenizer)))))):
        bare = (text or "").lstrip(MARKS)
        found[number] = any(one.isdigit() for one in bare) or bare[:1].isupper()
    return found
