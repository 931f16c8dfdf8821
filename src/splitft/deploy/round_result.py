"""What a round on the network gave, in the engine's form; and the bounds on what clients report and send."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from splitft.deploy.letters import Report
from splitft.engine.adapters import facts_together
from splitft.engine.intake import positions_of
from splitft.engine.settings import RoundResult, is_low, next_state
from splitft.engine.streams import ADAPTERS_DOWN, ADAPTERS_UP
from splitft.errors import ProtocolError
from splitft.types import Plan
from splitft.wire import PLACES

if TYPE_CHECKING:
    from splitft.deploy.round import Round
    from splitft.engine.rounds import Run

# No loss, no number of seconds and no sum over a round's values comes near this; sums of such numbers are still finite.
LARGEST_FIGURE = 1e18
PLACES_KNOWN = frozenset((*PLACES, ADAPTERS_UP, ADAPTERS_DOWN))
LONGEST_NAME = 64


def result_of(played: Round) -> RoundResult:
    """The result of a round that has been played; whoever is lost has a row and no say."""
    federation, server, lost = played.run.federation, played.server, played.lost
    settings, states, facts = federation.settings, {}, {}
    for client, part in played.parts.items():
        if client in lost:
            continue
        session, report = server.sessions[client], part.report or Report(played.index)
        steps, low = steps_of(played, client), is_low(part.plan, federation.layout)
        state = next_state(played.states[client], steps * settings.gradient_accumulation, settings, server.moments, session.row, low)
        if state.first is not None:  # a client with the whole model has stepped where the server's bank has not
            state = replace(state, steps=played.states[client].steps + steps)
        streams = server.remembered(client)
        states[client] = replace(state, streams=streams if streams.forms or streams.known is not None else None)
        if found := facts_together(report.facts, server.facts(client)):
            facts[client] = found
    order = list(played.plans)
    reports = [played.parts[client].report for client in order]
    return RoundResult(
        plans=tuple(replace(played.plans[client], local_steps=max(1, steps_of(played, client))) for client in order),
        values=server.bank.values.detach().cpu(),
        tokens=[0 if report is None or client in lost else report.tokens for client, report in zip(order, reports, strict=True)],
        step_losses=[[0.0] if report is None or not report.step_losses else list(report.step_losses) for report in reports],
        ledger=played.ledger,
        states=states,
        targets=[0 if client in lost else server.sessions[client].targets for client in order],
        facts=facts,
    )


def steps_of(played: Round, client: int) -> int:
    """Optimizer steps that a participant has done, as far as the server knows."""
    plan = played.plans[client]
    whole = plan.is_whole(played.run.federation.split.blocks)
    return plan.local_steps if whole and client not in played.lost else played.server.sessions[client].step


def checked_report(report: Report, plan: Plan, index: int) -> Report | None:
    """A report whose numbers can be those of this round (None: of another round); training depends on none of it. Raises
    ProtocolError."""
    if report.round != index:
        return None
    sums = [value for place in report.facts.values() for value in place.values()]
    numbers = [*report.step_losses, *report.seconds.values(), *sums]
    names = [*report.seconds, *(name for place in report.facts.values() for name in place)]
    many = len(report.step_losses) > plan.local_steps or len(report.seconds) > 16 or len(sums) > 2000
    strange = not PLACES_KNOWN.issuperset(report.facts) or any(len(name) > LONGEST_NAME for name in names)
    absurd = not all(abs(value) <= LARGEST_FIGURE for value in numbers)  # NaN is not at most anything
    if many or strange or absurd or min(report.seconds.values(), default=0.0) < 0 or not 0 <= report.tokens < 1 << 45:
        raise ProtocolError(f"client {plan.client} reports {len(numbers)} figures that cannot be right.", "its training has diverged.")
    return report


def message_limit(run: Run, plan: Plan) -> int:
    """The largest message that a client may send in a round, in bytes: a step of full rows in any codec, a measured batch, its adapters."""
    settings, split, rules = run.federation.settings, run.federation.split, run.rules
    tokens = settings.row_tokens or min(run.costs[plan.client].sequence_tokens, positions_of(run.federation))
    step_bytes = settings.batch_size * tokens * (5 * split.hidden_size + 16)
    score_bytes = rules.evaluate_batch * tokens * (4 * split.hidden_size + 16)
    adapter_bytes = 9 * run.federation.layout.parameters
    return max(step_bytes, score_bytes, adapter_bytes) + (256 << 10)
