"""One audit: every attacker at every cut asked for, within a budget of seconds for each cut.

Axes: s sequences, t tokens, p adapter parameters, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from splitft.audit.attacks import WITH_LABELS, Attacks
from splitft.audit.base import Audit, Case, Finding, Options
from splitft.audit.scores import floors_of
from splitft.audit.verdict import verdict_of
from splitft.audit.visits import OpenTap, own_tap
from splitft.clock import monotonic_s


def audit(case: Case, options: Options, cuts: Sequence[int] = (), open_tap: OpenTap = own_tap, gradients: bool = True) -> Audit:
    """Attack the case at its own cut, or at all of `cuts`. Equal arguments give equal findings where the seconds suffice."""
    began_s = monotonic_s()
    wanted = sorted(set(cuts or (case.plan.cut,)))
    labels_sent = not case.plan.exit_on_client
    floors = floors_of(case)
    share = WITH_LABELS if gradients and not labels_sent else 1.0
    attack = Attacks(case, options, wanted, open_tap, floors, share=share)
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
    that read labels from gradients or do both: what a bound on leaks goes by. It is `complete` where none of them was cut short.

    Depth hardly moves either. Where labels are sent there is nothing to bound: they are the text.
    """
    share = WITH_LABELS if case.plan.exit_on_client else 1.0
    attack = Attacks(case, options or Options(), sorted(set(cuts)), own_tap, floors_of(case), ("K",), share)
    made = attack.forward()
    if case.plan.exit_on_client:
        made = {cut: attack.with_labels(one) for cut, one in made.items()}
    worst = {cut: max(one.findings, key=lambda found: (found.figures.high, found.figures.accuracy)) for cut, one in made.items()}
    return {cut: replace(one, complete=all(found.complete for found in made[cut].findings)) for cut, one in worst.items()}
