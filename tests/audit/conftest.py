"""Audits here look at fewer candidates than elsewhere: what they show does not hang on the last of them."""

from __future__ import annotations

import pytest

import splitft.audit.beam


@pytest.fixture(autouse=True)
def fewer_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(splitft.audit.beam, "WORK", 5e9)
