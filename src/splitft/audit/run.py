"""One audit: every attacker at every cut asked for, within a budget of seconds for each cut.

Axes: s sequences, t tokens, p adapter parameters, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import torch
from torch import Tensor

from splitft.audit.base import FIRST, LATER, Attack, Audit, Case, CutAudit, Finding, Floors, Options
from splitft.audit.bottom import Bottom
from splitft.audit.forward import CLEAN, Gauge, Rule, Search, Verifier, measure
from splitft.audit.gradient import client_step, counted_labels, read_labels
from splitft.audit.public import frequencies, shuffled
from splitft.audit.ridge import Inverter, directions, learn
from splitft.audit.scores import floors_of, rare_tokens, score
from splitft.audit.tap import Span, Tap, directions_of
from splitft.audit.verdict import verdict_of
from splitft.clock import monotonic_s
from splitft.data.base import TokenRows
from splitft.engine.exchange import Ownership
from splitft.lora import AdapterBank, Layout

OpenTap: TypeAlias = Callable[[Case, int], Tap]
CALIBRATION_SEQUENCES = 8
# A wire with an error above this share of a standard deviation hides some tokens from the nearest-state attack: then others are tried too.
NOISY = 0.1
# Share of tokens on which the ridge and a search agree from which on nothing else is tried; the attacker sees it too.
AGREED = 0.98
# Shares of a cut's seconds by which learning, the attacks of K and those of B have ended.
LEARNT, KNOWN, BASE = 0.4, 0.7, 0.95
# Of these shares where labels are attacked too.
WITH_LABELS = 0.6
# Multiplications of the public text by the blocks of one attacker, at most: what a processor core does in some 20 s.
PUBLIC_WORK = 8e11


def own_tap(case: Case, cut: int) -> Tap:
    """The run's own codecs at a cut."""
    return Tap(case.settings, case.plan, cut)


def bank_of(case: Case, row: Tensor) -> AdapterBank:
    """A bank with one row: the adapter [p]."""
    device = case.split.model.get_input_embeddings().weight.device
    assert isinstance(device, torch.device)
    bank = AdapterBank(case.layout, 1, device)
    with torch.no_grad():
        bank.values.copy_(row[None].to(device))
    return bank


def knows_all(case: Case) -> bool:
    """Whether the bottlenecks are still as they begin, so that who knows the base model knows them."""
    own = (case.begun is None or torch.equal(one.of(case.adapters), one.of(case.begun)) for one in case.layout.matrices)
    return all(own)


def changes_nothing(layout: Layout, row: Tensor, first_block: int, end_block: int) -> bool:
    """Whether the adapters [p] of some blocks have no effect: all their B are zero, as before training."""
    inside = [entry for entry in layout.entries if first_block <= entry.key.block < end_block]
    return not any(bool(row[entry.middle : entry.end].any()) for entry in inside)


def public_sequences(case: Case, options: Options, cut: int) -> int:
    """How many public sequences fit the work of one attacker: fewer for a large bottom."""
    blocks = [case.split._blocks[block] for block in range(cut)]
    weights = sum(parameter.numel() for block in blocks for parameter in block.parameters())
    fitting = int(PUBLIC_WORK / max(1, weights * case.private.shape[1]))
    return max(min(options.public_sequences, 128), min(options.public_sequences, fitting))


def audit(case: Case, options: Options, cuts: Sequence[int] = (), open_tap: OpenTap = own_tap, gradients: bool = True) -> Audit:
    """Attack the case at its own cut, or at all of `cuts`. Equal arguments give equal findings where the seconds suffice."""
    began_s = monotonic_s()
    wanted = sorted(set(cuts or (case.plan.cut,)))
    labels_sent = not case.plan.exit_on_client
    floors = floors_of(case)
    share = WITH_LABELS if gradients and not labels_sent else 1.0
    attack = _Attack(case, options, wanted, open_tap, floors, share=share)
    forward = attack.forward()
    audits = []
    for cut in wanted:
        made = forward[cut]
        if gradients and not labels_sent:
            made = attack.with_labels(made)
        audits.append(replace(made, verdict=verdict_of(made.findings, floors, labels_sent)))
    findings = [one for made in audits for one in made.findings]
    return Audit(
        tuple(audits),
        floors,
        labels_sent,
        case.private.shape[0],
        case.private.shape[1],
        verdict_of(findings, floors, labels_sent),
        tuple(attack.notes),
        monotonic_s() - began_s,
        attack.visits,
    )


