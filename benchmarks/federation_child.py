"""One process of a measured federation: the server, a client, or a whole run in one process beside them; rounds begin when told to.

    python -m benchmarks.federation_child '{"kind": "server", "config": "federation.toml"}'

Whatever is measured runs the real command or the public interface. A line on standard input lets one round begin; after it a line of JSON
is printed: seconds of the round's training, of the whole round, and the passages of its exchanges where they are asked for. All processes
of a machine share one monotonic clock, so that the stamps of client and server can be laid side by side.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from typing import Any

from splitft.apps.console import prepare_process

Stamp = tuple[float, float]


class Passages:
    """Stamps of every exchange, in their order: when the client had its message ready and when it had the answer; the server's passes; when
    messages arrived at the server's conductor."""

    def __init__(self) -> None:
        self.exchanges: list[Stamp] = []
        self.passes: list[Stamp] = []
        self.arrivals: list[float] = []

    def clear(self) -> dict[str, Any]:
        found = {"exchanges": self.exchanges, "passes": self.passes, "arrivals": self.arrivals}
        self.exchanges, self.passes, self.arrivals = [], [], []
        return found

    def watch(self) -> None:
        """Stamp from now on; the classes of this process are changed for good, which is why it is a process of its own."""
        from splitft.engine.client import Client
        from splitft.engine.server import Server

        begin, finish = Client._begin_there, Client._finish_there
        ready: list[float] = []

        def begin_there(client: Client, *given: Any) -> Any:
            found = begin(client, *given)
            ready.append(time.monotonic())
            return found

        def finish_there(client: Client, *given: Any) -> Any:
            self.exchanges.append((ready.pop(0), time.monotonic()))
            return finish(client, *given)

        setattr(Client, "_begin_there", begin_there)  # noqa: B010 - mypy forbids to assign to a method
        setattr(Client, "_finish_there", finish_there)  # noqa: B010
        apply = Server._apply

        def apply_timed(server: Server, turn: Any) -> Any:
            began = time.monotonic()
            found = apply(server, turn)
            if turn.arrivals:
                self.passes.append((began, time.monotonic()))
            return found

        setattr(Server, "_apply", apply_timed)  # noqa: B010
        self._watch_door()

    def _watch_door(self) -> None:
        from splitft.deploy.host import Host
        from splitft.deploy.letters import Letter
        from splitft.messages import Type
        from splitft.transport.session import Arrived, Event

        deliver = Host.deliver

        def deliver_stamped(host: Host, event: Event) -> None:
            if (
                isinstance(event, Arrived)
                and event.message.kind == Letter.FRAME
                and bytes(event.message.payload[4:5]) == bytes([Type.STEP_UP])
            ):
                self.arrivals.append(time.monotonic())
            deliver(host, event)

        setattr(Host, "deliver", deliver_stamped)  # noqa: B010


class Clock:
    """Seconds of every stage of a round, as the run announces them."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        self.seconds: dict[str, float] = {}
        self.name, self.since_s = "plan", time.perf_counter()
        self.started_s = self.since_s

    def hear(self, event: str, facts: dict[str, Any]) -> None:
        if event == "stage":
            self.turn(str(facts["name"]))

    def turn(self, name: str) -> None:
        now_s = time.perf_counter()
        self.seconds[self.name] = self.seconds.get(self.name, 0.0) + now_s - self.since_s
        self.name, self.since_s = name, now_s


def told() -> bool:
    """Wait for the word; false when there is none any more."""
    return sys.stdin.readline().strip() == "go"


def say(**facts: Any) -> None:
    print(json.dumps(facts), flush=True)


def peak_bytes() -> int:
    from benchmarks.federation_parties import status_of

    return int(status_of(os.getpid())["peak_bytes"])


def gated(records: Iterator[Any], clock: Clock, passages: Passages) -> Iterator[Any]:
    """Rounds that begin when they are told to; round 0, the base model's evaluation, comes with the first."""
    say(ready=True, pid=os.getpid(), resident_bytes=peak_bytes())
    while told():
        clock.begin()
        began = time.monotonic()
        record = next(records, None)
        if record is not None and record.round == 0:
            yield record
            clock.begin()
            record = next(records, None)
        if record is None:
            return
        clock.turn("")
        say(
            round=record.round,
            whole_s=time.perf_counter() - clock.started_s,
            train_s=clock.seconds.get("train", 0.0),
            seconds=clock.seconds,
            began=began,
            peak_bytes=peak_bytes(),
            **passages.clear(),
        )
        yield record


