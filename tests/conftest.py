"""What every test runs under: one thread, no network, no leftovers of the user's environment, the same examples every time."""

from __future__ import annotations

import os

# Before anything imports torch or the Hugging Face libraries, which read these once.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import socket

import hypothesis
import pytest

# Deadlines measure the machine, not the code; a fixed choice of examples makes a failure the same for everybody.
hypothesis.settings.register_profile("splitft", deadline=None, max_examples=50, derandomize=True, database=None)
hypothesis.settings.load_profile("splitft")


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only this machine can be reached: a test that would download something fails and says so."""
    connect = socket.socket.connect

    def local_only(self: socket.socket, address: object) -> None:
        remote = isinstance(address, tuple) and address[0] not in ("127.0.0.1", "::1", "localhost")
        if self.family in (socket.AF_INET, socket.AF_INET6) and remote:
            raise AssertionError(f"a test tried to reach {address}")
        connect(self, address)  # type: ignore[arg-type]

    monkeypatch.setattr(socket.socket, "connect", local_only)
