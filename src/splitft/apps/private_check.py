"""After a private run: did clients train anything under the noise, and is what was exported what was measured?"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from splitft.aggregate.base import State
from splitft.aggregate.private import STILL, UPDATES
from splitft.apps.report_record import load_record
from splitft.apps.session import FederatedRun
from splitft.engine.evaluate import evaluate
from splitft.engine.rounds import score
from splitft.errors import AdapterError
from splitft.peft_format import read_adapter

# The same model over the same rows: only the file's numbers stand between the two losses.
TOLERANCE = 1e-5


def verify_after(run: FederatedRun) -> dict[str, Any]:
    """The event `privacy_checked` of a finished private run whose adapter is written.

    Raises AdapterError when no client's update moved (noise alone moves the adapter, so looking at that would show nothing), or when the
    exported adapter does not give the loss of the last evaluation. Where that was measured on rows that lie with clients, and they may be
    gone, the file must hold the numbers that were measured, to the last bit; `export_loss` is None then.
    """
    state = run.state
    updates, still = _counts(state.aggregator)
    if updates > 0 and still >= updates:
        raise AdapterError(
            f"of {updates} private updates none moved: clients trained nothing, and the adapter is noise.",
            "check train.learning_rate, lora.targets, and that the model's adapters receive gradients.",
        )
    folder = run.folder / "adapter"
    stored = read_adapter(folder, run.assembly.base.anatomy.blocks_path)
    row = run.assembly.federation.layout.row(stored.factors)
    found = _loss(run, row)
    if found is None and not torch.equal(row, state.adapters):
        raise AdapterError(
            f"{folder} differs from the adapters of round {state.round} in {int((row != state.adapters).sum())} of {len(row)} values.",
            "the exported adapter is not the one that was measured: do not use it, and report this.",
        )
    measured = [one.overall.loss for one in load_record(run.folder / "journal.jsonl").evaluations if one.round == state.round]
    if not measured or measured[-1] is None or not (found is None or math.isclose(found, measured[-1], rel_tol=TOLERANCE)):
        raise AdapterError(
            f"{folder} gives a held-out loss of {found!r}, and the run measured {measured[-1] if measured else None!r}.",
            "the exported adapter is not the one that was measured: do not use it, and report this.",
        )
    return {
        "event": "privacy_checked",
        "round": state.round,
        "updates": updates,
        "moved": updates - still,
        "loss": measured[-1],
        "export_loss": found,
    }


def _loss(run: FederatedRun, row: Tensor) -> float | None:
    """The held-out loss of exported adapters [p], on the rows of the last evaluation; None where those are not on this machine."""
    engine, state = run.engine, run.state
    if engine.measure is None:
        return float(score(engine, state.round, row, state.clients, "check the export")["global"]["loss"])
    if not len(engine.common_held_out):
        return None
    federation, rules = engine.federation, engine.rules
    how = (rules.evaluate_batch, federation.device, rules.evaluate_rows, ["the public text"])
    [found] = evaluate(federation.split, federation.layout, row, [engine.common_held_out], *how)
    return None if found is None else found.loss


def _counts(state: State) -> tuple[int, int]:
    """Updates that were merged, and those of them that were no change at all; whichever rule stands outside the private one."""
    found = {name: int(tensor) for name, tensor in state.items() if name.endswith((UPDATES, STILL))}
    return sum(value for name, value in found.items() if name.endswith(UPDATES)), sum(
        value for name, value in found.items() if name.endswith(STILL)
    )
