"""Documents to clients: the common held-out slice, the partition, each client's held-out slice, and the record of it all."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, is_dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from splitft import rng
from splitft.data.base import ClientData, Document, FederatedData, Ints, Partition, TokenRows
from splitft.data.tokens import TokenDocument, lengthened, pack, rows, tokenise
from splitft.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Packing = Literal["blocks", "documents"]
_HISTOGRAM_BUCKETS = 10


def federate(
    documents: Iterable[Document],
    tokenizer: PreTrainedTokenizerBase,
    partition: Partition,
    clients: int,
    seed: int,
    packing: Packing = "blocks",
    block_tokens: int = 128,
    held_out: float = 0.1,
    common_held_out: float = 0.05,
    names: Sequence[str] = (),
    vocabulary: int | None = None,
    bucket_tokens: int = 0,
) -> FederatedData:
    """Give every client its rows.

    First the share `common_held_out` of all documents is put aside, then the rest is divided by `partition`, then of each
    client's documents the share `held_out`, at least one. Slices are drawn by document and copies of one text stay on one
    side, so no client is tested on what it trained. `names` replace the partition's names. DataError if a client has no row, and for
    a token the model does not know: `vocabulary` is how many it knows (None: not checked). Clients' rows are lengthened to multiples of
    `bucket_tokens` (0: not); the common slice, which no client has, is not.
    """
    _check_options(packing, held_out, common_held_out, block_tokens, bucket_tokens)
    listed = list(documents)
    if not listed:
        raise DataError("The data source gave no document.", "Check its path and fields.")
    tokens = tokenise(listed, tokenizer)
    if vocabulary is not None:
        _check_vocabulary(listed, tokens, tokenizer, vocabulary)
    shares = _Shares(listed, tokens, packing, block_tokens, seed, bucket_tokens)
    everything = np.arange(len(listed))
    common, rest = shares.hold_out(everything, common_held_out, "common-held-out")
    _check_documents(listed, rest, partition, clients, 2 if held_out else 1)
    columns, owners = [listed[index].columns for index in rest], [listed[index].owner for index in rest]
    parts = partition.split(shares.lengths[rest], columns, owners, clients, seed)
    taken = np.concatenate(parts)
    assert np.array_equal(np.sort(taken), np.arange(len(rest))), f"partition {partition.name} is not disjoint and complete"
    client_names = _names(names, partition, parts, columns, owners)
    made = [_client(shares, client, client_names[client], rest[part], held_out) for client, part in enumerate(parts)]
    edges, histograms, skew = _length_skew([shares.lengths[rest[part]] for part in parts])
    common_rows = shares.make(common)
    if common_held_out and not held_out and not len(common_rows):
        raise DataError("The common held-out slice has no row, and clients hold nothing out.", "Use more data, or set tokens.held_out.")
    manifest = {
        "partition": {"name": partition.name, **(asdict(partition) if is_dataclass(partition) else {})},
        "seed": seed,
        "tokens": {"packing": packing, "block_tokens": block_tokens, "held_out": held_out, "common_held_out": common_held_out}
        | ({"bucket_tokens": bucket_tokens} if bucket_tokens else {}),
        "documents": len(listed),
        "sha256": shares.digest(everything),
        "common_held_out": shares.record(common, common_rows),
        "clients": [record for _, record in made],
        "length_edges": edges,
        "length_histograms": histograms,
        "skew_index": skew,
    }
    return FederatedData(tuple(data for data, _ in made), common_rows, manifest, edges, histograms, skew)


def own_share(
    documents: Iterable[Document],
    tokenizer: PreTrainedTokenizerBase,
    client: int,
    name: str,
    seed: int,
    packing: Packing = "blocks",
    block_tokens: int = 128,
    held_out: float = 0.1,
    vocabulary: int | None = None,
    bucket_tokens: int = 0,
) -> tuple[ClientData, str]:
    """A client's rows from documents that are all its own, and the digest of those; the rows are the ones that `federate` makes of the
    same documents for client number `client`. Errors as there."""
    _check_options(packing, held_out, 0.0, block_tokens, bucket_tokens)
    listed = list(documents)
    if not listed:
        raise DataError("The data source gave no document.", "Check its path and fields.")
    tokens = tokenise(listed, tokenizer)
    if vocabulary is not None:
        _check_vocabulary(listed, tokens, tokenizer, vocabulary)
    shares, everything = _Shares(listed, tokens, packing, block_tokens, seed, bucket_tokens), np.arange(len(listed))
    data, _ = _client(shares, client, name, everything, held_out)
    return data, shares.digest(everything)


def public_rows(
    documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase, packing: Packing = "blocks", block_tokens: int = 128
) -> TokenRows:
    """All of some documents as rows, for measuring. Raises DataError when they make none."""
    made = (pack if packing == "blocks" else rows)(tokenise(list(documents), tokenizer), block_tokens)
    if not len(made):
        raise DataError("The public text makes no row.", "Use more text, or a smaller tokens.block_tokens.")
    return made


class _Shares:
    """The documents, their tokens, and which of them are copies of each other. Indices count documents of the source."""

    def __init__(
        self,
        documents: Sequence[Document],
        tokens: Sequence[TokenDocument],
        packing: Packing,
        block_tokens: int,
        seed: int,
        bucket_tokens: int,
    ) -> None:
        self.lengths: Ints = np.array([len(document.ids) for document in tokens], np.int64)
        self._tokens = tokens
        self._digests = [document.digest() for document in documents]
        number_of: dict[bytes, int] = {}
        self._copies: Ints = np.array([number_of.setdefault(digest, len(number_of)) for digest in self._digests], np.int64)
        make_rows: Callable[[Sequence[TokenDocument], int], TokenRows] = pack if packing == "blocks" else rows
        self._make_rows, self._block_tokens, self._seed, self.bucket_tokens = make_rows, block_tokens, seed, bucket_tokens

    def make(self, indices: Ints) -> TokenRows:
        return self._make_rows([self._tokens[index] for index in indices], self._block_tokens)

    def texts(self, indices: Ints) -> int:
        """How many different texts these documents have."""
        return len(np.unique(self._copies[indices]))

    def digest(self, indices: Ints) -> str:
        """SHA-256 over the documents' own digests, in order."""
        return hashlib.sha256(b"".join(self._digests[index] for index in indices)).hexdigest()

    def record(self, indices: Ints, made: TokenRows) -> dict[str, Any]:
        """What the manifest says of a slice."""
        return {
            "documents": indices.tolist(),
            "sha256": self.digest(indices),
            "rows": len(made),
            "tokens": made.tokens,
            "target_tokens": made.target_tokens,
            "dropped_tokens": made.dropped_tokens,
            "truncated_documents": made.truncated,
        }

    def hold_out(self, indices: Ints, fraction: float, purpose: str, *stream: int) -> tuple[Ints, Ints]:
        """(held out, kept) of these documents, both ascending.

        Texts are taken in random order as long as all their copies fit in; at least one text, and more until they make a row,
        but never all texts. Nothing is held out of copies of a single text.
        """
        if not fraction:
            return indices[:0], indices
        copies = self._copies[indices]
        texts, sizes = np.unique(copies, return_counts=True)
        order = rng.numpy_stream(self._seed, purpose, *stream).permutation(len(texts))
        wanted, chosen, passed = max(1, round(fraction * len(indices))), [], []
        for text in order.tolist():
            if sizes[text] <= wanted:
                chosen.append(text)
                wanted -= sizes[text]
            else:
                passed.append(text)
        passed.sort(key=lambda text: sizes[text])
        passed.extend(chosen[len(texts) - 1 :])
        del chosen[len(texts) - 1 :]
        while len(chosen) < len(texts) - 1:
            held = np.isin(copies, texts[chosen])
            if chosen and len(self.make(indices[held])):
                break
            chosen.append(passed.pop(0))
        held = np.isin(copies, texts[chosen])
        return indices[held], indices[~held]


