"""Controller `ddpg`: an actor that learns, during the run, which dial saves most at a bearable loss.

Axes: n transitions of a batch, f features (OBSERVED), a actions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from splitft.control.base import (
    LARGEST_EXCESS,
    LEAST_DIAL,
    MOST_DIAL,
    Controller,
    Dial,
    Facts,
    Signal,
    State,
    are_dials,
    finite,
    is_number,
    is_whole,
    refuse,
    within,
)
from splitft.control.networks import Array, Moments, Network
from splitft.rng import numpy_stream

OBSERVED = ("excess", "slope", "bytes", "residual", "skipped", "activations", "gradients", "progress")
LEAST_SHARE = 1e-3


@dataclass(frozen=True)
class Learner:
    """Actor and critic, the slow copies that targets are taken from, and Adam's memory of both. Each `improved` gives another one."""

    actor: Network
    critic: Network
    slow_actor: Network
    slow_critic: Network
    actor_moments: Moments
    critic_moments: Moments

    @classmethod
    def drawn(cls, actions: int, hidden: int, seed: int) -> Learner:
        stream = numpy_stream(seed, "controller", 0)
        actor = Network.drawn(len(OBSERVED), hidden, actions, True, stream)
        critic = Network.drawn(len(OBSERVED) + actions, hidden, 1, False, stream)
        return cls(actor, critic, actor, critic, Moments.empty(actor), Moments.empty(critic))

    @classmethod
    def restored(cls, plain: Mapping[str, Any]) -> Learner:
        """The inverse of `plain`."""
        actors = (Network.restored(plain[name], True) for name in ("actor", "slow_actor"))
        critics = (Network.restored(plain[name], False) for name in ("critic", "slow_critic"))
        (actor, slow_actor), (critic, slow_critic) = actors, critics
        moments = (Moments.restored(plain[name]) for name in ("actor_moments", "critic_moments"))
        return cls(actor, critic, slow_actor, slow_critic, *moments)

    def plain(self) -> dict[str, Any]:
        """All of it as JSON holds it exactly."""
        return {name: getattr(self, name).plain() for name in self.__dataclass_fields__}

    def improved(self, batch: Array, discount: float, rate: float, follow: float, calm: float) -> Learner:
        """After one step of critic and actor (arXiv 1509.02971, algorithm 1) on transitions [n f + a + 1 + f]."""
        features, count = len(OBSERVED), len(batch)
        pairs, rewards, nexts = batch[:, : -1 - features], batch[:, -1 - features, None], batch[:, -features:]
        values = rewards + discount * self.slow_critic(np.hstack([nexts, self.slow_actor(nexts)]))
        errors = self.critic(pairs) - values
        critic, critic_moments = self.critic_moments.step(self.critic, self.critic.gradients(pairs, 2.0 * errors / count)[0], rate)
        states = pairs[:, :features]
        chosen = np.hstack([states, self.actor(states)])
        by_action = critic.gradients(chosen, np.full((count, 1), -1.0 / count))[1][:, features:]  # uphill in value is downhill here
        by_action = by_action + calm * chosen[:, features:] / count
        actor, actor_moments = self.actor_moments.step(self.actor, self.actor.gradients(states, by_action)[0], rate)
        slow_actor, slow_critic = self.slow_actor.towards(actor, follow), self.slow_critic.towards(critic, follow)
        return Learner(actor, critic, slow_actor, slow_critic, actor_moments, critic_moments)