def worst_by_cut(case: Case, cuts: Sequence[int], options: Options | None = None) -> dict[int, Finding]:
    """What got furthest at each cut, by the upper end of its interval, of the attacker that knows the adapter and, in a U-shape, of those
    that read labels from gradients: what a bound on leaks goes by.

    Depth hardly moves either. Where labels are sent there is nothing to bound: they are the text.
    """
    share = WITH_LABELS if case.plan.exit_on_client else 1.0
    attack = _Attack(case, options or Options(), sorted(set(cuts)), own_tap, floors_of(case), ("K",), share)
    made = attack.forward()
    if case.plan.exit_on_client:
        made = {cut: attack.with_labels(one) for cut, one in made.items()}
    return {cut: max(one.findings, key=lambda found: (found.figures.high, found.figures.accuracy)) for cut, one in made.items()}


def _rules(attacker: Attack, gauge: Gauge) -> list[Rule]:
    """How candidates are chosen, best known first: over a wire with noise in other ways too."""
    rules: list[Rule] = ["exact"] if attacker == "K" else ["fused", "fused with prior", "nearest"]
    if gauge.relative > NOISY:
        rules += ["posterior", "fused"] if attacker == "K" else ["posterior"]
    return rules


@dataclass(frozen=True)
class _View:
    """Along which directions [r d] guesses are compared (None: all); whether the attacker learns from public text along axes of its own;
    what tells the attacks' names apart."""

    directions: Tensor | None
    own: bool
    name: str


@dataclass(frozen=True)
class _Visit:
    """What arrives [s t d] of the private sample at one of its visits, over which tap, and the directions that the wire seems to let
    through (None: all). `own`: the same tap for public text with axes of its own."""

    arrived: Tensor
    tap: Tap
    span: Span | None
    own: Tap

    def views(self, attacker: Attack) -> tuple[_View, ...]:
        """Ways to attack it, likelier ones first.

        Where directions are guessed at, with all others too; and so for B, whose guesses are of other weights than the client's. A narrow
        wire's axes were fitted to the private text, so its own states lie in them almost whole and those of public text do not: what is
        learnt from public text along axes of *its* own is the better guide, or not, so both are tried (codec `projection`, 64 of 256
        channels, B: 0.83 of the tokens by one, 0.97 by the other).
        """
        if self.span is None:
            return (_View(None, False, ""),)
        axes = self.span.axes
        views = _View(axes, False, ""), _View(axes, True, ", own axes"), _View(None, True, ", own axes, all directions")
        return views[:2] if self.span.exact and attacker == "K" else views


