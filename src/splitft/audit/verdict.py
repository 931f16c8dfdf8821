"""The words of an audit. They are fixed here, so that no report says more than was measured."""

from __future__ import annotations

from collections.abc import Sequence

from splitft.audit.base import Finding, Floors, Verdict, Word

DISCLOSED_ACCURACY = 0.5
TIMES_FLOOR = 3.0
RARE_RECALL = 0.05
LABELS_SENT = "labels are sent: text is disclosed"
NOT_A_PROOF = "not a proof"


def word_of(finding: Finding, floors: Floors) -> Word:
    """The word for one attacker's figures; the floor is the larger of one in v and the most common token."""
    figures = finding.figures
    if figures.accuracy >= DISCLOSED_ACCURACY or figures.exact > 0:
        return "disclosed"
    if figures.accuracy > TIMES_FLOOR * floors.chance or (figures.rare_recall or 0.0) > RARE_RECALL:
        return "partly disclosed"
    return "not recovered by these attacks"


WORDS: tuple[Word, ...] = ("not recovered by these attacks", "partly disclosed", "disclosed")


def verdict_of(findings: Sequence[Finding], floors: Floors, labels_sent: bool) -> Verdict:
    """The verdict over several attackers: that of the one that got furthest. Without findings nothing was tried, and nothing was found.
    Where labels are sent they decide, and what the states alone give away is said behind."""
    if labels_sent:
        beside = f"; the states alone: {verdict_of(findings, floors, False).text}" if findings else ""
        return Verdict("disclosed", LABELS_SENT + beside)
    worst = max(findings, key=lambda one: (WORDS.index(word_of(one, floors)), one.figures.accuracy), default=None)
    if worst is None:
        return Verdict("not recovered by these attacks", f"not recovered by these attacks ({NOT_A_PROOF})")
    word = word_of(worst, floors)
    share = f"{worst.figures.accuracy:.3f} of the tokens by attacker {worst.attacker} at cut {worst.cut}"
    return Verdict(word, f"{word}: {share}" + (f" ({NOT_A_PROOF})" if word == WORDS[0] else ""))
