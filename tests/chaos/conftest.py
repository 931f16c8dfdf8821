"""What the slow tests share; `--chaos-seed` repeats a run of theirs."""

from __future__ import annotations

import pytest

from ..deploy.reliability_fixtures import ground, nursery, undisturbed

__all__ = ["ground", "nursery", "undisturbed"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--chaos-seed", type=int, default=6, help="What the moments of all kills, cuts and pauses are drawn from.")


@pytest.fixture
def chaos_seed(request: pytest.FixtureRequest) -> int:
    """Printed by every test, with its own number, when it fails."""
    return int(request.config.getoption("--chaos-seed"))
