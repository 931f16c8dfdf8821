"""Labels from the gradients that a U-shaped split returns.

The server knows its own output u and the gradient g that comes back. The gradient at a position is, up to one positive scale,
J^T W^T (p - e_y) of that position's own loss plus what later positions cause through attention. From the last position to the first, what
later ones cause is subtracted (their labels are found by then), and the label is the one whose direction fits the rest best. No training,
no search: exact where the tail is known and the wire is clean; over a noisy one the tail's own prediction and the gradient's length are
used too (`LABEL_RULES`). The log-likelihoods join those of the states in the attack K+L (`beam.py`).

Axes: s sequences, t tokens, d hidden width (o of the exit's), v vocabulary, r rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from splitft.audit.base import FIRST, LATER, Case
from splitft.audit.tap import MOST_PLAYED, Tap, carried
from splitft.clock import monotonic_s
from splitft.engine.exchange import Ownership
from splitft.engine.narrow import decode, encode
from splitft.lora import AdapterBank
from splitft.loss import Targets, shift_labels, training_loss
from splitft.split import Route, SplitModel
from splitft.types import IGNORE_LABEL

# How labels are told apart; the first where the wire is clean.
LabelRule = Literal["direction", "direction with prior", "length"]
LABEL_RULES: tuple[LabelRule, ...] = ("direction", "direction with prior", "length")
MOST_ROWS = 512
# A gradient this small against the largest of its text is of a position without a label.
SILENT = 1e-4
NO_LABEL = -1
# So many visits are looked at side by side, each with an output of its own.
MOST_SIDE_BY_SIDE = 64
# No wire counts as more exact than this.
LEAST_SHARE = 1e-3


@dataclass(frozen=True)
class Returned:
    """What the server has of a step: its own `output` [s t d] as the client got it, and the `gradient` [s t d] that came back, of as few
    channels as a bottleneck leaves. `labels` [s t] are what it is after; `sent` [s t d] is the gradient before its codec; `scale` is what a
    position's loss counts for, one over the number of targets, which the server is told."""

    output: Tensor
    gradient: Tensor
    labels: Tensor
    sent: Tensor
    scale: float


def client_step(case: Case, bank: AdapterBank, cut: int, tap: Tap | None = None) -> Returned:
    """A step of a U-shaped client on its private sample, every tensor through its codec."""
    split, sequences = case.split, case.private.shape[0]
    tap = tap or Tap(case.settings, case.plan, cut)
    end = Ownership(tap.plan, split.blocks).server_end

    def crossing(block: int, hidden: Tensor) -> Tensor:
        if block == cut - 1:
            hidden = decode(bank, "cut", cut, tap.private(encode(bank, "cut", cut, hidden), 0))
        return tap.private(encode(bank, "exit", end, hidden), 2) if block == end - 1 else hidden

    device = split.model.get_input_embeddings().weight.device
    with torch.no_grad():
        output = split.run(Route(sequences, last=end - 1, bank=bank, cross=crossing), case.private.to(device), None)
    labels = shift_labels(case.private, case.trained)
    targets = Targets.of(labels, device)
    leaf = output.detach().clone().requires_grad_(True)
    hidden = split.run(Route(sequences, entries={end: decode(bank, "exit", end, leaf)}, bank=bank), None, None)
    weight = torch.full((sequences,), 1.0 / max(1, len(targets.labels)))
    loss, _ = training_loss(hidden, targets, weight, split.head, split.anatomy)
    (gradient,) = torch.autograd.grad(loss, leaf)
    return Returned(output, tap.private(gradient, 3), labels, gradient, float(weight[0]))


def client_visits(case: Case, bank: AdapterBank, cut: int, visits: int) -> dict[str, tuple[Returned, ...]]:
    """What the server has of a text after so many visits, by the way in which they are looked at.

    Where what goes forward draws random numbers, every visit's output is another with another gradient: they are kept side by side, up to
    MOST_SIDE_BY_SIDE. Where only gradients draw some, their mean is looked at. Where their codec remembers, the last that came too, and
    the mean of all.
    """
    up, _, out, back = case.settings.codecs
    tap = Tap(case.settings, case.plan, cut)
    if up.draws or out.draws:
        count = min(visits, MOST_SIDE_BY_SIDE)
        return {FIRST if count == 1 else f"{count} visits": tuple(client_step(case, bank, cut, tap) for _ in range(count))}
    if back.hears_samples:
        first = client_step(case, bank, cut, tap)
        count = max(2, min(visits, MOST_PLAYED))
        last, mean = carried(tap.private_streams[3], first.sent, count - 1)
        whole = (first.gradient.float() + (count - 1) * mean.float()) / count
        return {FIRST: (first,), LATER: (replace(first, gradient=last),), f"mean of {count}": (replace(first, gradient=whole),)}
    if back.draws and visits > 1:
        tap.come_by(visits)
        count = visits if tap.scaled[3] else tap.played
        return {f"mean of {count}": (client_step(case, bank, cut, tap),)}
    return {FIRST: (client_step(case, bank, cut, tap),)}


