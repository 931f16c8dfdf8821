"""A worker of `splitft compare`: a process of its own that takes runs as JSON lines on standard input and reports as JSON lines.

It stays alive for many runs, since importing torch and transformers costs seconds. Whatever else is printed goes to the worker's log.
A run that ends in an error ends the process too: nothing of it may reach the next run.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from splitft.apps import console
from splitft.errors import Interrupted

Send = Callable[[dict[str, Any]], None]


def main() -> int:
    """Take jobs until standard input ends; 0 then, 1 after a run that failed, 130 when stopped."""
    console.prepare_process()
    with os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8") as channel:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # a library that prints would break the lines
        try:
            return serve(sys.stdin, sender(channel))
        except BrokenPipeError:  # the command is gone; every finished round is on the disk
            os.dup2(os.open(os.devnull, os.O_WRONLY), channel.fileno())
            return 130


def sender(channel: IO[str]) -> Send:
    def send(message: dict[str, Any]) -> None:
        channel.write(json.dumps(message, ensure_ascii=True) + "\n")
        channel.flush()

    return send


def serve(lines: IO[str], send: Send) -> int:
    """One job a line: `{"run": name, "config": {...}, "folder": path}`."""
    for line in lines:
        job = json.loads(line)
        try:
            work(job["config"], Path(job["folder"]), send)
        except BrokenPipeError:
            raise
        except Interrupted:
            send({"event": "stopped"})
            return 130
        except Exception as error:
            traceback.print_exc()
            send({"event": "failed", **describe(error)})
            return 1
        send({"event": "done"})
    return 0


def describe(error: Exception) -> dict[str, Any]:
    """An error as the page shows it: class, first line of what was wrong, what to do."""
    fault = console.known_fault(error)
    if fault is None:
        lines = str(error).splitlines() or [""]
        return {
            "kind": type(error).__name__,
            "message": lines[0],
            "remedy": "This is a fault of splitft; the worker's log has the traceback.",
        }
    problems = [problem for problem in getattr(fault, "problems", ()) if problem not in fault.message]
    message = " ".join([fault.message, *problems[:1]])
    return {"kind": type(fault).__name__, "message": message.splitlines()[0] if message else "", "remedy": fault.remedy}


def work(values: dict[str, Any], folder: Path, send: Send) -> None:
    """Run to the end what is configured, from its last committed round if there is one."""
    with console.starting():
        from splitft.apps.session import FederatedRun, stoppable
        from splitft.config import parse_config
        from splitft.engine import checkpoint

    config = parse_config(values)
    with stoppable(folder) as check:

        def listen(event: str, facts: dict[str, Any]) -> None:
            if event == "stage":
                send({"event": "stage", "name": facts["name"]})
            elif event == "round":
                send({"event": "round", "round": facts["record"].round})
            check()

        with console.starting():
            run = FederatedRun(config, folder if checkpoint.exists(folder) else None, listen)
        try:
            send({"event": "round", "round": run.state.round})
            for _ in run.rounds():
                check()
            run.finish()
        except Interrupted:
            run.note_interruption()
            raise
        finally:
            run.close()


if __name__ == "__main__":
    raise SystemExit(main())
