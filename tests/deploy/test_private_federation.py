"""A private run over the network: the same adapters as in one process, and the check at its end, which must be able to fail."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from splitft.apps import session
from splitft.errors import AdapterError

from ..tiny_run import text_file
from .federation_scenes import adapters_of, events_of, scene, simulated

pytestmark = pytest.mark.timeout(60)

RULE: dict[str, Any] = {"name": "private", "noise_multiplier": 0.05, "clip": 0.05, "secret_seed": 4, "clients": 3}


def private(folder: Path, public: bool, **changes: Any) -> dict[str, Any]:
    """Changes for a private federation, measured on a public text or on its clients' rows."""
    text = {"federation": {"held_out": str(text_file(folder / "public.txt", documents=12, seed=9))}} if public else {}
    return {"rounds": 2, "aggregator": RULE, **text, **changes}


@pytest.mark.parametrize("public", [False, True], ids=["clients' rows", "public text"])
def test_the_end_of_a_private_federation_is_checked(tmp_path: Path, public: bool) -> None:
    changes = private(tmp_path, public)
    with scene(tmp_path, **changes) as fed:
        folder = fed.all_clients().end()
    [event] = events_of(folder, "privacy_checked")
    assert (event["round"], event["updates"], event["moved"]) == (2, 6, 6)
    measured = events_of(folder, "evaluation")[-1]["global"]["loss"]
    assert event["loss"] == measured
    assert event["export_loss"] == (pytest.approx(measured, rel=1e-6) if public else None)
    reference = simulated(tmp_path, **{**changes, "federation": {}})
    assert torch.equal(adapters_of(folder), adapters_of(reference))


@pytest.mark.parametrize("public", [False, True], ids=["clients' rows", "public text"])
@pytest.mark.parametrize("what", ["nothing is trained", "another adapter is written"])
def test_a_private_federation_that_went_wrong_is_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, public: bool, what: str
) -> None:
    more: dict[str, Any] = {"train": {"learning_rate": 1e-30}} if what == "nothing is trained" else {}
    if not more:
        write = session.write_adapter
        wrong = lambda folder, layout, row, *rest: write(folder, layout, row * 1.01, *rest)  # noqa: E731
        monkeypatch.setattr(session, "write_adapter", wrong)
    with scene(tmp_path, **private(tmp_path, public, **more)) as fed:
        fed.all_clients()
        with pytest.raises(AdapterError, match="none moved" if more else "differs from|the run measured"):
            fed.thread.end(40)
