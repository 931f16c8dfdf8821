"""lora.py: the layout of a row, the bank against a plain loop over clients, and fresh adapters."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from splitft.errors import AdapterError
from splitft.lora import AdapterBank, Layout
from splitft.rng import torch_stream
from splitft.types import Factors, Key

KEY = Key(0, "attn.q")
WIDTHS = {Key(0, "attn.q"): (6, 10), Key(0, "mlp.up"): (6, 8), Key(1, "attn.q"): (6, 10), Key(10, "attn.q"): (4, 4), Key(2, "z"): (5, 3)}


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch_stream(seed, "lora-test"))


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    names = st.sampled_from(["attn.q", "attn.v", "mlp.up"])
    keys = draw(st.sets(st.builds(Key, st.integers(0, 12), names), min_size=1, max_size=8))
    widths = {key: (draw(st.integers(1, 5)), draw(st.integers(1, 5))) for key in keys}
    return Layout.of(widths, {key: draw(st.integers(1, 3)) for key in keys}, 2.0)


@given(layouts())
def test_entries_tile_a_row_in_key_order(layout: Layout) -> None:
    keys = [entry.key for entry in layout.entries]
    assert keys == sorted(keys)
    end = 0
    for entry in layout.entries:
        assert entry.start == end
        assert entry.middle - entry.start == entry.rank * entry.inputs
        end = entry.end
        assert end - entry.middle == entry.outputs * entry.rank
    assert layout.parameters == end


@given(layouts(), st.integers(0, 13), st.integers(0, 13))
def test_column_ranges_of_cuts_tile_a_row(layout: Layout, first: int, second: int) -> None:
    low, high = sorted((first, second))
    parts = [layout.columns(0, low), layout.columns(low, high), layout.columns(high, 13)]
    assert parts[0].start == 0
    assert parts[2].stop == layout.parameters
    assert parts[0].stop == parts[1].start
    assert parts[1].stop == parts[2].start
    inside = sum(entry.end - entry.start for entry in layout.entries if low <= entry.key.block < high)
    assert parts[1].stop - parts[1].start == inside


@given(layouts(), st.integers(0, 99))
def test_rows_and_factors_are_the_same_numbers(layout: Layout, seed: int) -> None:
    row = drawn(layout.parameters, seed=seed)
    factors = layout.factors(row)
    assert torch.equal(layout.row(factors), row)
    for entry in layout.entries:
        a, b = factors[entry.key]
        assert a.shape == (entry.rank, entry.inputs)
        assert b.shape == (entry.outputs, entry.rank)
        assert a.untyped_storage().data_ptr() == row.untyped_storage().data_ptr(), "factors are views"


def test_blocks_are_ordered_by_number_not_by_name() -> None:
    assert [entry.key.block for entry in Layout.of(WIDTHS, 2, 1.0).entries] == [0, 0, 1, 2, 10]


def test_rank_and_scale_may_differ_by_key() -> None:
    ranks = {key: 1 + position for position, key in enumerate(sorted(WIDTHS))}
    layout = Layout.of(WIDTHS, ranks, {key: 0.5 * rank for key, rank in ranks.items()})
    assert {entry.key: entry.rank for entry in layout.entries} == ranks
    assert all(entry.scale == 0.5 * entry.rank for entry in layout.entries)
    assert layout.parameters == sum(ranks[key] * sum(widths) for key, widths in WIDTHS.items())


def test_an_empty_layout_has_no_parameters() -> None:
    empty = Layout.of({}, 4, 1.0)
    assert empty.parameters == 0
    assert empty.columns(0, 9) == slice(0, 0)


@pytest.mark.parametrize("rank", [0, -1])
def test_a_rank_that_is_not_positive_is_refused(rank: int) -> None:
    with pytest.raises(AdapterError, match=rf"rank {rank} of 0\.attn\.q"):
        Layout.of(WIDTHS, rank, 1.0)


def test_factors_that_do_not_fit_are_named() -> None:
    layout = Layout.of(WIDTHS, 2, 1.0)
    good = {key: Factors(drawn(2, i), drawn(o, 2)) for key, (i, o) in WIDTHS.items()}
    with pytest.raises(AdapterError, match=r"no weights for 2\.z"):
        layout.row({key: value for key, value in good.items() if key.block != 2})
    with pytest.raises(AdapterError, match=r"3\.attn\.q, which this run does not adapt"):
        layout.row({**good, Key(3, "attn.q"): good[KEY]})
    for wrong in (Factors(drawn(3, 6), drawn(10, 3)), Factors(drawn(6, 2), drawn(10, 2)), Factors(drawn(2, 6), drawn(2, 10))):
        with pytest.raises(AdapterError, match=r"0\.attn\.q: factors have shapes .* needed are A 2 x 6, B 10 x 2"):
            layout.row({**good, KEY: wrong})


def test_a_fresh_adapter_is_uniform_in_a_and_zero_in_b() -> None:
    layout = Layout.of({Key(0, "wide"): (400, 9), Key(1, "narrow"): (25, 9)}, 16, 1.0)
    for entry, (a, b) in zip(layout.entries, layout.factors(layout.initial_row(3)).values(), strict=True):
        bound = 1.0 / math.sqrt(entry.inputs)
        assert float(a.abs().max()) <= bound
        assert float(a.abs().max()) > 0.95 * bound
        assert abs(float(a.mean())) < 0.1 * bound
        assert float(a.var()) == pytest.approx(bound**2 / 3, rel=0.15)
        assert float(b.abs().sum()) == 0.0


def test_a_fresh_adapter_follows_the_seed_and_the_key_alone() -> None:
    layout, part = Layout.of(WIDTHS, 2, 1.0), Layout.of({key: WIDTHS[key] for key in list(WIDTHS)[:2]}, 2, 1.0)
    assert torch.equal(layout.initial_row(7), layout.initial_row(7))
    assert not torch.equal(layout.initial_row(7), layout.initial_row(8))
    assert torch.equal(layout.factors(layout.initial_row(7))[KEY].a, part.factors(part.initial_row(7))[KEY].a)
    values = [a for a, _ in layout.factors(layout.initial_row(7)).values() if a.shape == (2, 6)]
    assert len(values) == 3
    assert not any(torch.equal(values[i], values[j]) for i in range(3) for j in range(i)), "keys must not share their numbers"


def filled_bank(layout: Layout, rows: int, **options: object) -> AdapterBank:
    bank = AdapterBank(layout, rows, **options)  # type: ignore[arg-type]
    with torch.no_grad():
        bank.values.copy_(drawn(rows, layout.parameters, seed=4))
    return bank


def naive(layout: Layout, values: Tensor, base: Tensor, inputs: Tensor, owners: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Output, gradient of the rows and gradient of the inputs by a loop over sessions with plain matrix products."""
    rows = values.detach().clone().requires_grad_(True)
    leaf = inputs.detach().clone().requires_grad_(True)
    each = leaf.shape[0] // len(owners)
    parts = []
    for session, owner in enumerate(owners):
        a, b = layout.factors(rows[owner])[KEY]
        own = slice(session * each, (session + 1) * each)
        parts.append(base[own] + layout.by_key[KEY].scale * (leaf[own] @ a.T) @ b.T)
    output = torch.cat(parts)
    (output * target_weights(output)).sum().backward()
    assert rows.grad is not None
    assert leaf.grad is not None
    return output.detach(), rows.grad, leaf.grad


