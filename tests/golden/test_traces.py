"""Short histories that must not move: losses, perplexities and bytes of tiny runs, as JSON beside this file.

A change that should not move numbers must leave them; one that should regenerates them with `SPLITFT_REGENERATE=1 make test
ARGS=tests/golden` and shows the difference in review. Losses may differ by 1e-4 between processors; bytes may not differ at all.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from splitft.apps.session import FederatedRun

from ..tiny_run import tiny_config

HERE = Path(__file__).parent
CASES: dict[str, dict[str, Any]] = {
    "cohort": {},
    "workers-u-shape": {
        "engine": {"name": "workers"},
        "split": {"labels": "client", "tail_blocks": 1},
        "policy": {"name": "fixed", "cuts": [1, 2, 2]},
    },
    "splitft-two-tier": {
        "policy": {"name": "combined", "decide_every": 1, "gamma": 2.0},
        "ranks": {"name": "splitft"},
        "work": {"name": "balanced"},
        "aggregator": {"name": "product"},
        "clients": {"count": 4, "fleet": "two_tier", "server_profile": "laptop", "dropout": 0.15},
    },
    "documents-identity": {
        "tokens": {"packing": "documents", "block_tokens": 48},
        "uplink": {"name": "identity"},
        "downlink": {"name": "identity"},
        "train": {"gradient_accumulation": 2, "schedule": "cosine", "warmup_steps": 1, "weight_decay": 0.1},
        "clients": {"participation": 0.7},
    },
}


def history(folder: Path, changes: dict[str, Any]) -> list[dict[str, Any]]:
    run = FederatedRun(tiny_config(folder, **changes))
    try:
        rows = []
        for record in run.rounds():
            row: dict[str, Any] = {"round": record.round}
            if record.training is not None:
                row["step_losses"] = record.training["step_losses"]
                row["bytes"] = {str(one["client"]): one["bytes"] for one in record.training["clients"]}
                row["virtual_end_s"] = record.training["virtual_end_s"]
            assert record.evaluation is not None
            row["perplexity"] = record.evaluation["global"]["perplexity"]
            rows.append(row)
        return rows
    finally:
        run.close()


@pytest.mark.parametrize("case", CASES)
def test_the_numbers_have_not_moved(case: str, tmp_path: Path) -> None:
    found, path = history(tmp_path, CASES[case]), HERE / f"{case}.json"
    if os.environ.get("SPLITFT_REGENERATE"):
        path.write_text(json.dumps(found, indent=1) + "\n")
    expected = json.loads(path.read_text())
    assert [row["round"] for row in found] == [row["round"] for row in expected]
    for row, known in zip(found, expected, strict=True):
        assert row["perplexity"] == pytest.approx(known["perplexity"], rel=1e-4)
        assert row.get("bytes") == known.get("bytes")
        assert set(row) == set(known)
        if "step_losses" in known:
            assert row["step_losses"] == pytest.approx(known["step_losses"], rel=1e-4)
            assert row["virtual_end_s"] == pytest.approx(known["virtual_end_s"], rel=1e-12)
