"""Blocks compiled by torch.compile train as uncompiled ones do."""

from __future__ import annotations

import os
import shutil
import warnings
from pathlib import Path

import pytest
import torch

from splitft.apps.session import FederatedRun

from ..tiny_run import tiny_config


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="torch.compile needs a C++ compiler")
def test_compiled_blocks_give_the_same_losses(tmp_path: Path) -> None:
    found = []
    for compiled in (False, True):
        folder = tmp_path / str(compiled)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the compiler's own, of what it deprecates in itself
            run = FederatedRun(tiny_config(folder, rounds=1, engine={"compile": compiled}))
            records = list(run.rounds())
        run.close()
        assert records[-1].training is not None
        found.append(records[-1].training["step_losses"])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert found[0] == pytest.approx(found[1], rel=1e-4)
