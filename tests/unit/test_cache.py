"""Caches by sample against a plain model of them, and their notes at the far end against them."""

from __future__ import annotations

import errno
import tempfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from splitft.compress import cache as cache_module
from splitft.compress.base import Samples
from splitft.compress.cache import KEPT, Budget, Cache, Ledger, finite_as, rows_of
from splitft.errors import ConfigError, ResourceError
from splitft.rng import numpy_stream, torch_stream

BUDGETS = [
    Budget(),
    Budget(0.0004, "new", "float32"),
    Budget(0.0004, "oldest", "float32"),
    Budget(0.0002, "oldest", "bfloat16"),
    Budget(0.0001, "new", "float16", spill=True),
    Budget(0.0001, "oldest", "bfloat16", spill=True),
]


class Model:
    """What a cache should hold, said the plainest way."""

    def __init__(self, budget: Budget) -> None:
        self.budget, self.entries = budget, OrderedDict[int, torch.Tensor]()

    def put(self, one: int, rows: torch.Tensor) -> None:
        self.entries.pop(one, None)
        size = rows.numel() * KEPT[self.budget.kept].itemsize
        if not self.budget.spill:
            if self.budget.evict == "oldest":
                while self.entries and self.held() + size > self.budget.bytes:
                    self.entries.popitem(last=False)
            if self.held() + size > self.budget.bytes:
                return
        self.entries[one] = rows.to(KEPT[self.budget.kept])

    def held(self) -> int:
        return sum(rows.numel() * rows.element_size() for rows in self.entries.values())


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
def test_thousands_of_steps_agree_with_the_model_and_with_the_notes(budget: Budget) -> None:
    cache, ledger, model, choice = Cache(budget), Ledger(budget), Model(budget), numpy_stream(1, "cache-test")
    for step in range(1500):
        ids = [int(one) for one in choice.integers(0, 12, choice.integers(1, 4))]
        width = 5 if step % 50 else 6
        told = Samples(tuple(ids), tuple(1 + one % 4 for one in ids))
        rows = torch.randn(sum(told.rows), width, generator=torch_stream(step, "cache-test"))
        before = dict(cache.entries), dict(ledger.entries)
        if choice.random() < 0.3:
            here = [one for one in ids if one in cache.entries]
            changed, noted = cache.touched(here), ledger.touched(here)
            for one in here:
                model.entries.move_to_end(one)
        else:
            changed, noted = cache.put(told, rows), ledger.put(told, rows[:, :2], width)
            for one, part in zip(ids, torch.split(rows, list(told.rows)), strict=True):
                model.put(one, part)
        assert (dict(cache.entries), dict(ledger.entries)) == before, "a cache is a value"
        cache, ledger = changed, noted
        assert list(cache.entries) == list(ledger.entries) == list(model.entries)
        assert cache.held_bytes == ledger.held_bytes <= budget.bytes
        if step % 20 == 0:
            flat, plain = cache.flatten(), [rows.reshape(-1) for rows in model.entries.values()]
            assert torch.equal(flat.get("values", torch.empty(0)), torch.cat(plain) if plain else torch.empty(0))
            assert cache.known(told, width) == ledger.known(told, width)
        if step % 100 == 99:
            cache, ledger = Cache(budget).restored(cache.flatten()), Ledger(budget).restored(ledger.flatten())
            assert list(cache.entries) == list(ledger.entries) == list(model.entries)
            if not budget.spill:
                assert cache.held_bytes == model.held()


def test_rows_of_samples_that_are_not_here_are_zeros() -> None:
    cache = Cache(Budget(kept="float32")).put(Samples((3,), (2,)), torch.ones(2, 4))
    assert torch.equal(cache.rows(Samples((1, 3, 3), (1, 2, 1)), 4), torch.tensor([[0.0], [1.0], [1.0], [0.0]]).expand(4, 4))
    assert cache.known(Samples((3,), (2,)), 5) == [False]


def test_of_a_sample_that_stands_twice_the_last_rows_count() -> None:
    rows = torch.arange(4.0).reshape(2, 2)
    assert torch.equal(Cache(Budget()).put(Samples((1, 1), (1, 1)), rows).rows(Samples((1,), (1,)), 2), rows[1:])


def test_a_place_in_the_file_is_used_again_only_when_nobody_can_ask_for_it() -> None:
    budget, told = Budget(1e-6, spill=True), Samples((1,), (2,))
    first = Cache(budget).put(told, torch.ones(2, 4))
    second = first.put(told, torch.full((2, 4), 2.0))
    assert first.store is second.store
    assert first.store is not None
    assert first.store.end == 32
    assert torch.equal(first.rows(told, 4), torch.ones(2, 4)), "the older value still has its own"
    del first
    third = second.put(told, torch.full((2, 4), 3.0))
    assert third.store is not None
    assert third.store.end == 32
    assert torch.equal(second.rows(told, 4), torch.full((2, 4), 2.0))
    assert torch.equal(third.rows(told, 4), torch.full((2, 4), 3.0))


