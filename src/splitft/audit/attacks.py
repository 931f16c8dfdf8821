"""The attacks of one audit and what they share: banks, public text, inverters, time.

Axes: s sequences, t tokens, p adapter parameters, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from splitft.audit.base import Attack, Case, CutAudit, Finding, Floors, Options
from splitft.audit.beam import Beam, listen
from splitft.audit.bottom import Bottom, LanguageModel
from splitft.audit.forward import CLEAN, Gauge, Rule, Search, Verifier, measure
from splitft.audit.gradient import LABEL_RULES, LabelRule, Labels, Returned, client_visits, counted_labels, read_labels, wire_share
from splitft.audit.public import frequencies, shuffled
from splitft.audit.ridge import Inverter, directions, learn
from splitft.audit.scores import rare_tokens, score
from splitft.audit.tap import MOST_PLAYED, PublicTap
from splitft.audit.verdict import verdict_of
from splitft.audit.visits import Learnt, OpenTap, View, Visit, bank_of, visits_of
from splitft.clock import monotonic_s
from splitft.compress.noise import noise_in
from splitft.data.base import TokenRows
from splitft.engine.exchange import Ownership
from splitft.lora import AdapterBank, Layout

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
# Public batches by which a wire's noise is listened to have a number of their own.
CALIBRATION_BATCH = 1 << 21


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


def rules_for(attacker: Attack, gauge: Gauge) -> list[Rule]:
    """How candidates are chosen, best known first: over a wire with noise in other ways too."""
    rules: list[Rule] = ["exact"] if attacker == "K" else ["fused", "fused with prior", "nearest"]
    if gauge.relative > NOISY:
        rules += ["beam", "fused"] if attacker == "K" else ["beam"]
    return rules


def _best(findings: Sequence[Finding], attacker: Attack) -> float:
    """The largest share that an attacker got so far."""
    return max(one.figures.accuracy for one in findings if one.attacker == attacker)


@dataclass
class Attacks:
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
        self.visits = self._visits()
        if self.open_tap(case, self.cuts[0]).draws:
            looked = f"the mean of {self.visits} visits is attacked, under the adapter of now" if self.visits > 1 else "one is attacked"
            self.notes.append(f"every visit of a text has random numbers of its own: {looked}; with more, more of the noise averages out")
        # What K has at each cut, for the attack that joins labels to it.
        self.known: dict[int, tuple[Verifier, str]] = {}

    def _visits(self) -> int:
        """How many visits are looked at together where another says more than the first."""
        tap, back = self.open_tap(self.case, self.cuts[0]), self.case.settings.codecs[3]
        if tap.remembers:
            return min(self.options.visits, MOST_PLAYED)
        if tap.draws:
            tap.come_by(self.options.visits)
            return tap.looked
        return self.options.visits if self.case.plan.exit_on_client and (back.draws or back.hears_samples) else 1

    def forward(self) -> dict[int, CutAudit]:
        """K and B at all cuts. Public text passes through the blocks once for each attacker, whatever the number of cuts."""
        began_s, seconds = monotonic_s(), self.share * self.options.seconds * len(self.cuts)
        visits = {cut: visits_of(self.case, self.open_tap, self.bank, cut, self.options.visits) for cut in self.cuts}
        taps: dict[Learnt, PublicTap] = {}
        for cut in self.cuts:
            for name, one in visits[cut].items():
                taps |= one.taps(cut, name)
        alike = changes_nothing(self.case.layout, self.case.adapters, 0, max(self.cuts)) and knows_all(self.case)
        attackers = [one for one in self.attackers if one == "K" or not alike]
        inverters: dict[Attack, dict[Learnt, Inverter]] = {}
        for number, attacker in enumerate(attackers):
            until_s = began_s + LEARNT * seconds * (number + 1) / len(attackers)
            bottom = Bottom(self.case.split, self._bank(attacker), max(self.cuts), self._pairs(attacker))
            inverters[attacker] = learn(bottom, taps, self.learnt_from, self.table, until_s)
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
        self, cut: int, visits: Mapping[str, Visit], learnt: Mapping[Attack, Mapping[Learnt, Inverter]], learning_s: float
    ) -> CutAudit:
        began_s = monotonic_s() - learning_s
        findings: list[Finding] = []
        found: dict[Attack, Tensor] = {}
        error = 0.0
        for attacker, inverters in learnt.items():
            bottom = Bottom(self.case.split, self._bank(attacker), cut, self._pairs(attacker))
            until_s = began_s + self.share * self.options.seconds * (KNOWN if attacker == "K" else BASE)
            for number, (visit, one) in enumerate(visits.items()):
                now_s = monotonic_s()
                inverter = inverters[cut, visit, False]
                verifiers = {view.name: self._verifier(bottom, one, view, inverters[cut, visit, view.own]) for view in one.views(attacker)}
                if attacker == "K" and not number:
                    error = verifiers[""].gauge.relative
                end_s = now_s + max(0.0, until_s - now_s) / (len(visits) - number)
                family, late = self._family(attacker, verifiers, end_s)
                finding, best = self._finding(attacker, cut, visit, family, inverter.penalty, monotonic_s() - now_s)
                if inverter.sequences < (planned := len(self.learnt_from)):
                    finding = replace(finding, complete=False)
                    self.notes.append(f"cut {cut}, {attacker}: learnt from {inverter.sequences} of {planned} public sequences in time")
                if late:
                    finding = replace(finding, complete=False)
                    self.notes.append(f"cut {cut}, {attacker}: {late} attacks had too little time; --seconds gives them more")
                if attacker not in found or finding.figures.accuracy > _best(findings, attacker):
                    found[attacker] = best
                    if attacker == "K":
                        self.known[cut] = verifiers[""], visit
                findings.append(finding)
        if "B" in self.attackers and "B" not in learnt:
            findings += [replace(one, attacker="B", seconds=0.0) for one in findings]
            found["B"] = found["K"]
        sequences = inverter.sequences
        spent_s = monotonic_s() - began_s
        return CutAudit(cut, tuple(findings), verdict_of(findings, self.floors, False), error, sequences, spent_s, found)

    def _verifier(self, bottom: Bottom, visit: Visit, view: View, inverter: Inverter) -> Verifier:
        tap = visit.own if view.own else visit.tap
        gauge = measure(bottom, tap, inverter, self.sample, view.directions)
        return Verifier(bottom, inverter, gauge, self.table, visit.arrived, self.options, self.frequency, self.sample, tap)

    def _beam(
        self, verifier: Verifier, family: Mapping[str, Search], attacker: Attack, until_s: float, evidence: Tensor | None = None
    ) -> Search:
        """The search by likelihood; where the attacker's weights are not the client's, with the doubt that its best guess so far leaves."""
        noise = noise_in(self.case.settings.codecs[0])
        clip = 0.0 if noise is None else noise.clip
        wire = listen(verifier.bottom, verifier.tap, self.sample, verifier.gauge.directions, clip, CALIBRATION_BATCH)
        arrived = wire.coordinates(verifier.observed)
        if attacker == "B":
            guess = next((search.found for name, search in family.items() if not name.startswith("ridge")), verifier.by_ridge)
            wire = wire.doubted(verifier.bottom.replay(guess).float().cpu(), arrived)
        sequences = len(arrived)
        model = LanguageModel(self.case.split, self.frequency, sequences, self.sample, self._bank(attacker))
        found, positions = Beam(verifier.bottom, wire, arrived, verifier.scores, model, evidence).search(until_s)
        return Search(found, torch.zeros(found.shape, dtype=torch.bool), positions)

    def _family(self, attacker: Attack, verifiers: Mapping[str, Verifier], until_s: float) -> tuple[dict[str, Search], int]:
        """The attacks of one attacker by each of its verifiers, best known first, and how many time did not allow."""
        family: dict[str, Search] = {}
        began_s, late = monotonic_s(), 0
        for view, (named, verifier) in enumerate(verifiers.items()):
            ridge, tokens = verifier.by_ridge, verifier.scores.shape[1]
            family[f"ridge{named}"] = Search(ridge, torch.zeros(ridge.shape, dtype=torch.bool), tokens)
            end_s = began_s + max(0.0, until_s - began_s) * (view + 1) / len(verifiers)
            for number, rule in enumerate(rules_for(attacker, verifier.gauge)):
                if (number or view) and monotonic_s() > end_s:
                    late += 1
                    continue
                search = self._beam(verifier, family, attacker, end_s) if rule == "beam" else verifier.search(rule, end_s)
                late += search.positions < tokens
                family[f"{rule}{named}"] = search
                agree = float((search.found == ridge).double().mean()) >= AGREED  # two attacks that share no more than a shortlist
                if agree or (rule == "exact" and verifier.gauge.relative <= CLEAN and not bool(search.unresolved.any())):
                    return family, late
        return family, late

    def _finding(
        self, attacker: Attack, cut: int, visit: str, family: Mapping[str, Search], penalty: float, seconds: float
    ) -> tuple[Finding, Tensor]:
        """The best of a family, with its text [s t]."""
        true = self.case.private
        counted = torch.ones(true.shape, dtype=torch.bool)
        figures = {name: score(search.found, true, counted, self.rare) for name, search in family.items()}
        best = max(figures, key=lambda name: figures[name].accuracy)
        verified = next((search for name, search in family.items() if not name.startswith("ridge")), next(iter(family.values())))
        accuracies = {name: one.accuracy for name, one in figures.items()}
        unresolved = float(verified.unresolved[:, : verified.positions].double().mean()) if verified.positions else 1.0
        if verified.positions < true.shape[1]:
            self.notes.append(f"cut {cut}, {attacker}: {verified.positions} of {true.shape[1]} positions verified in the time given")
        made = Finding(attacker, cut, visit, figures[best], accuracies, unresolved, verified.positions, penalty, seconds)
        return made, family[best].found

    def with_labels(self, made: CutAudit) -> CutAudit:
        """The findings at a cut with those about the labels of a U-shape beside them, and of who joins both."""
        case, began_s = self.case, monotonic_s()
        looks = client_visits(case, self.bank, made.cut, self.options.visits)
        side_by_side = any(len(one) > 1 for one in looks.values())
        mine = replace(case, private=self.sample, trained=torch.ones_like(self.sample, dtype=torch.bool))
        public = client_visits(mine, self.bank, made.cut, 1 if side_by_side else self.options.visits)
        shares = dict(zip(looks, (wire_share(one) for one in public.values()), strict=True))
        end = Ownership(replace(case.plan, cut=made.cut), case.split.blocks).server_end
        alike = changes_nothing(case.layout, case.adapters, end, case.split.blocks) and knows_all(case)
        findings, found = list(made.findings), dict(made.found)
        attackers: tuple[Attack, ...] = ("L",) if alike else ("L", "L base")
        left_s = max((1 - WITH_LABELS) * self.options.seconds, self.options.seconds - made.seconds)
        turns = [(attacker, visit) for attacker in attackers for visit in looks]
        best: dict[LabelRule, Labels] = {}
        for number, (attacker, visit) in enumerate(turns):
            now_s = monotonic_s()
            until_s = now_s + max(0.0, began_s + left_s - now_s) / (len(turns) + 1 - number)  # one turn more, for who joins K and L
            reads = self._reads(attacker, end, looks[visit], shares[visit], until_s)
            finding, labels = self._label_finding(attacker, made.cut, visit, reads, looks[visit], monotonic_s() - now_s)
            if attacker not in found or finding.figures.accuracy > _best(findings, attacker):
                found[attacker] = labels
                best = dict(reads) if attacker == "L" else best
            findings.append(finding)
        joined = self._joined(made, findings, best, began_s + left_s)
        if joined is not None:
            findings.append(joined[0])
            found["K+L"] = joined[1]
        return replace(made, findings=tuple(findings), found=found, seconds=made.seconds + monotonic_s() - began_s)

    def _reads(self, attacker: Attack, end: int, looks: Sequence[Returned], share: float, until_s: float) -> dict[LabelRule, Labels]:
        """One attacker's readings of labels: by direction where the wire is clean, else in other ways too."""
        rules = LABEL_RULES if share > NOISY**2 else LABEL_RULES[:1]
        bank, pairs = self._bank(attacker), self._pairs(attacker)
        reads: dict[LabelRule, Labels] = {}
        for number, rule in enumerate(rules):
            now_s = monotonic_s()
            end_s = now_s + max(0.0, until_s - now_s) / (len(rules) - number)
            reads[rule] = read_labels(self.case.split, bank, end, looks, end_s, pairs, share, rule)
        return reads

    def _label_finding(
        self, attacker: Attack, cut: int, visit: str, reads: Mapping[LabelRule, Labels], looks: Sequence[Returned], seconds: float
    ) -> tuple[Finding, Tensor]:
        labels, tokens = looks[0].labels, looks[0].labels.shape[1]
        counted, reached = counted_labels(labels), min(read.reached for read in reads.values())
        inside = counted & (torch.arange(tokens) >= tokens - reached)
        figures = {rule: score(read.found, torch.where(counted, labels, 0), inside, self.rare) for rule, read in reads.items()}
        best = max(figures, key=lambda rule: figures[rule].accuracy)
        if reached < tokens:
            self.notes.append(f"cut {cut}, {attacker}: labels of the last {reached} positions only in the time given")
        family = {str(rule): one.accuracy for rule, one in figures.items()}
        made = Finding(attacker, cut, visit, figures[best], family, 0.0, reached, None, seconds, reached == tokens)
        return made, reads[best].found

    def _joined(
        self, made: CutAudit, findings: Sequence[Finding], labels: Mapping[LabelRule, Labels], until_s: float
    ) -> tuple[Finding, Tensor] | None:
        """Who has the states has the gradients: the label at a position is the next token. None where the states alone give it away, or the
        gradients do and every token is a label."""
        read = max((one for one in findings if one.attacker == "L"), key=lambda one: one.figures.accuracy)
        true = self.case.private
        all_labels = read.figures.tokens >= true.shape[0] * (true.shape[1] - 1)
        if _best(findings, "K") >= AGREED or (read.figures.accuracy >= AGREED and all_labels):
            return None
        now_s, (verifier, visit) = monotonic_s(), self.known[made.cut]
        own = Search(made.found["K"], torch.zeros(true.shape, dtype=torch.bool), true.shape[1])
        family, wanted = {"states alone": own}, [rule for rule in LABEL_RULES if rule in labels and rule != "direction with prior"]
        for number, rule in enumerate(wanted):
            evidence = labels[rule].evidence[:, :, : verifier.scores.shape[2]]
            evidence = torch.cat([torch.zeros_like(evidence[:, :1]), evidence[:, :-1]], 1)
            end_s = monotonic_s() + max(0.0, until_s - monotonic_s()) / (len(wanted) - number)
            family[f"beam, {rule}"] = self._beam(verifier, {}, "K", end_s, evidence)
        finding, text = self._finding("K+L", made.cut, visit, family, verifier.inverter.penalty, monotonic_s() - now_s)
        return replace(finding, complete=all(one.positions == true.shape[1] for one in family.values())), text
