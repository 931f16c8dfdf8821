"""One Ray of our own for all tests that need one, as a run starts it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="package")
def local_ray() -> Iterator[None]:
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'splitft[ray]'")
    from splitft.apps.ray_engine import connect

    connection = connect("", 2)
    assert connection.local
    yield
    connection.close()