def wire_share(returned: Sequence[Returned]) -> float:
    """The square of a gradient wire's error over that of what was sent, as an attacker measures it on public text."""
    wrong = sum(float((one.gradient.float() - one.sent.float()).square().sum()) for one in returned)
    return wrong / max(1e-30, sum(float(one.sent.float().square().sum()) for one in returned))


class Tail:
    """The attacker's copy of what follows the server's blocks, with the adapters of `bank` or none, and the bottlenecks of `pairs`."""

    def __init__(self, split: SplitModel, bank: AdapterBank | None, end: int, output: Tensor, pairs: AdapterBank | None = None) -> None:
        self.split, self.bank, self.end, self.output, self.pairs = split, bank, end, output, pairs
        self.leaf = output.detach().clone().requires_grad_(True)
        cache = DynamicCache() if end < split.blocks else None
        with torch.no_grad():
            self.kept = [] if cache is None else self._fill(cache)
        self.exit = split.run(self._route(self.leaf), None, None)

    def logits(self, place: int) -> Tensor:
        """The tail's own prediction at a position [s v]."""
        return self.split.logits(self.exit[:, place]).float()

    def _route(self, states: Tensor) -> Route:
        entering = states if self.pairs is None else decode(self.pairs, "exit", self.end, states)
        return Route(states.shape[0], entries={self.end: entering}, bank=self.bank)

    def _fill(self, cache: DynamicCache) -> list[tuple[Tensor, Tensor]]:
        """Keys and values [s heads t width] of the tail's blocks."""
        for block in range(self.end):  # blocks that are not run: a cache tells the place of a token by its first one
            cache.update(*self._nothing(self.output.shape[0], 0), block)
        self.split.run(self._route(self.output), None, None, cache)
        return [(layer.keys, layer.values) for layer in cache.layers[self.end :]]

    def _nothing(self, rows: int, tokens: int) -> tuple[Tensor, Tensor]:
        empty = self.output.new_zeros(rows, 1, tokens, 1)
        return empty, empty

    def jacobian(self, place: int) -> Tensor:
        """The exit's state at `place` by the tail's input there: [s o d]. What earlier positions left in the cache is held."""
        sequences, _, width = self.output.shape
        rows = torch.arange(sequences, device=self.output.device).repeat_interleave(self.exit.shape[-1])
        wanted = torch.eye(self.exit.shape[-1], dtype=self.exit.dtype, device=self.exit.device).repeat(sequences, 1)
        parts = [self._rows(place, rows[at : at + MOST_ROWS], wanted[at : at + MOST_ROWS]) for at in range(0, len(rows), MOST_ROWS)]
        return torch.cat(parts).reshape(sequences, -1, width).float()

    def _rows(self, place: int, rows: Tensor, wanted: Tensor) -> Tensor:
        leaf = self.output[rows, place, None].detach().requires_grad_(True)
        cache = None
        if self.kept:
            cache = DynamicCache()
            for block in range(self.end):
                cache.update(*self._nothing(len(rows), place), block)
            for number, (keys, values) in enumerate(self.kept):
                cache.update(keys[rows, :, :place], values[rows, :, :place], self.end + number)
        out = self.split.run(self._route(leaf), None, None, cache)
        (found,) = torch.autograd.grad(out[:, -1], leaf, wanted)
        return found[:, 0]

    def caused_by(self, place: int, labels: Tensor) -> Tensor:
        """The gradients [s t d] at the tail's input that the losses at `place` with these labels [s] cause; NO_LABEL causes none."""
        with torch.enable_grad():
            logits = self.logits(place)
            losses = F.cross_entropy(logits, labels.clamp_min(0).to(logits.device), reduction="none")
            (found,) = torch.autograd.grad((losses * (labels >= 0).to(losses)).sum(), self.leaf, retain_graph=True)
        return found.float()

    def fit(self, place: int, rest: Tensor) -> tuple[Tensor, Tensor]:
        """Products [s v] of what is left of a gradient at `place` [s d] with J^T W^T (p - e_y) for every label y, and its squares [s v].

        The directions themselves never exist: products with W J J^T are enough.
        """
        raw = self.split.head(self.exit[:, place].detach()).float().requires_grad_(True)
        finished = self.split.anatomy.finish(raw)
        (slope,) = torch.autograd.grad(finished.sum(), raw)
        weight, share = self.split.head.weight, finished.detach().softmax(-1)
        assert isinstance(weight, Tensor)
        weight, jacobian = weight.float(), self.jacobian(place)
        mean = torch.bmm(((share * slope) @ weight)[:, None], jacobian)[:, 0]
        along = slope * (torch.bmm(jacobian, rest[:, :, None])[:, :, 0] @ weight.T)
        with_mean = slope * (torch.bmm(jacobian, mean[:, :, None])[:, :, 0] @ weight.T)
        gram = torch.bmm(jacobian, jacobian.transpose(1, 2))
        own = torch.stack([((weight @ one) * weight).sum(1) for one in gram]) * slope.square()
        product = (rest * mean).sum(1, keepdim=True) - along
        square = (mean.square().sum(1, keepdim=True) - 2 * with_mean + own).clamp_min(1e-30)
        return product, square


