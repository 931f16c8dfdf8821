"""Client-level differential privacy of the global adapters: every client's update clipped, noise on their mean.

Axes: n participants, p adapter parameters, c coordinates that get noise.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from splitft.aggregate.average import Average
from splitft.aggregate.base import LEFT, Aggregator, Merged, State, Updates, require_finite
from splitft.aggregate.coordinates import Coordinates
from splitft.aggregate.freeze_a import FreezeA
from splitft.aggregate.wrapper import Wrapper, chosen, require_count, require_number, starts_of
from splitft.errors import AdapterError, ConfigError
from splitft.lora import Layout
from splitft.privacy.accountant import ORDERS, Mechanism, Spent, delta_for, multiplier_for
from splitft.privacy.adaptive import count_noise, next_clip, sum_multiplier
from splitft.privacy.draws import KEY_BYTES, digest, secret_normals
from splitft.rng import fresh_bytes

KEY, MERGES, CLIP, MULTIPLIER, SQUARE, RENYI = (f"private.{name}" for name in ("key", "merges", "clip", "multiplier", "square", "renyi"))
# Updates merged so far, and those of them that were no change at all: for the check after the run, never for the journal.
UPDATES, STILL = "private.updates", "private.still"
SEEDED = "the noise can be taken off by whoever knows the seed"
# An update shorter than this share of the clip is no change: what is left where nothing was learned is rounding.
STANDING = 1e-9
# What the field is where nobody has set it: beside an epsilon it is not used.
GIVEN_BY_DEFAULT = 1.0


@dataclass(frozen=True)
class Forecast:
    """What a private run will do, before it starts: the noise over the clip on the sum, the length of the noise on the mean over the
    clip, and the epsilon of all merges at this delta."""

    multiplier: float
    noise_to_clip: float
    epsilon: float
    delta: float
    merges: int
    participants: int
    values: int


@dataclass(frozen=True)
class Private(Wrapper):
    """The plain mean of the clients' updates, each clipped to `clip` first, with Gaussian noise (DP-FedAvg, McMahan et al. 2018).

    Over `freeze_a`, the recommended rule, lengths are those of the change of the product B A, and noise is spread evenly over it; over
    `average` both factors get noise, which their product amplifies. Weights are equal, whatever was trained: a weight by tokens would be
    one more thing to hide, and one client's pull would have no bound; who trained nothing counts with a change of zero. So one client
    moves the mean by 2 clip / n at most, in the space where the noise is.

    `noise_multiplier`: the noise on the sum of updates in clips; or `epsilon`: the target, from which it follows for all `rounds`. `delta`
    0: clients^-1.1, at most 1e-5. `unit`: "replace" (one client's data become anything) or "absent" (its update counts as zero). Nothing is
    claimed from drawing clients: the draw follows from the run's seed, which everyone is told. `clip` adapts to the `quantile` of the norms
    at `rate` (0: stays), from a noisy count that takes `count_share` of the budget. `most_noise`: refused if the noise on the mean is
    longer than so many clips. Noise comes from a key made fresh for each run and kept with its state, so a resumed run draws nothing twice;
    `secret_seed` above 0 repeats it, for tests: who knows it can take the noise off, so such a run has no epsilon.

    The claim is about the global adapters, as clients and users see them; the server is trusted, it sees activations and updates.
    """

    references: ClassVar[tuple[str, ...]] = ("1710.06963", "1805.06530", "1905.03871", "1808.00087")
    rule: Aggregator = field(default_factory=FreezeA)
    noise_multiplier: float = GIVEN_BY_DEFAULT
    epsilon: float = 0.0
    delta: float = 0.0
    unit: Literal["replace", "absent"] = "replace"
    clip: float = 0.1
    quantile: float = 0.5
    rate: float = 0.2
    count_share: float = 0.05
    most_noise: float = 4.0
    clients: int = 0
    rounds: int = 0
    secret_seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.rule) not in (FreezeA, Average):
            raise ConfigError(
                f"aggregator private: rule is {type(self.rule).__name__}, for which one client's pull has no proven bound.",
                'Set aggregator.rule to "freeze_a" or "average"; a server optimizer may stand outside.',
            )
        object.__setattr__(self, "partial_uploads", False)
        object.__setattr__(self, "guarded", True)
        self._check_fields()

    def _check_fields(self) -> None:
        see = "docs/privacy.md says what each means."
        from_zero = ("noise_multiplier", "epsilon", "rate")
        for name in from_zero:
            require_number(name, getattr(self, name), "a number from 0", lambda value: value >= 0, see)
        for name in ("clip", "most_noise"):
            require_number(name, getattr(self, name), "a number above 0", lambda value: value > 0, see)
        for name in ("quantile", "count_share"):
            require_number(name, getattr(self, name), "a number above 0 and below 1", lambda value: 0 < value < 1, see)
        require_number("delta", self.delta, "a number from 0 to below 1", lambda value: 0 <= value < 1, see)
        for name in ("clients", "rounds", "secret_seed"):
            require_count(name, getattr(self, name), 0, see)
        if self.epsilon > 0 and self.noise_multiplier != GIVEN_BY_DEFAULT:
            raise ConfigError(
                f"aggregator.epsilon is {self.epsilon:g} and noise_multiplier {self.noise_multiplier:g}; each follows from the other.",
                "give one of the two.",
            )
        if self.unit not in ("replace", "absent"):
            raise ConfigError(f'aggregator.unit is {self.unit!r}; allowed are "replace" and "absent".', see)

    @property
    def told_delta(self) -> float:
        """The delta of every claim."""
        return self.delta or delta_for(self.clients)

    @property
    def adaptive(self) -> bool:
        return self.rate > 0

    @property
    def cautions(self) -> tuple[str, ...]:
        """What to tell the user before the run."""
        found = []
        if not isinstance(self.rule, FreezeA):
            found.append('noise on both factors is amplified in their product: aggregator.rule = "freeze_a" is the recommended form.')
        if self.secret_seed:
            found.append(f"{SEEDED}: no epsilon is claimed; aggregator.secret_seed = 0 draws a fresh key.")
        return tuple(found)

    def settled(self, clients: int, rounds: int) -> Private:
        """The rule as a run of so many clients and rounds has it. Raises ConfigError when the budget cannot be met."""
        made = replace(self, clients=clients, rounds=rounds)
        made.multiplier()
        return made

    def multiplier(self) -> float:
        """The noise on the sum over the clip, the adaptive clip's count included: given, or what the target epsilon needs."""
        if self.epsilon == 0:
            return self.noise_multiplier
        if self.rounds == 0:
            raise ConfigError("aggregator.epsilon is for a number of rounds, which is not known.", "set aggregator.rounds.")
        return multiplier_for(self.epsilon, self.told_delta, self.rounds, self.unit)

    def forecast(self, layout: Layout, participants: int) -> Forecast:
        """What a run of `rounds` merges of so many participants will do."""
        trained = self.rule.trained(layout)
        values = layout.parameters if trained is None else int(trained.sum())
        multiplier = self.multiplier()
        on_sum = sum_multiplier(multiplier, self.count_share) if self.adaptive else multiplier
        spent = Spent().after(Mechanism(multiplier, self.unit), self.rounds) if multiplier else Spent()
        length = on_sum * values**0.5 / participants
        return Forecast(multiplier, length, spent.epsilon(self.told_delta), self.told_delta, self.rounds, participants, values)

    def require_useful(self, layout: Layout, participants: int) -> Forecast:
        """The forecast. Raises ConfigError when the noise would drown what is learned: too small a budget, or too few participants."""
        found = self.forecast(layout, participants)
        if found.noise_to_clip > self.most_noise:
            enough = -int(-participants * found.noise_to_clip // self.most_noise)
            raise ConfigError(
                f"the privacy budget cannot be met: epsilon {found.epsilon:.3g} at delta {found.delta:.2g} over {found.merges} rounds "
                f"needs a noise multiplier of {found.multiplier:.3g}, and with {participants} participants the noise on {found.values} "
                f"values is {found.noise_to_clip:.3g} times as long as the longest update; allowed is {self.most_noise:g}.",
                f"take {enough} participants or more, a larger epsilon, fewer rounds, or a smaller lora.rank.",
            )
        return found

    def init(self, layout: Layout) -> State:
        key = digest(b"secret_seed", self.secret_seed.to_bytes(16, "little")) if self.secret_seed else fresh_bytes(KEY_BYTES)
        return {
            KEY: torch.tensor(list(key), dtype=torch.uint8),
            MERGES: torch.zeros(1, dtype=torch.int64),
            CLIP: torch.tensor([self.clip], dtype=torch.float64),
            MULTIPLIER: torch.tensor([self.multiplier()], dtype=torch.float64),
            SQUARE: torch.zeros(1, dtype=torch.float64),
            RENYI: torch.zeros(len(ORDERS), dtype=torch.float64),
            UPDATES: torch.zeros(1, dtype=torch.int64),
            STILL: torch.zeros(1, dtype=torch.int64),
            LEFT: torch.zeros(1, dtype=torch.int64),
        }

    def merge(self, before: Tensor, updates: Updates, state: State) -> Merged:
        """As the seam says; AdapterError too when a merge more would go beyond the target epsilon, and for partial uploads."""
        require_finite(updates)
        if updates.sent is not None:
            raise AdapterError("a private mean needs whole updates, and parts arrived.", "let clients upload their adapters whole.")
        given = _by_client(updates)
        count, clip, multiplier = len(given.clients), float(state[CLIP]), float(state[MULTIPLIER])
        releases = 1 + int(state.get(LEFT, 0))
        spent = self._spent(state, multiplier, releases)
        space = self._space(given.layout, before)
        starts = starts_of(self, before, given)
        heard = (given.weights() > 0).tolist()
        trained = (row if some else start for row, start, some in zip(given.values, starts, heard, strict=True))
        changes = (space.of(row.double() - start.double()) for row, start in zip(trained, starts, strict=True))
        total, within, still = _clipped_sum(changes, clip, given.layout.parameters)
        noise = torch.zeros(space.count + 1, dtype=torch.float64)
        on_sum, on_count = multiplier, 0.0
        if self.adaptive:
            on_sum, on_count = sum_multiplier(multiplier, self.count_share), count_noise(multiplier, self.count_share, self.unit)
        if multiplier > 0:
            values = digest(repr((given.clients, clip, within)).encode(), total.numpy().tobytes())
            made = secret_normals(bytes(state[KEY].tolist()), f"private mean {int(state[MERGES])}", values, space.count + 1)
            noise = torch.from_numpy(made)
        mean = (total + space.scattered(noise[1:]) * (on_sum * clip)) / count
        start = torch.stack([one.double() for one in starts]).mean(0) if given.ranks is not None else before.double()
        adapters = torch.where(space.columns, start + space.back(mean), before.double()).float()
        share = (within + on_count * float(noise[0])) / count
        after = {
            **state,
            MERGES: state[MERGES] + releases,
            CLIP: torch.tensor([next_clip(clip, share, self.quantile, self.rate) if self.adaptive else clip], dtype=torch.float64),
            SQUARE: torch.tensor([spent.square], dtype=torch.float64),
            RENYI: torch.tensor(spent.renyi, dtype=torch.float64),
            UPDATES: state[UPDATES] + count,
            STILL: state[STILL] + still,
            LEFT: torch.zeros(1, dtype=torch.int64),
        }
        std = on_sum * clip / count
        figures = {"clip": clip, "participants": count, "noise_std": std, "noise_norm": space.noise_norm(before, std)}
        return Merged(adapters, after, metrics=self._figures(figures, spent, multiplier, int(after[MERGES])))

    def _space(self, layout: Layout, before: Tensor) -> Coordinates:
        trained = self.rule.trained(layout)
        return Coordinates.of_factors(layout) if trained is None else Coordinates.of_product(layout, before, trained)

    def _spent(self, state: State, multiplier: float, releases: int) -> Spent:
        """The account with this merge in it, of so many releases, before anything is told."""
        before = Spent(float(state[SQUARE]), tuple(state[RENYI].tolist()))
        if multiplier == 0:
            return before
        spent = before.after(Mechanism(multiplier, self.unit), releases)
        if self.epsilon and (found := spent.epsilon(self.told_delta)) > self.epsilon * (1 + 1e-6):
            raise AdapterError(
                f"the privacy budget is spent: after {int(state[MERGES])} merges one more would make epsilon {found:.4g}, and "
                f"aggregator.epsilon is {self.epsilon:g}.",
                "the run ends here; one with more rounds has to know them from its start.",
            )
        return spent

    def _figures(self, figures: dict[str, float], spent: Spent, multiplier: float, merges: int) -> dict[str, float]:
        """For the journal. Nothing in them depends on the clients' values but through noise; there is no epsilon without noise, nor with
        noise from a seed that others may know."""
        if multiplier > 0 and not self.secret_seed:
            figures |= {
                "epsilon": spent.epsilon(self.told_delta),
                "delta": self.told_delta,
                "noise_multiplier": multiplier,
                "merges": merges,
                "replaced": self.unit == "replace",
            }
        return {f"privacy_{name}": float(value) for name, value in figures.items()}


def _by_client(updates: Updates) -> Updates:
    """All who ended the round, by client: sums and noise must not depend on who arrives first, nor their number on who had something to
    train on. Raises AdapterError when nobody had."""
    updates.weights()
    return chosen(updates, sorted(range(len(updates.clients)), key=lambda row: updates.clients[row]))


def _clipped_sum(changes: Iterable[Tensor], clip: float, width: int) -> tuple[Tensor, int, int]:
    """The sum [p] float64 of changes [p], each shortened to `clip` where it is longer; how many were not, and how many are as good as
    zero."""
    total, within, still = torch.zeros(width, dtype=torch.float64), 0, 0
    for change in changes:
        norm = float(torch.linalg.vector_norm(change))
        within, still = within + (norm <= clip), still + (norm <= STANDING * clip)
        total.add_(change, alpha=1.0 if norm <= clip else clip / norm)
    return total, within, still
