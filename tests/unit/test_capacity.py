"""apps/capacity.py: the budget chooses how many clients go through the model together; too little memory is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from unit.cost_shapes import cost_model

from splitft.apps import capacity
from splitft.apps.capacity import available_bytes, kept_kinds, largest_pass, open_shelf
from splitft.engine.shelf import DiskShelf, MemoryShelf
from splitft.errors import ResourceError

from ..support import federation
from ..tiny_run import tiny_config


def test_available_memory_is_what_the_system_or_the_control_group_allows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts, group = tmp_path / "meminfo", tmp_path / "group"
    facts.write_text("MemTotal:       9000 kB\nMemFree:  10 kB\nMemAvailable:    2000 kB\n")
    group.mkdir()
    monkeypatch.setattr(capacity, "MEMORY_FACTS", facts)
    monkeypatch.setattr(capacity, "GROUP", group)
    assert available_bytes() == 2_048_000
    (group / "memory.current").write_text("500000\n")
    (group / "memory.max").write_text("max\n")
    assert available_bytes() == 2_048_000
    (group / "memory.max").write_text("1500000\n")
    assert available_bytes() == 1_000_000
    (group / "memory.stat").write_text("anon 90000\nfile 400000\ninactive_file 300000\nactive_file 100000\n")
    assert available_bytes() == 1_300_000
    (group / "memory.max").write_text("100000\n")
    assert available_bytes() == 0
    for path in (facts, group / "memory.max"):
        path.unlink()
    assert available_bytes() > 0


def test_what_clients_keep_follows_from_the_configuration(tmp_path: Path) -> None:
    assert kept_kinds(tiny_config(tmp_path), True) == ("first", "second")
    assert kept_kinds(tiny_config(tmp_path, train={"moments": "reset"}), True) == ()
    assert kept_kinds(tiny_config(tmp_path, split={"server": "unaveraged"}), True) == ("first", "second", "adapter")
    assert kept_kinds(tiny_config(tmp_path, train={"moments": "reset"}), False) == ("adapter",)


def test_rows_that_do_not_fit_into_memory_are_refused_with_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(tmp_path)
    monkeypatch.setattr(capacity, "available_bytes", lambda: 11.9e6)
    with pytest.raises(ResourceError, match=r"of 1000 clients take 12 MB of memory, 12 are free") as caught:
        open_shelf(config, 1000, 1000, ("first", "second"), tmp_path)
    assert 'engine.store = "disk"' in caught.value.remedy
    assert isinstance(open_shelf(config, 900, 1000, ("first", "second"), tmp_path), MemoryShelf)
    shelf = open_shelf(tiny_config(tmp_path, engine={"store": "disk"}), 1000, 1000, ("first", "second"), tmp_path)
    assert isinstance(shelf, DiskShelf)
    shelf.close()


@pytest.mark.parametrize("store", ["memory", "disk"])
def test_the_budget_is_divided_by_what_a_client_takes(tmp_path: Path, store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fed = federation(length=16)
    costs, row_bytes = (cost_model(),), 4 * fed.layout.parameters
    session_bytes = replace(costs[0], sequence_tokens=16).session_bytes()
    on_shelf = 3 * 3 * row_bytes if store == "memory" else 0
    for sessions in (1, 5, 40):
        budget_mb = -(-(sessions * session_bytes + on_shelf) // 1e6)
        config = tiny_config(tmp_path, engine={"store": store, "memory_mb": int(budget_mb)})
        expected = int((1e6 * int(budget_mb) - on_shelf) / session_bytes)
        assert largest_pass(config, fed, costs, ("first", "second")) == max(1, expected) >= sessions
    monkeypatch.setattr(capacity, "available_bytes", lambda: 2 * (7.5 * session_bytes + on_shelf))
    assert largest_pass(tiny_config(tmp_path, engine={"store": store}), fed, costs, ("first", "second")) == 4  # of 7
    monkeypatch.setattr(capacity, "available_bytes", lambda: 0.0)
    assert largest_pass(tiny_config(tmp_path, engine={"store": store}), fed, costs, ()) == 1


def test_a_session_takes_its_activations_and_its_row_of_the_bank() -> None:
    """Twice the tokens, twice the activations; the row of the bank stays."""
    short, long = cost_model(), replace(cost_model(), batch_size=2 * cost_model().batch_size)
    cost = short.cost(short.plan(1))
    adapters_bytes = cost.client_memory.adapters_bytes + cost.server_memory.adapters_bytes
    activations_bytes = long.session_bytes() - short.session_bytes()
    assert short.session_bytes() == pytest.approx(activations_bytes + 7 * adapters_bytes)
    inside = cost.client_memory.activations_bytes  # the client's part has no logits
    assert activations_bytes == pytest.approx(1.25 * inside * len(short.shape.blocks))
