"""The quality signal of SplitFT, and the weights that follow it: who learns better than the cohort gets more blocks, who worse, fewer.

What is known of the paper's rule (Shan et al. 2026, arXiv 2604.26388), from its abstract and from two digests, since its equation is
not published: there is a heuristic that sets each client's number of layers; it compares a client's post-round performance (the author
elsewhere names perplexity) with the clients' average; better than average gains layers, worse loses them; a weight per client
that changes in time carries this; a strength gamma needs tuning. Everything below that gives these words numbers is our reconstruction:

    x_i  = base loss_i - held-out loss_i, in nats a token: how much better the client's held-out text is told than before training. Raw
           perplexity would rank the clients by how hard their texts are, not by what training did for them.
    z_i  = (x_i - median x) / max(1.4826 median|x - median x|, noise), over the clients seen this round, within -3..3. The
           median and the median deviation do not let one odd client shift everybody; 1.4826 makes the deviation that of a normal law.
           Differences below `noise` nats are noise: equal clients have z = 0 and never move.
    s_i <- s_i + smoothing (z_i - s_i). Smoothed is the standing in the cohort, not the loss: losses fall as training goes on, and a
           client that was away would look worse for its old figure alone.
    w_i <- w_i + gamma s_i when |s_i| > dead band, within bounds. w_i = 1 at the start.
    wanted cut = (start cut)_i x w_i; the cut follows it by one block when it is a whole block away, and then rests for the cool-down.

The bounds of w_i are those of the cut divided by the start cut, so that a weight never runs up at a bound that the cut cannot pass.
"""

from __future__ import annotations

import math
import statistics
from abc import ABC
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from splitft.adapt.balance import Window
from splitft.adapt.base import Policy, check_number
from splitft.types import Observation

NORMAL = 1.4826
FARTHEST = 3.0


@dataclass(frozen=True)
class Quality(Policy, ABC):
    """The fields of the rule, in the letters of the text above.

    `gamma`: strength, in shares of the start cut a decision and unit of standing; 0 never moves. `averaging` (0..1): weight of the newest
    round in the smoothed standing. `dead_band`: standings nearer to the cohort's middle than this, in its spreads, change nothing.
    `noise_nats`: least spread assumed. `cool_down`: rounds a client rests after a move. `decide_every`: rounds between two decisions.
    """

    gamma: float = 0.1
    averaging: float = 0.5
    dead_band: float = 0.5
    noise_nats: float = 0.01
    cool_down: int = 2
    decide_every: int = 1

    def __post_init__(self) -> None:
        check_number("gamma", self.gamma, 0.0)
        check_number("averaging", self.averaging, 0.0, 1.0)
        check_number("dead_band", self.dead_band, 0.0)
        check_number("noise_nats", self.noise_nats, 1e-9)
        check_number("cool_down", self.cool_down, 0, whole=True)
        check_number("decide_every", self.decide_every, 1, whole=True)

    def first_quality(self, clients: int) -> dict[str, Any]:
        """The rule's state before the first round: weights, standings, the rounds of each client's last move and the last decision."""
        return {"weights": [1.0] * clients, "standings": [0.0] * clients, "moved": [0] * clients, "decided": 0}

    def judge(
        self,
        round_index: int,
        observations: Sequence[Observation],
        starts: Sequence[int],
        bounds: Sequence[Window],
        state: Mapping[str, Any],
    ) -> tuple[dict[str, Any], tuple[int, ...]]:
        """The rule's next state, and the clients decided on: none between decisions. `starts` and `bounds` are cuts, one per client.

        With fewer than two clients that have figures nothing changes: there is no cohort to compare with.
        """
        seen = standings(improvements(observations), self.noise_nats)
        smooth, weights, decided = list(state["standings"]), list(state["weights"]), state["decided"]
        for client, standing in seen.items():
            smooth[client] += self.averaging * (standing - smooth[client])
        if not seen or round_index - decided < self.decide_every:
            return {**state, "standings": smooth}, ()
        for client in seen:
            if abs(smooth[client]) > self.dead_band:
                bound, start = bounds[client], starts[client]
                raised = weights[client] + self.gamma * smooth[client]
                weights[client] = min(max(raised, bound.shallowest / start), bound.deepest / start)
        return {**state, "standings": smooth, "weights": weights, "decided": round_index}, tuple(seen)

    def towards(self, client: int, cut: int, start: int, bound: Window, round_index: int, state: Mapping[str, Any]) -> int:
        """The client's next cut by its weight: this one or its neighbour. A cut inside `bound` stays inside."""
        if round_index - state["moved"][client] <= self.cool_down:
            return cut
        want: float = min(max(start * state["weights"][client], bound.shallowest), bound.deepest)
        # Rounding must not keep a cut from a bound that its weight has reached in all but the last digit.
        return cut + (want - cut >= 1.0 - 1e-9) - (cut - want >= 1.0 - 1e-9)


def moved(state: Mapping[str, Any], before: Sequence[int], after: Sequence[int], round_index: int) -> dict[str, Any]:
    """The rule's state with this round noted as the last move of every client whose cut has changed."""
    rounds = [round_index if old != new else last for old, new, last in zip(before, after, state["moved"], strict=True)]
    return {**state, "moved": rounds}


def improvements(observations: Sequence[Observation]) -> dict[int, float]:
    """x of every client whose held-out loss is known now and before training, in client order."""
    return {
        seen.client: seen.base_loss - seen.held_out_loss
        for seen in sorted(observations, key=lambda one: one.client)
        if seen.base_loss is not None and seen.held_out_loss is not None and math.isfinite(seen.base_loss - seen.held_out_loss)
    }


def standings(improved: Mapping[int, float], noise_nats: float) -> dict[int, float]:
    """z of these clients; empty for fewer than two. See the top of the file."""
    if len(improved) < 2:
        return {}
    middle = statistics.median(improved.values())
    spread = NORMAL * statistics.median(abs(value - middle) for value in improved.values())
    return {client: min(max((value - middle) / max(spread, noise_nats), -FARTHEST), FARTHEST) for client, value in improved.items()}
