"""The end of a round behind masks: the clients' own blocks are summed by secure aggregation, and the update of none is in what it shows.

What activations, labels and gradients tell the same server it does not hide, and they are enough to compute an update again (see
docs/privacy.md). The server's own blocks stay in the clear, as they must: it trains every client's copy of them. So what is summed behind
masks is what a client holds, and the deeper the cuts the more that is. In a simulation both sides run here, every letter through its
bytes, so that what is counted is what would travel.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np
import torch
from cryptography.hazmat.primitives.asymmetric import ec
from torch import Tensor

from splitft.aggregate.base import Rows, Updates, require_finite, weighted_sum
from splitft.engine.exchange import Columns, Ownership, positions
from splitft.engine.intake import positions_of
from splitft.engine.ledger import Ledger
from splitft.engine.settings import Federation, RoundResult
from splitft.errors import AdapterError, ProtocolError
from splitft.secure.client import SealedClient
from splitft.secure.cohorts import LEAST_COHORT, Range, cohorts_of
from splitft.secure.field import FixedPoint
from splitft.secure.protocol import Masked, Terms, ToClient, ToServer, secure_threshold, signer
from splitft.secure.server import PHASES, Opened, Sealing
from splitft.types import Kind, Plan


@dataclass(frozen=True)
class Secrecy:
    """How a run sums updates behind masks. `threshold`: the share of the clients that must stay, above a half (0: just over two thirds).
    `minimum`: fewest owners of a column, 3 or more. `limit`: largest adapter value that can be summed."""

    threshold: float = 0.0
    minimum: int = LEAST_COHORT
    limit: int = 64

    def of(self, members: int) -> int:
        """The threshold for so many clients."""
        return max(members // 2 + 1, int(np.ceil(self.threshold * members))) if self.threshold else secure_threshold(members)


@dataclass(frozen=True)
class SealedRows:
    """Rows [n p] of which only the mean is known: fetching or reweighting them is refused. A column that was not opened stays as it was
    before the round."""

    weights: tuple[float, ...]
    mean: Tensor

    def __len__(self) -> int:
        return len(self.weights)

    def chosen(self, rows: Sequence[int]) -> Rows:
        if list(rows) != list(range(len(self))):
            raise _sealed()
        return self

    def weighted_sum(self, weights: Sequence[float]) -> Tensor:
        if tuple(weights) != self.weights:
            raise _sealed()
        return self.mean.clone()

    def fetch(self) -> Tensor:
        raise _sealed()


def _sealed() -> AdapterError:
    return AdapterError(
        "updates are aggregated securely: their token-weighted mean is all that is known of them.",
        "take a linear rule (average, freeze_a, or fed_avgm, fed_adam, fed_yogi over one), or switch secure aggregation off.",
    )


@dataclass(frozen=True)
class Unsealed:
    """What a sealing gave: the updates as a linear rule takes them (None: too few clients stayed), facts and words for the journal."""

    updates: Updates | None
    metrics: Mapping[str, float] = field(default_factory=dict)
    notices: tuple[str, ...] = ()


def own_ranges(federation: Federation, plan: Plan) -> tuple[Range, ...]:
    """The columns that a client owns under a plan and nobody else may read: of its blocks, at its ranks, as far as they are trained."""
    return ranges_of(Ownership(plan, federation.split.blocks).client_columns(federation.layout, federation.trained))


def ranges_of(columns: Columns) -> tuple[Range, ...]:
    """Chosen columns as ranges."""
    if not isinstance(columns, Tensor):
        return tuple((part.start, part.stop) for part in columns if part.start < part.stop)
    every = columns.cpu().numpy()
    if len(every) == 0:
        return ()
    breaks = np.flatnonzero(np.diff(every) != 1)
    starts, ends = every[[0, *(breaks + 1)]], every[[*breaks, len(every) - 1]] + 1
    return tuple(zip(starts.tolist(), ends.tolist(), strict=True))


def most_tokens(federation: Federation, plans: Sequence[Plan]) -> int:
    """The most tokens a client can train in the round: what every side can work out by itself."""
    settings = federation.settings
    row = settings.row_tokens or positions_of(federation)
    return max(plan.local_steps for plan in plans) * settings.batch_size * settings.gradient_accumulation * row


def terms_of(federation: Federation, secrecy: Secrecy, plans: Sequence[Plan], name: str, index: int) -> Terms | None:
    """The terms for these participants, in client order. Columns that too few of them own are left out; None when nothing is left, or too
    few clients. Raises ConfigError when the sum could overflow."""
    columns = federation.layout.parameters
    if len(plans) < LEAST_COHORT:
        return None
    owned = {plan.client: (*own_ranges(federation, plan), (columns, columns + 1)) for plan in plans}
    cohorts = tuple(one for one in cohorts_of(owned) if len(one.owners) >= max(secrecy.minimum, LEAST_COHORT))
    if not any(one.ranges[0][0] < columns for one in cohorts):
        return None
    number = FixedPoint.fitting(secrecy.limit, most_tokens(federation, plans), len(plans))
    members = tuple(plan.client for plan in plans)
    return Terms(name, index, members, secrecy.of(len(members)), secrecy.minimum, number, columns + 1, cohorts)


def sealed_updates(
    federation: Federation,
    result: RoundResult,
    contributes: Sequence[bool],
    before: Tensor,
    secrecy: Secrecy,
    name: str,
    index: int,
    silent: Mapping[int, str] | None = None,
) -> Unsealed:
    """The round's updates after secure aggregation, both sides here; its bytes go into the ledger. `before` [p]: the adapter that columns
    keep if they cannot be opened. `silent`: who sends nothing from which phase on.

    Raises AdapterError for values that cannot be summed (not finite, beyond the limit).
    """
    rows = [row for row, counts in enumerate(contributes) if counts and result.targets[row] > 0]
    plans = [result.plans[row] for row in rows]
    terms = terms_of(federation, secrecy, plans, name, index) if plans else None
    if terms is None:
        return Unsealed(None, {}, (f"{len(plans)} clients came through, too few for secure aggregation: nothing was merged.",))
    values = result.values[rows] if result.kept is None else result.kept.chosen(rows).fetch()
    keys = {plan.client: ec.generate_private_key(ec.SECP256R1()) for plan in plans}
    known = {client: key.public_key() for client, key in keys.items()}
    clients = {
        plan.client: SealedClient(
            plan.client, own_ranges(federation, plan), values[k].numpy(), result.targets[row], signer(keys[plan.client]), known
        )
        for k, (row, plan) in enumerate(zip(rows, plans, strict=True))
    }
    try:
        opened = _play(Sealing(terms, known), clients, result.ledger, silent or {})
    except ProtocolError as problem:
        return Unsealed(None, {}, (f"secure aggregation failed: {problem.message} Nothing was merged.",))
    tokens = {plan.client: result.targets[row] for row, plan in zip(rows, plans, strict=True)}
    return unsealed(federation, plans, tokens, values, before, opened)


def unsealed(
    federation: Federation, plans: Sequence[Plan], tokens: Mapping[int, int], values: Tensor, before: Tensor, opened: Opened
) -> Unsealed:
    """The opened sums and the server's own blocks as one set of updates. `values` [n p]: what the server has of each plan's client; a
    client's own columns are not looked at. Raises ProtocolError when the clients weighed their sums by other counts than the server's,
    AdapterError for blocks on the server that are not finite."""
    stayed = [k for k, plan in enumerate(plans) if plan.client in opened.survivors]
    total, known = opened.values()
    counts = tuple(tokens[plans[k].client] for k in stayed)
    if not known[-1]:
        return Unsealed(None, {}, (f"{len(stayed)} clients stayed, too few to open their sum: nothing was merged.",))
    if total[-1] != sum(counts):
        raise ProtocolError(
            f"the clients' token counts add up to {total[-1]:.0f}, the server counted {sum(counts)}.", "a client does not count as agreed."
        )
    clear, owned = values[stayed].clone(), torch.zeros(len(before), dtype=torch.bool)
    for row, k in zip(clear, stayed, strict=True):
        mine = positions(Ownership(plans[k], federation.split.blocks).client_columns(federation.layout, federation.trained))
        row[mine], owned[mine] = 0.0, True
    updates = Updates(tuple(plans[k].client for k in stayed), counts, clear, federation.layout)
    require_finite(updates)
    weights = updates.weights().tolist()
    mean = weighted_sum(weights, clear)
    sums, open_columns = torch.from_numpy(total[:-1]), torch.from_numpy(known[:-1])
    mean = torch.where(open_columns, mean + sums / float(total[-1]), mean)
    closed = owned & ~open_columns
    mean = torch.where(closed, before.double(), mean)
    ranks = torch.tensor([list(plans[k].ranks) for k in stayed], dtype=torch.int64) if all(plans[k].ranks for k in stayed) else None
    notices = (
        ()
        if not bool(closed.any())
        else (f"{int(closed.sum())} of {int(owned.sum())} values had too few owners left and stay as they were.",)
    )
    kept = SealedRows(tuple(weights), mean)
    hidden = Updates(updates.clients, counts, values.new_zeros((0, len(before))), federation.layout, ranks, kept=kept)
    facts = {
        "sealed_clients": float(len(stayed)),
        "sealed_values": float(open_columns.sum()) / len(before),
        "sealed_step": opened.terms.number.step,
    }
    return Unsealed(hidden, facts, notices)


def _play(sealing: Sealing, clients: Mapping[int, SealedClient], ledger: Ledger, silent: Mapping[int, str]) -> Opened:
    """Both sides' talk, to its end."""
    letters: dict[int, ToClient] = sealing.opening()
    for phase in range(len(PHASES)):
        for client, letter in letters.items():
            ledger.add(client, "down", "control", len(msgspec.msgpack.encode(letter)))
            if client in silent and PHASES.index(silent[client]) <= phase:
                continue
            answer = clients[client].answer(letter)
            data = msgspec.msgpack.encode(answer)
            for kind, count in _kinds(answer, len(data)):
                ledger.add(client, "up", kind, count)
            sealing = sealing.take(client, msgspec.msgpack.decode(data, type=type(answer)))
        sealing, letters = sealing.advance()
    return sealing.opened()


def _kinds(answer: ToServer, size_bytes: int) -> Iterator[tuple[Kind, int]]:
    """What of a letter is adapters, and what talk about them."""
    values = sum(map(len, answer.vectors)) if isinstance(answer, Masked) else 0
    yield from (("adapters", values), ("control", size_bytes - values))
