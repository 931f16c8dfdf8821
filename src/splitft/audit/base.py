"""What an audit is given and what it finds, as plain values.

Attackers. K knows the adapter of the client's blocks: the server itself knows it at the start of every round, for every block above
the shallowest cut. B knows only the public base weights. L has the gradients that come back in a U-shape and wants the labels. K+L
has both. Each has a family of attacks, of which the best counts.

Axes: s sequences, t tokens, d hidden width, v vocabulary, p adapter parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from splitft.data.base import TokenRows
from splitft.engine.settings import TrainSettings
from splitft.errors import ConfigError
from splitft.lora import Layout
from splitft.split import SplitModel
from splitft.types import Plan

Attack = Literal["K", "B", "L", "L base", "K+L"]
Word = Literal["disclosed", "partly disclosed", "not recovered by these attacks"]
ATTACKERS: Mapping[Attack, str] = {
    "K": "adapter known",
    "B": "base only",
    "L": "labels, tail known",
    "L base": "labels, base only",
    "K+L": "adapter known, with the labels' gradients",
}
FIRST, LATER = "first", "later"


@dataclass(frozen=True)
class Options:
    """How much is tried. `seconds` is for each cut: what is not reached by then is left out and said; results that depend on it do not
    repeat. `candidates` are verified at every position, by K up to `widest` where none fits (0: the vocabulary). `visits`: how often the
    text came by, which matters where a codec draws random numbers."""

    sequences: int = 4
    tokens: int = 64
    seconds: float = 60.0
    public_sequences: int = 1500
    candidates: int = 64
    widest: int = 0
    seed: int = 0
    visits: int = 1

    def __post_init__(self) -> None:
        for name, least in (("sequences", 1), ("tokens", 4), ("public_sequences", 16), ("candidates", 2), ("visits", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"audit: {name} is {getattr(self, name)}.", f"give {least} or more.")
        if not self.seconds > 0:
            raise ConfigError(f"audit: seconds is {self.seconds}.", "give more than 0.")


@dataclass(frozen=True)
class Case:
    """Whose text is attacked, and how it crosses the wire.

    `adapters` [p] are the client's now, `earlier` [p] those under which it sent the same text on an earlier visit. `plan` says the cut, the
    tail and who has the labels; `settings` hold the codecs. `private` [s t] and `trained` [s t] (whether a token is a target) are the
    client's own rows, `public` rows of text that anybody has. `notable` [v] marks tokens with a digit or a capital. `vocabulary` counts the
    tokens that may occur. `begun` [p] has the bottlenecks as every run over the base model begins with them, which is all that B knows of
    them; what crosses is what leaves the client's own.
    """

    split: SplitModel
    layout: Layout
    settings: TrainSettings
    plan: Plan
    adapters: Tensor
    earlier: Tensor
    private: Tensor
    trained: Tensor
    public: TokenRows
    notable: Tensor
    vocabulary: int
    begun: Tensor | None = None


@dataclass(frozen=True)
class Floors:
    """What is right without looking at the wire: one token in v, always the sample's most common token, and the base model's own first
    choice with the true text before it."""

    uniform: float
    common: float
    language_model: float

    @property
    def chance(self) -> float:
        """The larger of the two that know nothing of language: the verdict's floor."""
        return max(self.uniform, self.common)


@dataclass(frozen=True)
class Figures:
    """How much of a sample came out. `low`, `high`: 95 % Wilson interval of `accuracy`, widened by how much rows differ. `rare_recall` is
    None without rare tokens."""

    tokens: int
    accuracy: float
    low: float
    high: float
    exact: float
    rouge_l: float
    rare_recall: float | None
    rare_tokens: int
    by_position: tuple[float, ...]


@dataclass(frozen=True)
class Finding:
    """The best that one attacker got at one cut, of a `family` of attacks (name -> accuracy).

    `visit` is the first time the text was sent, a later one, or of how many visits the mean was attacked; `unresolved` the share of
    positions where no candidate came within the wire's own error; `positions` how many of a sequence were reached in time; `penalty` the
    ridge's, tuned on public text. `complete`: no attack of the family was cut short.
    """

    attacker: Attack
    cut: int
    visit: str
    figures: Figures
    family: Mapping[str, float]
    unresolved: float
    positions: int
    penalty: float | None
    seconds: float
    complete: bool = True


@dataclass(frozen=True)
class Verdict:
    """A fixed word and the sentence around it."""

    word: Word
    text: str


@dataclass(frozen=True)
class CutAudit:
    """Everything found at one cut. `found`: what each attacker recovered [s t], for whoever may see it; it is in no file."""

    cut: int
    findings: tuple[Finding, ...]
    verdict: Verdict
    wire_error: float
    public_sequences: int
    seconds: float
    found: Mapping[Attack, Tensor] = field(default_factory=dict, compare=False, repr=False)

    def best(self, attacker: Attack) -> Finding | None:
        """The attacker's best visit."""
        own = [one for one in self.findings if one.attacker == attacker]
        return max(own, key=lambda one: one.figures.accuracy, default=None)


@dataclass(frozen=True)
class Audit:
    """An audit as a whole. `labels_sent`: the labels themselves cross, which is the text. `visits` of a text that were attacked together:
    one where nothing is drawn or remembered, since another would be the same again."""

    cuts: tuple[CutAudit, ...]
    floors: Floors
    labels_sent: bool
    sequences: int
    tokens: int
    verdict: Verdict
    notes: tuple[str, ...]
    seconds: float
    visits: int = 1