def target_weights(output: Tensor) -> Tensor:
    return drawn(*output.shape, seed=77)


@settings(max_examples=25)
@given(owners=st.lists(st.integers(0, 3), min_size=1, max_size=5), each=st.integers(1, 3), tokens=st.integers(1, 4))
def test_the_bank_equals_a_loop_over_clients(owners: list[int], each: int, tokens: int) -> None:
    """Any mapping of sessions to rows, rows shared by several sessions included: outputs and all gradients."""
    layout = Layout.of({KEY: (6, 10), Key(1, "other"): (6, 6)}, 3, 1.7)
    bank = filled_bank(layout, 4)
    inputs, base = drawn(len(owners) * each, tokens, 6, seed=1), drawn(len(owners) * each, tokens, 10, seed=2)
    leaf = inputs.clone().requires_grad_(True)
    output = bank.add(KEY, base, leaf, torch.tensor(owners), len(owners))
    (output * target_weights(output)).sum().backward()
    want, want_rows, want_inputs = naive(layout, bank.values, base, inputs, owners)
    torch.testing.assert_close(output.detach(), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(bank.gradients, want_rows, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(leaf.grad, want_inputs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sessions", [1, 2, 4])
def test_without_a_map_session_k_uses_row_k(sessions: int) -> None:
    layout = Layout.of({KEY: (6, 10)}, 3, 0.5)
    bank = filled_bank(layout, 4)
    inputs, base = drawn(sessions * 2, 3, 6), drawn(sessions * 2, 3, 10)
    output = bank.add(KEY, base, inputs, None, sessions)
    torch.testing.assert_close(output, naive(layout, bank.values, base, inputs, list(range(sessions)))[0], rtol=1e-5, atol=1e-5)


def test_a_map_longer_than_the_sessions_that_entered_is_cut() -> None:
    layout = Layout.of({KEY: (6, 10)}, 3, 0.5)
    bank = filled_bank(layout, 4)
    inputs, base = drawn(2, 3, 6), drawn(2, 3, 10)
    output = bank.add(KEY, base, inputs, torch.tensor([2, 0, 3]), 2)
    torch.testing.assert_close(output, naive(layout, bank.values, base, inputs, [2, 0])[0], rtol=1e-5, atol=1e-5)


def test_gradients_add_up_until_they_are_cleared() -> None:
    bank = filled_bank(Layout.of({KEY: (6, 10)}, 3, 0.5), 2)
    bank.add(KEY, drawn(2, 3, 10), drawn(2, 3, 6), None, 2).sum().backward()
    once = bank.gradients.clone()
    bank.add(KEY, drawn(2, 3, 10), drawn(2, 3, 6), None, 2).sum().backward()
    torch.testing.assert_close(bank.gradients, 2 * once)
    assert float(once.abs().sum()) > 0
    bank.zero_gradients()
    assert float(bank.gradients.abs().sum()) == 0.0


def test_a_value_written_to_the_bank_is_used_at_once() -> None:
    """Leaves are views: an optimizer step on the matrix needs no copying back."""
    layout = Layout.of({KEY: (6, 10)}, 3, 0.5)
    bank = AdapterBank(layout, 1)
    inputs, base = drawn(1, 3, 6), drawn(1, 3, 10)
    assert torch.equal(bank.add(KEY, base, inputs, None, 1), base)
    with torch.no_grad():
        bank.values.copy_(drawn(1, layout.parameters))
    assert not torch.equal(bank.add(KEY, base, inputs, None, 1), base)


def test_blocks_of_others_are_no_leaves_and_leave_the_output_alone() -> None:
    layout = Layout.of(WIDTHS, 2, 1.0)
    bank = filled_bank(layout, 1, blocks=[0])
    assert {key.block for key in bank.leaves} == {0}
    base = drawn(1, 2, 10)
    assert bank.add(Key(1, "attn.q"), base, drawn(1, 2, 6), None, 1) is base


def test_zero_padding_of_a_rank_keeps_zero_gradients_and_changes_nothing() -> None:
    """With rows of A and columns of B both zero, their gradients are zero: a smaller rank needs no mask."""
    small, large = Layout.of({KEY: (6, 10)}, 2, 1.5), Layout.of({KEY: (6, 10)}, 5, 1.5)
    bank, padded = filled_bank(small, 1), AdapterBank(large, 1)
    with torch.no_grad():
        (a, b), (wide_a, wide_b) = small.factors(bank.values[0])[KEY], large.factors(padded.values[0])[KEY]
        wide_a[:2], wide_b[:, :2] = a, b
    inputs, base = drawn(1, 4, 6), drawn(1, 4, 10)
    outputs = [one.add(KEY, base, inputs, None, 1) for one in (bank, padded)]
    torch.testing.assert_close(outputs[0], outputs[1])
    for output in outputs:
        (output * target_weights(output)).sum().backward()
    gradient, wide = small.factors(bank.gradients[0])[KEY], large.factors(padded.gradients[0])[KEY]
    torch.testing.assert_close(wide.a[:2], gradient.a)
    torch.testing.assert_close(wide.b[:, :2], gradient.b)
    assert float(wide.a[2:].abs().sum()) == 0.0
    assert float(wide.b[:, 2:].abs().sum()) == 0.0


def test_bfloat16_outputs_have_float32_gradients() -> None:
    layout = Layout.of({KEY: (6, 10)}, 3, 0.5)
    bank = filled_bank(layout, 2)
    inputs, base = drawn(2, 8, 6).bfloat16(), drawn(2, 8, 10).bfloat16()
    output = bank.add(KEY, base, inputs, None, 2)
    assert output.dtype == torch.bfloat16
    output.sum().backward()
    assert bank.gradients.dtype == torch.float32
    want = naive(layout, bank.values, base.float(), inputs.float(), [0, 1])[0]
    assert float((output.detach().float() - want).norm() / want.norm()) < 0.02
