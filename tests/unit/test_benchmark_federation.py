"""The federation's benchmarks: sums and slopes of what was measured, and that contestants who do unlike work are refused."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import federation, federation_bytes, federation_exchange, federation_speed, soak_report  # noqa: E402 - from the root of the repository
from benchmarks.federation_parties import make_identities, status_of  # noqa: E402
from benchmarks.federation_scenes import merged, require_same_work  # noqa: E402

from splitft.deploy.identity import Identity, ServerIdentity  # noqa: E402
from splitft.deploy.roster import Member, Roster  # noqa: E402


def client(loss: float = 2.0, up: int = 0, down: int = 0) -> dict[str, Any]:
    counts = {"activations": up, "weights": 0}, {"gradients": down, "weights": 10}
    return {"loss_mean": loss, "tokens": 64, "bytes": {"up": counts[0], "down": counts[1]}}


def journal(folder: Path, losses: list[float]) -> Path:
    folder.mkdir()
    lines = [{"event": "round", "round": place + 1, "clients": [client(loss)]} for place, loss in enumerate(losses)]
    (folder / "journal.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"event": "rou', encoding="utf-8")
    return folder


def test_unlike_work_is_refused(tmp_path: Path) -> None:
    one, same, other = journal(tmp_path / "a", [2.0, 1.5]), journal(tmp_path / "b", [2.0, 1.5]), journal(tmp_path / "c", [2.0, 1.6])
    require_same_work(one, same, 2)
    require_same_work(one, other, 1)
    with pytest.raises(RuntimeError, match="round 2"):
        require_same_work(one, other, 2)


def test_parts_of_an_exchange() -> None:
    into: dict[str, list[float]] = {name: [] for name in ("exchange", "pass", "rest", "up", "queue", "down")}
    federation_exchange._add(into, [[1.0, 2.0]], [[1.3, 1.8]], [1.1])
    for name, seconds in {"exchange": 1.0, "pass": 0.5, "rest": 0.5, "up": 0.1, "queue": 0.2, "down": 0.2}.items():
        assert into[name] == [pytest.approx(seconds)]
    with pytest.raises(ValueError, match="shorter"):  # a pass without its exchange
        federation_exchange._add(into, [[1.0, 2.0]], [], [])


def test_bytes_of_a_run_are_rounds_and_measurements() -> None:
    rounds = [{"clients": [client(up=100, down=200)]} for _ in range(4)]
    marks = [{"up": 150 + 102 * place, "down": 250 + 212 * place} for place in range(4)]
    scores = [{"bytes": {"up": 30, "down": 20}}]
    row = federation_bytes._row(marks, rounds, scores, federation_bytes.Load())
    assert row["ledger"] == {"up": 400, "down": 840}
    assert row["weights"] == 40
    assert row["excess"] == pytest.approx((456 + 886) / (1240 + 50) - 1)
    assert row["middle_excess"] == pytest.approx(2 * (102 + 212) / (2 * 310) - 1)


def test_memory_of_a_client_more() -> None:
    rows = [{"way": "federation", "mode": "deterministic", "clients": count, "peak_bytes": 500 + 3 * count} for count in (4, 16, 8)]
    assert federation_speed.slope_bytes(rows, "federation") == 3.0


def test_slope_of_a_soak_leaves_the_start_out() -> None:
    """Memory grows while a process settles and a megabyte an hour afterwards."""
    samples = [
        {
            "elapsed_s": 10.0 * place,
            "server": {"resident_bytes": 500e6 + (min(place, 29) * 5e6) + 1e6 * max(0, place - 30) / 360, "descriptors": 20, "threads": 9},
        }
        for place in range(200)
    ]
    found = soak_report.process_of(samples)
    assert found["resident_bytes"]["an_hour"] == pytest.approx(1e6, rel=0.01)
    assert found["descriptors"]["an_hour"] == 0.0
    assert "resident_bytes" not in soak_report.process_of(samples[:32])


def test_identities_are_on_the_roster_at_their_seats(tmp_path: Path) -> None:
    home = make_identities(tmp_path, 3)
    ServerIdentity.load(home)
    found = Roster.load(home).find(Identity.load(tmp_path / "client-002").tls.certificate_pem)
    assert isinstance(found, Member)
    assert found.seat == 2


def test_this_process_has_a_status_and_none_has_none() -> None:
    assert status_of(os.getpid())["resident_bytes"] > 1e6
    assert status_of(2**22 + 7) == {}


def test_changes_touch_single_fields() -> None:
    values = {"train": {"a": 1, "b": 2}, "policy": {"name": "fixed", "cuts": [1]}}
    assert merged(values, {"train": {"b": 3}, "policy": {"name": "other"}}) == {"train": {"a": 1, "b": 3}, "policy": {"name": "other"}}


def test_parts_without_rows_are_left_out() -> None:
    row = federation_bytes._row([{"up": 1, "down": 1}] * 3, [{"clients": [client(up=1, down=1)]}] * 3, [], federation_bytes.Load())
    text = federation.table([row])
    assert "Bytes at the sockets" in text
    assert "idle" not in text