@pytest.mark.parametrize("wide", list(KEPT.values()), ids=str)
@pytest.mark.parametrize("narrow", list(KEPT.values()), ids=str)
def test_what_is_finite_stays_finite_in_any_type(wide: torch.dtype, narrow: torch.dtype) -> None:
    """bfloat16 has no 65504: clamped in bfloat16 to float16's range, a value would be rounded up out of it."""
    rows = torch.tensor([torch.finfo(wide).max, -torch.finfo(wide).max, 65504.0, -65500.0, 1.0]).to(wide)
    found = finite_as(rows, narrow)
    assert found.dtype == narrow
    assert bool(torch.isfinite(found).all())
    if wide == narrow:
        assert torch.equal(found, rows)


def test_rows_of_chosen_samples() -> None:
    mask, left = rows_of([Samples((1, 2), (2, 1)), Samples((3,), (3,))], [[False, True], [True]])
    assert mask.tolist() == [False, False, True, True, True, True]
    assert left == [Samples((2,), (1,)), Samples((3,), (3,))]


@pytest.mark.parametrize("fields", [{"megabytes": -1}, {"megabytes": 2e9}, {"evict": "all"}, {"kept": "int8"}, {"spill": 1}], ids=str)
def test_wrong_fields_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Budget(**fields)


def filled(budget: Budget, count: int) -> tuple[Cache, Ledger]:
    """A cache of so many samples of 1 to 3 rows, and the notes on it."""
    told = Samples(tuple((7 * k) % count for k in range(count)), tuple(1 + k % 3 for k in range(count)))
    rows = torch.randn(sum(told.rows), 4, generator=torch_stream(3, "cache-test"))
    return Cache(budget).put(told, rows), Ledger(budget).put(told, rows[:, :2], 4)


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
@pytest.mark.parametrize("saved", [Budget(), Budget(kept="float32")], ids=str)
def test_restored_is_what_one_put_for_each_sample_gives(budget: Budget, saved: Budget) -> None:
    """Under the budget it was saved under or a smaller one, in another type: a run may be resumed with other settings."""
    cache, ledger = filled(saved, 20)
    flat, noted, expected, notes = cache.flatten(), ledger.flatten(), Cache(budget), Ledger(budget)
    for one, entry in cache.entries.items():
        assert isinstance(entry, torch.Tensor)
        expected = expected.put(Samples((one,), (len(entry),)), entry)
        note = ledger.entries[one]
        notes = notes.put(Samples((one,), (len(entry),)), note.summary, note.width)
    found, found_notes = Cache(budget).restored(flat), Ledger(budget).restored(noted)
    assert list(found.entries) == list(expected.entries) == list(found_notes.entries) == list(notes.entries)
    assert found.held_bytes == expected.held_bytes == found_notes.held_bytes == notes.held_bytes
    assert found.flatten().keys() == expected.flatten().keys()
    assert all(torch.equal(tensor, expected.flatten()[name]) for name, tensor in found.flatten().items())
    assert all(torch.equal(tensor, notes.flatten()[name]) for name, tensor in found_notes.flatten().items())


def test_thousands_of_samples_are_restored_in_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """One new value in all, not one for each sample: every one copies what was there before."""
    cache, ledger = filled(Budget(), 20_000)
    made: list[object] = []
    real = cache_module.replace

    def counted(value: Any, **changes: Any) -> Any:
        made.append(value)
        return real(value, **changes)

    monkeypatch.setattr(cache_module, "replace", counted)
    found, notes = Cache(Budget()).restored(cache.flatten()), Ledger(Budget()).restored(ledger.flatten())
    assert len(made) == 2
    assert len(found.entries) == len(notes.entries) == 20_000
    assert found.held_bytes == cache.held_bytes == notes.held_bytes
    assert torch.equal(found.flatten()["values"], cache.flatten()["values"])
    one = next(iter(found.entries.values()))
    assert isinstance(one, torch.Tensor)
    assert one.untyped_storage().nbytes() == one.numel() * one.element_size(), "each has its own memory, which goes when it goes"


SPILLING, TOLD = Budget(1e-6, spill=True), Samples((1,), (2,))


def test_no_more_files_to_open_is_an_error_with_a_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused() -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(tempfile, "TemporaryFile", refused)
    with pytest.raises(ResourceError, match=r"cannot open .*\[Errno 24\] Too many open files.*cache_mb.*spill = false.*ulimit"):
        Cache(SPILLING).put(TOLD, torch.ones(2, 4))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no device that is always full")
def test_a_full_disk_is_an_error_with_a_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    # The system's own full disk: it fails when the buffer is written, as a real one does.
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda: open("/dev/full", "w+b"))  # noqa: SIM115 - the cache closes it
    with pytest.raises(ResourceError, match=r"cannot write 16 bytes to .* holds 1.6e-05 MB: .*No space left.*disk space"):
        Cache(SPILLING).put(TOLD, torch.ones(2, 4))


def test_a_file_that_has_lost_its_end_is_an_error() -> None:
    cache = Cache(SPILLING).put(TOLD, torch.ones(2, 4))
    assert cache.store is not None
    cache.store.file.truncate(3)
    with pytest.raises(ResourceError, match=r"cannot read 16 bytes from .*3 bytes are there"):
        cache.rows(TOLD, 4)