@dataclass
class _Attack:
    """The parts that attackers and cuts share."""

    case: Case
    options: Options
    cuts: list[int]
    open_tap: OpenTap
    floors: Floors
    attackers: tuple[Attack, ...] = ("K", "B")
    share: float = 1.0
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        case = self.case
        self.table = directions(case.split.model.get_input_embeddings().weight, case.vocabulary)
        self.frequency = frequencies(case.public, case.vocabulary)
        self.rare = rare_tokens(self.frequency, case.notable)
        self.bank = bank_of(case, case.adapters)
        self.count = public_sequences(case, self.options, max(self.cuts))
        # Lies apart from what is learnt from: the wire's error is measured on it.
        self.public = shuffled(case.public, self.count + CALIBRATION_SEQUENCES, self.options.seed)
        kept = min(CALIBRATION_SEQUENCES, max(1, len(self.public) // 4))
        self.sample = torch.from_numpy(self.public.batch(range(kept))[0])[:, : case.private.shape[1]]
        self.learnt_from: TokenRows = self.public.select(range(kept, len(self.public)))
        self.visits = self.options.visits if self._tap(self.cuts[0]).draws else 1
        if self._tap(self.cuts[0]).draws:
            looked = f"the mean of {self.visits} visits is attacked, under the adapter of now" if self.visits > 1 else "one is attacked"
            self.notes.append(f"every visit of a text has random numbers of its own: {looked}; with more, more of the noise averages out")

    def _tap(self, cut: int) -> Tap:
        tap = self.open_tap(self.case, cut)
        tap.visits = self.options.visits
        return tap

    def forward(self) -> dict[int, CutAudit]:
        """K and B at all cuts. Public text passes through the blocks once for each attacker, whatever the number of cuts."""
        began_s, seconds = monotonic_s(), self.share * self.options.seconds * len(self.cuts)
        visits = {cut: self._visits(cut) for cut in self.cuts}
        firsts = {cut: visits[cut][self.first] for cut in self.cuts}
        taps = {(cut, False): one.tap for cut, one in firsts.items()}
        taps |= {(cut, True): one.own for cut, one in firsts.items() if one.span is not None}
        alike = changes_nothing(self.case.layout, self.case.adapters, 0, max(self.cuts)) and knows_all(self.case)
        attackers = [one for one in self.attackers if one == "K" or not alike]
        inverters: dict[Attack, dict[tuple[int, bool], Inverter]] = {}
        for number, attacker in enumerate(attackers):
            until_s = began_s + LEARNT * seconds * (number + 1) / len(attackers)
            bottom = Bottom(self.case.split, self._bank(attacker), max(self.cuts), self._pairs(attacker))
            inverters[attacker] = learn(bottom, taps, self.learnt_from, self.table, self.case.vocabulary, until_s)
        if alike and "B" in self.attackers:
            self.notes.append("the adapters change nothing yet: the base weights are all there is to know")
        learning_s = (monotonic_s() - began_s) / len(self.cuts)
        made = {}
        for cut in self.cuts:
            made[cut] = self._at_cut(cut, visits[cut], inverters, learning_s)
        return made

    def _bank(self, attacker: Attack) -> AdapterBank | None:
        return self.bank if attacker in ("K", "L") else None

    def _pairs(self, attacker: Attack) -> AdapterBank | None:
        """The bottlenecks as an attacker knows them: those of now, or those of the beginning."""
        if not self.case.layout.matrices:
            return None
        return self.bank if attacker in ("K", "L") or self.case.begun is None else bank_of(self.case, self.case.begun)

    def _at_cut(
        self, cut: int, visits: Mapping[str, _Visit], learnt: Mapping[Attack, Mapping[tuple[int, bool], Inverter]], learning_s: float
    ) -> CutAudit:
        began_s = monotonic_s() - learning_s
        findings: list[Finding] = []
        found: dict[Attack, Tensor] = {}
        error = 0.0
        for attacker, inverters in learnt.items():
            inverter = inverters[cut, False]
            bottom = Bottom(self.case.split, self._bank(attacker), cut, self._pairs(attacker))
            until_s = began_s + self.share * self.options.seconds * (KNOWN if attacker == "K" else BASE)
            for number, (visit, one) in enumerate(visits.items()):
                now_s = monotonic_s()
                verifiers = {view.name: self._verifier(bottom, one, view, inverters) for view in one.views(attacker)}
                error = verifiers[""].gauge.relative if (attacker, visit) == ("K", self.first) else error
                end_s = now_s + max(0.0, until_s - now_s) * (number + 1) / len(visits)
                family = self._family(attacker, verifiers, end_s)
                finding, best = self._finding(attacker, cut, visit, family, inverter.penalty, monotonic_s() - now_s)
                if attacker not in found or finding.figures.accuracy > max(
                    earlier.figures.accuracy for earlier in findings if earlier.attacker == attacker
                ):
                    found[attacker] = best
                findings.append(finding)
        if "B" in self.attackers and "B" not in learnt:
            findings += [replace(one, attacker="B", seconds=0.0) for one in findings]
            found["B"] = found["K"]
        sequences = inverter.sequences
        spent_s = monotonic_s() - began_s
        return CutAudit(cut, tuple(findings), verdict_of(findings, self.floors, False), error, sequences, spent_s, found)

    def _verifier(self, bottom: Bottom, visit: _Visit, view: _View, inverters: Mapping[tuple[int, bool], Inverter]) -> Verifier:
        cut = visit.tap.plan.cut
        inverter = inverters.get((cut, view.own), inverters[cut, False])
        gauge = measure(bottom, visit.own if view.own else visit.tap, inverter, self.sample, view.directions)
        return Verifier(bottom, inverter, gauge, self.table, visit.arrived, self.options, self.frequency, self.sample)

    def _visits(self, cut: int) -> dict[str, _Visit]:
        """What arrives of the private sample, by visit: the first (or the mean of several, where they differ), and the later one under the
        adapter of now, after one under the earlier."""
        ids, tap = self.case.private, self._tap(cut)
        now = Bottom(self.case.split, self.bank, cut, self.bank).hidden(ids)
        visits = {self.first: self._visit(tap, tap.private(now), self._tap(cut))}
        if tap.remembers:
            again = self._tap(cut)
            before = bank_of(self.case, self.case.earlier)
            again.private(Bottom(self.case.split, before, cut, before).hidden(ids))
            visits[LATER] = self._visit(again, again.private(now), self._tap(cut))
        return visits

    def _visit(self, tap: Tap, arrived: Tensor, own: Tap) -> _Visit:
        span = directions_of(arrived)
        if span is not None:
            # The axes are those of the private text, and the server has them: it tries its public text along the same.
            tap.follow()
        return _Visit(arrived, tap, span, own)

    @property
    def first(self) -> str:
        return FIRST if self.visits == 1 else f"mean of {self.visits}"

    def _family(self, attacker: Attack, verifiers: Mapping[str, Verifier], until_s: float) -> dict[str, Search]:
        """The attacks of one attacker by each of its verifiers, best known first; those that time does not allow are left out, and said."""
        family: dict[str, Search] = {}
        began_s, late = monotonic_s(), 0
        for view, (named, verifier) in enumerate(verifiers.items()):
            ridge, tokens = verifier.by_ridge, verifier.scores.shape[1]
            family[f"ridge{named}"] = Search(ridge, torch.zeros(ridge.shape, dtype=torch.bool), tokens)
            end_s = began_s + max(0.0, until_s - began_s) * (view + 1) / len(verifiers)
            for number, rule in enumerate(_rules(attacker, verifier.gauge)):
                if (number or view) and monotonic_s() > end_s:
                    late += 1
                    continue
                search = verifier.search(rule, end_s)
                family[f"{rule}{named}"] = search
                agree = float((search.found == ridge).double().mean()) >= AGREED  # two attacks that share no more than a shortlist
                if agree or (rule == "exact" and verifier.gauge.relative <= CLEAN and not bool(search.unresolved.any())):
                    return family
        if late:
            self.notes.append(f"{attacker}: {late} more attacks were left out for want of time; --seconds gives them some")
        return family

    def _finding(
        self, attacker: Attack, cut: int, visit: str, family: Mapping[str, Search], penalty: float, seconds: float
    ) -> tuple[Finding, Tensor]:
        """The best of a family, with its text [s t]."""
        true = self.case.private
        counted = torch.ones(true.shape, dtype=torch.bool)
        figures = {name: score(search.found, true, counted, self.rare) for name, search in family.items()}
        best = max(figures, key=lambda name: figures[name].accuracy)
        verified = next((search for name, search in family.items() if not name.startswith("ridge")), family["ridge"])
        accuracies = {name: one.accuracy for name, one in figures.items()}
        unresolved = float(verified.unresolved[:, : verified.positions].double().mean()) if verified.positions else 1.0
        if verified.positions < true.shape[1]:
            self.notes.append(f"cut {cut}, {attacker}: {verified.positions} of {true.shape[1]} positions verified in the time given")
        made = Finding(attacker, cut, visit, figures[best], accuracies, unresolved, verified.positions, penalty, seconds)
        return made, family[best].found

    def with_labels(self, made: CutAudit) -> CutAudit:
        """The findings at a cut with those about the labels of a U-shape beside them, from one attack."""
        case, began_s = self.case, monotonic_s()
        returned = client_step(case, self.bank, made.cut, self.options.visits)
        end = Ownership(replace(case.plan, cut=made.cut), case.split.blocks).server_end
        alike = changes_nothing(case.layout, case.adapters, end, case.split.blocks) and knows_all(case)
        counted = counted_labels(returned.labels)
        true = torch.where(counted, returned.labels, 0)
        findings, found = list(made.findings), dict(made.found)
        attackers: tuple[Attack, ...] = ("L",) if alike else ("L", "L base")
        left_s = max((1 - WITH_LABELS) * self.options.seconds, self.options.seconds - made.seconds)
        for number, attacker in enumerate(attackers):
            now_s = monotonic_s()
            until_s = now_s + max(0.0, began_s + left_s - now_s) / (len(attackers) - number)
            labels, reached = read_labels(case.split, self._bank(attacker), end, returned, until_s, self._pairs(attacker))
            inside = counted & (torch.arange(labels.shape[1]) >= labels.shape[1] - reached)
            figures = score(labels, true, inside, self.rare)
            if reached < labels.shape[1]:
                self.notes.append(f"cut {made.cut}, {attacker}: labels of the last {reached} positions only in the time given")
            family = {"direction": figures.accuracy}
            seconds = monotonic_s() - now_s
            visit = FIRST if returned.visits == 1 else f"mean of {returned.visits}"
            findings.append(Finding(attacker, made.cut, visit, figures, family, 0.0, reached, None, seconds))
            found[attacker] = labels
        return replace(made, findings=tuple(findings), found=found, seconds=made.seconds + monotonic_s() - began_s)
