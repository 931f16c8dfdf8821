"""Run the app in Flower's simulation engine, two clients at a time with a thread each; prints seconds and losses as JSON.

python -m benchmarks.flower_app.simulate WORK_AS_JSON
"""

from __future__ import annotations

import json
import os
import sys
import time
from importlib.metadata import version
from itertools import pairwise
from typing import Any


def main(text: str, cores: int) -> dict[str, Any]:
    begin = time.perf_counter()
    from flwr.simulation import run_simulation

    from benchmarks.flower_app.client import app
    from benchmarks.flower_app.server import build
    from benchmarks.flower_app.task import Work

    work = Work.parse(text)
    found: dict[str, Any] = {"work": text}
    backend = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}, "init_args": {"num_cpus": cores, "include_dashboard": False}}
    run_simulation(build(work, found), app, num_supernodes=work.clients, backend_config=backend)
    ends = found["ends_s"]
    return {
        "round_s": [after - before for before, after in pairwise(ends)],
        "total_s": time.perf_counter() - begin,
        "losses": found["losses"],
        "version": version("flwr"),
    }


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], len(os.sched_getaffinity(0)))))