@dataclass(frozen=True)
class Labels:
    """The labels [s t] that were read (NO_LABEL where gradients say nothing), how many positions, from the last, were reached, and every
    label's log-likelihood by the gradients [s t v], up to a constant."""

    found: Tensor
    reached: int
    evidence: Tensor


class _Look:
    """One visit: what came back, and what of it later positions account for so far. `share`: the square of the wire's relative error."""

    def __init__(self, tail: Tail, returned: Returned, rule: LabelRule, share: float) -> None:
        self.tail, self.gradient, self.scale = tail, returned.gradient.float(), returned.scale
        self.rule, self.share = rule, max(share, LEAST_SHARE)
        self.largest = self.gradient.norm(dim=-1).amax(1)
        self.later = torch.zeros_like(self.gradient)
        self.heard = torch.zeros(self.gradient.shape[0], dtype=torch.bool, device=self.gradient.device)

    def evidence(self, place: int) -> Tensor | None:
        """Every label's log-likelihood at a position [s v], up to a constant; None where nothing is left of the gradient."""
        rest = self.gradient[:, place] - self.scale * self.later[:, place]
        self.heard = rest.norm(dim=-1) > SILENT * self.largest
        if not bool(self.heard.any()):
            return None
        (product, square), length = self.tail.fit(place, rest), rest.square().sum(1, keepdim=True).clamp_min(1e-30)
        width, share = rest.shape[1], self.share
        if self.rule == "length":
            apart = length - 2 * self.scale * product + self.scale**2 * square
            found = -0.5 * width * (apart / (share * self.scale**2 * square) + square.log())
        else:
            found = 0.5 * width * (1 + share) / share * product.clamp_min(0).square() / (square * length)
        return torch.where(self.heard[:, None], found, 0.0).cpu()

    def accept(self, place: int, labels: Tensor) -> None:
        """These labels [s] are those of the position."""
        if self.tail.end < self.tail.split.blocks:
            self.later += self.tail.caused_by(place, labels)


def read_labels(
    split: SplitModel,
    bank: AdapterBank | None,
    end: int,
    returned: Sequence[Returned],
    until_s: float,
    pairs: AdapterBank | None = None,
    share: float = 0.0,
    rule: LabelRule = "direction",
) -> Labels:
    """The labels behind gradients that came back at one visit or several.

    A label's gradient is s v, with v of known direction and length and s one over the number of targets; the wire adds noise of variance
    share s^2 v^2 / d in each of d channels. Rule "direction" leaves the length open: of cosine c the log-likelihood is
    d c^2 (1 + share) / (2 share). "direction with prior" adds what the tail itself predicts; "length" does, and uses the length:
    -|g - s v|^2 / (2 variance) - d log |v|. Those of several visits add up.
    """
    looks = [_Look(Tail(split, bank, end, one.output, pairs), one, rule, share) for one in returned]
    found = torch.full(returned[0].labels.shape, NO_LABEL)
    tokens = found.shape[1]
    weight = split.head.weight
    assert isinstance(weight, Tensor)
    evidence = torch.zeros(*found.shape, len(weight))
    for place in range(tokens - 1, -1, -1):
        if monotonic_s() > until_s:
            return Labels(found, tokens - 1 - place, evidence)
        told = [one for one in (look.evidence(place) for look in looks) if one is not None]
        if not told:
            continue
        evidence[:, place] = torch.stack(told).sum(0)
        heard = torch.stack([look.heard.cpu() for look in looks]).any(0)
        value = evidence[:, place]
        if rule != "direction":
            value = value + torch.stack([look.tail.logits(place).detach().log_softmax(-1).cpu() for look in looks]).mean(0)
        found[:, place] = torch.where(heard, value.argmax(1), NO_LABEL)
        for look in looks:
            look.accept(place, found[:, place])
    return Labels(found, tokens, evidence)


def counted_labels(labels: Tensor) -> Tensor:
    """Which positions [s t] have a label."""
    return labels != IGNORE_LABEL