def serve(given: dict[str, Any], passages: Passages) -> None:
    """`splitft server`, gated."""
    from pathlib import Path

    from splitft.apps import server_command
    from splitft.apps.session import FederatedRun
    from splitft.config import load_config

    clock = Clock()

    class Gated(FederatedRun):
        def rounds(self) -> Iterator[Any]:
            earlier = self.listen

            def listen(event: str, facts: dict[str, Any]) -> None:
                clock.hear(event, facts)
                earlier(event, facts)

            self.listen = listen
            yield from gated(super().rounds(), clock, passages)
            os._exit(0)  # as if it was killed: its clients wait for the next server instead of going home

    setattr(server_command, "FederatedRun", Gated)  # noqa: B010
    setattr(server_command, "LINGER_S", 1.0)  # noqa: B010
    server_command.serve(load_config(Path(given["config"]), given.get("overrides", [])), quiet=True)


def simulate(given: dict[str, Any], passages: Passages) -> None:
    """The same run in this process, gated."""
    from pathlib import Path

    import splitft

    clock = Clock()
    run = splitft.open_run(Path(given["config"]), given.get("overrides", []))
    run.listen = clock.hear
    for _ in gated(run.rounds(), clock, passages):
        pass
    run.close()


def take_part(given: dict[str, Any], passages: Passages) -> None:
    """`splitft client`; what was stamped is printed after every round."""
    from splitft.apps import cli
    from splitft.deploy.member import Member

    work = Member._train

    def train(member: Member, opened: Any) -> None:
        work(member, opened)
        say(round=opened.round, **passages.clear())

    setattr(Member, "_train", train)  # noqa: B010
    cli.main(given["arguments"])


def idle(given: dict[str, Any], passages: Passages) -> None:
    """Connections of many clients, each with its own identity, that come in and do nothing until the input ends."""
    from concurrent.futures import ThreadPoolExecutor
    from pathlib import Path

    from benchmarks.federation_parties import client_name
    from splitft.deploy.host import OFFERED
    from splitft.deploy.identity import Identity
    from splitft.deploy.letters import PROTOCOL_MAJOR, PROTOCOL_MINOR, Hello, pack
    from splitft.transport.link import Link
    from splitft.transport.values import Limits, Timing

    def come_in(client: int) -> Link:
        identity = Identity.load(Path(given["folder"]) / client_name(client))
        hello = pack(Hello(PROTOCOL_MAJOR, PROTOCOL_MINOR, "benchmark", identity.name, False, list(OFFERED)))
        link = Link(f"127.0.0.1:{given['port']}", identity.tls, lambda: hello, Limits(), Timing())
        link.open()
        return link

    began_s = time.monotonic()
    with ThreadPoolExecutor(8) as pool:
        links = list(pool.map(come_in, range(given["first"], given["first"] + given["count"])))
        say(seconds=time.monotonic() - began_s)
        told()
        list(pool.map(Link.close, links))


KINDS = {"server": serve, "engine": simulate, "client": take_part, "idle": idle}


def main(text: str) -> None:
    given = json.loads(text)
    prepare_process(int(given.get("threads", 1)))
    passages = Passages()
    if given.get("stamped"):
        passages.watch()
    KINDS[given["kind"]](given, passages)


if __name__ == "__main__":
    main(sys.argv[1])