@dataclass(frozen=True)
class Ddpg(Controller):
    """Learn the dial by deep deterministic policy gradient, online, in the run itself (SplitCom's second controller).

    SplitCom says that an agent of this kind sets its thresholds and that the reward joins loss and bytes; everything else is our
    reconstruction. State: excess over budget, slope of the held-out loss, logarithm of the bytes' share of 16-bit values, residual and
    skipped share, the two dials, progress. Action: change of the dials' logarithms, at most a factor `reach` a round; one for both,
    or with `separate` one for each: nothing in the reward tells the gradients' errors apart until the held-out loss rises. Reward:
    -ln(bytes share) - `penalty` x ln(max(1, excess / budget)); the excess is that of the probe slice, or how far the held-out loss is above
    its best where that is more. Logarithms, because a saving from 10 % to 5 % should weigh as one from 100 % to 50 %, and because a
    penalty in proportion, or cut off, teaches a small critic nothing about the way back from far outside.

    Actor and critic have `hidden` tanh units; after each round `updates` steps of Adam (`rate`) on `batch` of the last `memory`
    transitions, slow copies following by `follow`, future rewards weighed by `discount`; rewards are centred and scaled, and the actor
    pays `calm` x action^2 / 2. Gaussian `exploration`, falling to a twentieth of it over the run. Rounds without a probe keep the dial
    and teach nothing.

    It promises no budget: while it explores it goes over, and it needs tens of rounds to learn anything. `bang_bang` is the safe choice.
    """

    references: ClassVar[tuple[str, ...]] = ("2602.10564", "1509.02971")
    probes: ClassVar[bool] = True
    budget: float = 0.01
    penalty: float = 1.0
    reach: float = 1.5
    separate: bool = False
    least: float = 0.25
    most: float = 8.0
    start: float = 1.0
    hidden: int = 16
    updates: int = 20
    batch: int = 32
    memory: int = 256
    rate: float = 0.01
    follow: float = 0.05
    discount: float = 0.6
    exploration: float = 0.6
    calm: float = 0.1

    def __post_init__(self) -> None:
        ends = are_dials(self.least, self.most)
        wholes = {name: getattr(self, name) for name in ("hidden", "batch", "memory")}
        shares = {"follow": self.follow, "rate": self.rate}
        refuse(
            "ddpg",
            {
                f"budget is {self.budget!r}; allowed is a share of the loss from 0.000001 to 1": is_number(self.budget, 1e-6, 1.0),
                f"penalty is {self.penalty!r}; allowed are 0 to 100": is_number(self.penalty, 0.0, 100.0),
                f"reach is {self.reach!r}; allowed is a factor from 1.01 to 100": is_number(self.reach, 1.01, 100.0),
                f"separate is {self.separate!r}; allowed are true and false": type(self.separate) is bool,
                f"least is {self.least!r} and most {self.most!r}; allowed are {LEAST_DIAL:g} to {MOST_DIAL:g}, most no less": ends,
                f"start is {self.start!r}; allowed is a dial from least to most": is_number(self.start, 0.0)
                and (not ends or self.least <= self.start <= self.most),
                f"updates is {self.updates!r}; allowed are whole numbers from 0": is_whole(self.updates, 0),
                f"discount is {self.discount!r}; allowed are 0 to 0.99": is_number(self.discount, 0.0, 0.99),
                f"exploration is {self.exploration!r}; allowed are 0 to 2": is_number(self.exploration, 0.0, 2.0),
                f"calm is {self.calm!r}; allowed are 0 to 10": is_number(self.calm, 0.0, 10.0),
                **{f"{name} is {value!r}; allowed are whole numbers from 1": is_whole(value, 1) for name, value in wholes.items()},
                **{f"{name} is {value!r}; allowed are 0.000001 to 1": is_number(value, 1e-6, 1.0) for name, value in shares.items()},
            },
        )

    @property
    def bounds(self) -> tuple[float, float]:
        return self.least, self.most

    def init(self, seed: int) -> State:
        learner = Learner.drawn(2 if self.separate else 1, self.hidden, seed)
        dials = {"activations": float(self.start), "gradients": float(self.start)}
        seen = {"loss": None, "best_loss": None, "evaluated": 0, "slope": 0.0}
        return {**dials, "seed": seed, "held_out": seen, "before": None, "transitions": [], "learner": learner.plain()}

    def step(self, signal: Signal, state: State) -> tuple[Dial, State, Facts]:
        held_out = seen_loss(signal, state["held_out"])
        dial = self.first(state)
        if signal.excess is None:
            return dial, {**state, "held_out": held_out, "before": None}, {}
        loss, best = held_out["loss"], held_out["best_loss"]
        rise = 0.0 if loss is None else min(loss / best - 1.0, LARGEST_EXCESS)
        budgets = max(signal.excess, rise) / self.budget
        share = math.log(within(LEAST_SHARE if signal.bytes_share is None else signal.bytes_share, (LEAST_SHARE, 2.0)))
        features, reward = (
            self._features(signal, budgets, held_out["slope"], share, dial),
            -share - self.penalty * math.log(max(1.0, budgets)),
        )
        transitions = list(state["transitions"])
        if state["before"] is not None:
            transitions = [*transitions, [*state["before"], reward, *features]][-self.memory :]
        stream = numpy_stream(int(state["seed"]), "controller", signal.round)
        learner = self._learnt(Learner.restored(state["learner"]), transitions, stream)
        noise = self.exploration * (1.0 - 0.95 * signal.progress)
        wanted = learner.actor(np.asarray([features]))[0]
        action = np.clip(wanted + noise * stream.standard_normal(len(wanted)), -1.0, 1.0).tolist()
        dials = {"activations": self._turned(dial.activations, action[0]), "gradients": self._turned(dial.gradients, action[-1])}
        after = {
            **dials,
            "seed": state["seed"],
            "held_out": held_out,
            "before": [*features, *action],
            "transitions": transitions,
            "learner": learner.plain(),
        }
        facts = {"excess": signal.excess, "reward": reward, "exploration": noise, "transitions": float(len(transitions))}
        return self.first(after), after, facts

    def _features(self, signal: Signal, budgets: float, slope: float, share: float, dial: Dial) -> list[float]:
        """What the actor sees, each about as large as one, in the order of OBSERVED."""
        low, high = math.log(self.least), math.log(self.most)

        def place(value: float) -> float:
            return (2.0 * math.log(value) - low - high) / (high - low) if high > low else 0.0

        shares = [within(finite(value) or 0.0, (0.0, 1.0)) for value in (signal.residual_share, signal.skipped_share)]
        places = [place(dial.activations), place(dial.gradients)]
        return [math.asinh(budgets) / 2.0, slope, share / 3.0 + 1.0, *shares, *places, 2.0 * signal.progress - 1.0]

    def _learnt(self, learner: Learner, transitions: Sequence[Sequence[float]], stream: np.random.Generator) -> Learner:  # noqa: TID251 - a type
        """After this round's updates; a handful of transitions first, since the critic fits any two exactly and wrongly."""
        if len(transitions) < min(8, self.memory):
            return learner
        known, column = np.asarray(transitions, dtype=np.float64), -1 - len(OBSERVED)
        rewards = known[:, column]
        # The same policy is best by rewards that are shifted and scaled, and a critic that starts at 0 learns these sooner.
        known[:, column] = (rewards - rewards.mean()) / max(float(rewards.std()), 1e-3)
        for _ in range(self.updates):
            drawn = known[stream.integers(0, len(known), self.batch)]
            learner = learner.improved(drawn, self.discount, self.rate, self.follow, self.calm)
        return learner

    def _turned(self, dial: float, action: float) -> float:
        return within(dial * math.exp(action * math.log(self.reach)), (float(self.least), float(self.most)))


def seen_loss(signal: Signal, before: Mapping[str, Any]) -> dict[str, Any]:
    """The latest held-out loss, the best so far, the round it was measured in and the share of it that was lost per round since the
    evaluation before, times 20 and within 1."""
    loss, base = finite(signal.held_out_loss), finite(signal.base_loss)
    known = [one for one in (before["best_loss"], base) if one is not None and one > 0.0]
    if loss is None or loss <= 0.0:
        return {**before, "best_loss": min(known, default=None)}
    last = before["loss"] if before["loss"] is not None else base
    fall = (last - loss) / last / max(1, signal.round - before["evaluated"]) if last is not None and last > 0.0 else 0.0
    return {"loss": loss, "best_loss": min([*known, loss]), "evaluated": signal.round, "slope": within(20.0 * fall, (-1.0, 1.0))}
