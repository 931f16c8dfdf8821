"""`splitft run` up to its first optimizer step: prints a line per stage and ends there. Started by startup.py, which reads the clock.

python -m benchmarks.first_step FIELD=VALUE...
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from splitft.apps import console

FIRST_STEP = "first step"


def announce(line: str) -> None:
    print(line, flush=True)


def main(overrides: list[str]) -> None:
    """The command itself, with a listener beside its own."""
    console.prepare_process()
    with console.starting():  # as the command does
        from splitft.apps import cli, session
        from splitft.config import RunConfig

    announce("torch and transformers imported")

    class AnnouncedRun(session.FederatedRun):
        def __init__(
            self, config: RunConfig, resume: Path | None = None, listen: Callable[[str, dict[str, Any]], None] = lambda event, facts: None
        ) -> None:
            def heard(event: str, facts: dict[str, Any]) -> None:
                if event == "step":
                    announce(FIRST_STEP)
                    os._exit(0)  # the rest of the run is not what is measured
                if event == "stage":
                    announce(str(facts["name"]))
                listen(event, facts)

            super().__init__(config, resume, heard)

    session.FederatedRun = AnnouncedRun  # type: ignore[misc]
    cli.main(["run", "--quiet", *overrides])


if __name__ == "__main__":
    main(sys.argv[1:])
