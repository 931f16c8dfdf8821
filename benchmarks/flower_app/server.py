"""The app's server: Flower's own FedAvg over all clients, with a clock."""

from __future__ import annotations

import time
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from benchmarks.flower_app.task import Work, state


def build(work: Work, found: dict[str, Any]) -> ServerApp:
    """A server that notes the ends of all rounds (`ends_s`, the first entry before round 1) and their losses in `found`."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        def note(server_round: int, arrays: ArrayRecord) -> MetricRecord:
            found.setdefault("ends_s", []).append(time.perf_counter())
            return MetricRecord({})

        everyone = {"min_train_nodes": work.clients, "min_available_nodes": work.clients, "min_evaluate_nodes": work.clients}
        strategy = FedAvg(fraction_train=1.0, fraction_evaluate=0.0, **everyone)
        result = strategy.start(
            grid=grid,
            initial_arrays=ArrayRecord(state(work)),
            num_rounds=work.rounds,
            train_config=ConfigRecord({"work": found["work"]}),
            evaluate_fn=note,
        )
        found["losses"] = [float(result.train_metrics_clientapp[index]["loss"]) for index in range(1, work.rounds + 1)]

    return app