def _client(shares: _Shares, client: int, name: str, indices: Ints, held_out: float) -> tuple[ClientData, dict[str, Any]]:
    """One client's rows and their record; DataError if it is left without."""
    held, kept = shares.hold_out(indices, held_out, "held-out", client)
    train, test = shares.make(kept), shares.make(held)
    data = ClientData(client, name, len(indices), *(lengthened(rows, shares.bucket_tokens) for rows in (train, test)))
    if not len(data.train) or (held_out and not len(data.held_out)):
        slice_name = "held-out" if len(data.train) else "training"
        raise DataError(
            f"Client {client} ({name}) has {len(indices)} documents ({shares.texts(indices)} different) with "
            f"{int(shares.lengths[indices].sum())} tokens, which leaves no {slice_name} row.",
            "Use fewer clients, more data, a larger partition.minimum or alpha, or rows long enough to reach behind the prompts.",
        )
    return data, {"client": client, "name": name, "train": shares.record(kept, train), "held_out": shares.record(held, test)}


def _check_options(packing: str, held_out: float, common_held_out: float, block_tokens: int, bucket_tokens: int) -> None:
    if packing not in get_args(Packing):
        raise ConfigError(f"tokens.packing is {packing!r}.", f"Choose one of {', '.join(get_args(Packing))}.")
    for field, value in (("held_out", held_out), ("common_held_out", common_held_out)):
        if not 0 <= value <= 0.9:
            raise ConfigError(f"tokens.{field} is {value}.", "Give a share from 0 (none) to 0.9.")
    if bucket_tokens < 0 or (bucket_tokens and block_tokens % bucket_tokens):
        raise ConfigError(f"tokens.bucket_tokens is {bucket_tokens}.", f"Give a divisor of tokens.block_tokens = {block_tokens}, or 0.")


