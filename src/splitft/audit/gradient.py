"""Labels from the gradients that a U-shaped split returns.

The server knows its own output u and the gradient g that comes back. The gradient at a position is, up to one positive scale,
J^T W^T (p - e_y) of that position's own loss plus what later positions cause through attention. From the last position to the first, what
later ones cause is subtracted (their labels are found by then), and the label is the one whose direction fits the rest best. No training,
no search: exact where the tail is known. It is one attack and not the best of a family: where it gets less, others may get more.

Axes: s sequences, t tokens, d hidden width (o of the exit's), v vocabulary, r rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from splitft.audit.base import Case
from splitft.audit.tap import Tap
from splitft.clock import monotonic_s
from splitft.engine.exchange import Ownership
from splitft.engine.narrow import decode, encode
from splitft.lora import AdapterBank
from splitft.loss import Targets, shift_labels, training_loss
from splitft.split import Route, SplitModel
from splitft.types import IGNORE_LABEL

MOST_ROWS = 512
# A gradient this small against the largest of its text is of a position without a label.
SILENT = 1e-4
NO_LABEL = -1


@dataclass(frozen=True)
class Returned:
    """What the server has of a step: its own `output` [s t d] as the client got it, and the `gradient` [s t d] that came back, of as few
    channels as a bottleneck leaves. `labels` [s t] are what it is after. The gradient is the mean of so many `visits`."""

    output: Tensor
    gradient: Tensor
    labels: Tensor
    visits: int = 1


def client_step(case: Case, bank: AdapterBank, cut: int, visits: int = 1) -> Returned:
    """A step of a U-shaped client on its private sample, every tensor through its codec.

    Gradients that get other random numbers at each of its `visits` are averaged, unless what goes forward gets some too: then every visit's
    output is another, with another gradient, and one is looked at.
    """
    split, tap, sequences = case.split, Tap(case.settings, case.plan, cut), case.private.shape[0]
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
    codecs = case.settings.codecs
    tap.visits = visits if codecs[3].draws and not (codecs[0].draws or codecs[2].draws) else 1
    return Returned(output, tap.private(gradient, 3), labels, tap.visits)


class Tail:
    """The attacker's copy of what follows the server's blocks, with the adapters of `bank` or none, and the bottlenecks of `pairs`."""

    def __init__(self, split: SplitModel, bank: AdapterBank | None, end: int, output: Tensor, pairs: AdapterBank | None = None) -> None:
        self.split, self.bank, self.end, self.output, self.pairs = split, bank, end, output, pairs
        self.leaf = output.detach().clone().requires_grad_(True)
        cache = DynamicCache() if end < split.blocks else None
        with torch.no_grad():
            self.kept = [] if cache is None else self._fill(cache)
        self.exit = split.run(self._route(self.leaf), None, None)
        self.logits = split.logits(self.exit)

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
            logits = self.logits[:, place].float()
            losses = F.cross_entropy(logits, labels.clamp_min(0).to(logits.device), reduction="none")
            (found,) = torch.autograd.grad((losses * (labels >= 0).to(losses)).sum(), self.leaf, retain_graph=True)
        return found.float()

    def fit(self, place: int, rest: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine [s v] of what is left of a gradient at `place` [s d] with J^T W^T (p - e_y) for every label y, and the scale between them.

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
        return product / (square.sqrt() * rest.norm(dim=1, keepdim=True).clamp_min(1e-30)), product / square


def read_labels(
    split: SplitModel, bank: AdapterBank | None, end: int, returned: Returned, until_s: float, pairs: AdapterBank | None = None
) -> tuple[Tensor, int]:
    """The labels [s t] behind a returned gradient (NO_LABEL where it says nothing), and how many positions, from the last, were reached."""
    tail = Tail(split, bank, end, returned.output, pairs)
    gradient = returned.gradient.float()
    found = torch.full(returned.labels.shape, NO_LABEL)
    tokens = found.shape[1]
    largest = gradient.norm(dim=-1).amax(1)
    later = torch.zeros_like(gradient)
    scales: list[Tensor] = []
    for place in range(tokens - 1, -1, -1):
        if monotonic_s() > until_s:
            return found, tokens - 1 - place
        scale = torch.cat(scales).median() if scales else gradient.new_ones(())
        rest = gradient[:, place] - scale * later[:, place]
        heard = rest.norm(dim=-1) > SILENT * largest
        if not bool(heard.any()):
            continue
        cosine, fitted = tail.fit(place, rest)
        chosen = cosine.argmax(1)
        found[:, place] = torch.where(heard, chosen, NO_LABEL).cpu()
        own = fitted.gather(1, chosen[:, None])[:, 0]
        if bool((heard & (own > 0)).any()):
            scales.append(own[heard & (own > 0)])
        if end < split.blocks:
            later += tail.caused_by(place, found[:, place])
    return found, tokens


def counted_labels(labels: Tensor) -> Tensor:
    """Which positions [s t] have a label."""
    return labels != IGNORE_LABEL
