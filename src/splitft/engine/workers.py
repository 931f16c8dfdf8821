"""Train with real client and server workers that exchange messages: the deployment's code path, in one process."""

from __future__ import annotations

from dataclasses import replace

import torch

from splitft.engine.adapters import facts_together
from splitft.engine.client import Client
from splitft.engine.exchange import Ownership, put, take
from splitft.engine.ledger import Ledger
from splitft.engine.server import Server
from splitft.engine.settings import ClientState, Federation, OnStep, RoundResult, Starts
from splitft.engine.streams import StreamStates, joined
from splitft.messages import Type, decode
from splitft.transport.base import Talk, Transport
from splitft.types import Direction, RoundPlan


class WorkersExecutor:
    """One `Client` per participant and one `Server` for the round, over a transport. Slower than a cohort, and message for message what a
    deployment does; `deterministic` gives every session a server pass of its own."""

    def __init__(self, federation: Federation, transport: Transport, deterministic: bool = True) -> None:
        self.federation = federation
        self.transport = transport
        self.deterministic = deterministic

    def train(self, plan: RoundPlan, first_step: int, starts: Starts, states: dict[int, ClientState], on_step: OnStep) -> RoundResult:
        """Every participant's local steps from its start; `on_step` is told of each step a client finishes."""
        federation, ledger = self.federation, Ledger()
        server = Server(federation, plan, first_step, starts, states, self.deterministic)
        clients = {one.client: Client(federation, one.client, states.get(one.client, ClientState())) for one in plan.plans}
        talks: dict[int, Talk] = {}
        for one in plan.plans:
            opening = server.opening(one.client)
            ledger.add_frame(one.client, "down", opening)
            talks[one.client] = clients[one.client].round(opening.encode())

        def observe(client: int, direction: Direction, message: bytes) -> None:
            frame = decode(message)
            ledger.add_frame(client, direction, frame)
            if frame.kind == Type.STEP_DOWN:
                fields = frame.step()
                on_step(1 if fields.micro == federation.settings.gradient_accumulation - 1 else 0)

        self.transport.carry(talks, server.handle, observe)
        return self._result(plan, server, clients, ledger)

    def _result(self, plan: RoundPlan, server: Server, clients: dict[int, Client], ledger: Ledger) -> RoundResult:
        order = [one.client for one in plan.plans]
        states = {client: clients[client].state for client in order}
        if self.federation.settings.keep_moments:
            # The moments of a client's key are one value wherever the key is trained: join the session's part to the client's.
            for one in plan.plans:
                session, state = server.sessions[one.client], states[one.client]
                columns = session.ownership.server_columns(self.federation.layout)
                if state.first is None or state.second is None:
                    continue
                state.first[columns] = server.moments.first[session.row, columns].cpu()
                state.second[columns] = server.moments.second[session.row, columns].cpu()
        facts = {}
        for client in order:
            theirs, ours = states[client].streams, server.remembered(client)
            both = joined(theirs or StreamStates(), ours)
            states[client] = replace(states[client], streams=both if both.forms or both.known is not None else None)
            if found := facts_together(clients[client].facts(), server.facts(client)):
                facts[client] = found
        values = torch.stack([server.bank.values[server.sessions[client].row].cpu() for client in order])
        for row, one in enumerate(plan.plans):
            if not one.upload:
                # In one process the observer sees what a client keeps to itself: its next round and its evaluation start from it.
                own = Ownership(one, self.federation.split.blocks).client_columns(self.federation.layout)
                put(values[row], own, take(clients[one.client].bank.values[0].detach().cpu(), own))
        return RoundResult(
            plans=plan.plans,
            values=values,
            tokens=[clients[client].tokens for client in order],
            step_losses=[clients[client].step_losses for client in order],
            ledger=ledger,
            states=states,
            targets=[server.sessions[client].targets for client in order],
            facts=facts,
        )