def _check_vocabulary(
    documents: Sequence[Document], tokens: Sequence[TokenDocument], tokenizer: PreTrainedTokenizerBase, vocabulary: int
) -> None:
    """No token beyond the model's. The tokenizer may know more as long as no document has them: Gemma 3's has one for images."""
    for document, made in zip(documents, tokens, strict=True):
        largest = int(made.ids.max(initial=0))
        if largest >= vocabulary:
            raise DataError(
                f"{document.origin}: token {largest} ({tokenizer.convert_ids_to_tokens(largest)!r}) is not in the model's vocabulary of "
                f"{vocabulary} (0..{vocabulary - 1}).",
                "Use the tokenizer the model was trained with, or remove the text that gives this token.",
            )


def _check_documents(documents: Sequence[Document], rest: Ints, partition: Partition, clients: int, each: int) -> None:
    """Enough documents for all clients, and the partition's column in every one."""
    if len(rest) < clients * each:
        raise DataError(
            f"{len(rest)} of {len(documents)} documents are left beside the common held-out slice, too few for {clients} clients "
            f"of at least {each}.",
            'Use fewer clients, more data, or shorter documents (for source "text": split = "paragraph" or "line").',
        )
    column = partition.required_column()
    for document in documents:
        if column and column not in document.columns:
            known = ", ".join(document.columns) or "none"
            raise DataError(
                f"{document.origin}: no column {column!r}, by which the data are to be divided; it has: {known}.",
                "Set partition.column to a column that every record has.",
            )


def _names(names: Sequence[str], partition: Partition, parts: Sequence[Ints], columns: Any, owners: Sequence[str]) -> tuple[str, ...]:
    """The clients' names; DataError if one would have nothing, ConfigError if the names given do not fit."""
    for client, part in enumerate(parts):
        if not len(part):
            raise DataError(f"Client {client} has no documents.", "Use fewer clients, or a larger partition.minimum or alpha.")
    if not names:
        return partition.client_names(parts, columns, owners)
    if len(names) != len(parts) or len(set(names)) != len(names):
        raise ConfigError(f"{len(names)} client names for {len(parts)} clients.", "Give each client one name of its own.")
    return tuple(names)


def _length_skew(lengths: Sequence[Ints]) -> tuple[list[int], list[list[int]], float]:
    """Bucket edges (deciles of all lengths), documents per client and bucket, and the mean total-variation distance between a
    client's histogram and that of all."""
    whole = np.concatenate(lengths)
    quantiles = np.quantile(whole, np.linspace(0, 1, _HISTOGRAM_BUCKETS, endpoint=False), method="lower")
    edges = np.append(np.unique(quantiles), whole.max() + 1)
    counts = np.array([np.histogram(part, edges)[0] for part in lengths])
    shares: np.ndarray[Any, np.dtype[np.float64]] = counts / counts.sum(1, keepdims=True)
    skew = np.abs(shares - counts.sum(0) / counts.sum()).sum(1).mean() / 2
    return [int(edge) for edge in edges], counts.tolist(), float(skew)
