"""split.py: a cut changes nothing, the ways in which it could are noticed, rows enter where they should, checkpointing is exact."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

from splitft.engine.cohort import CohortExecutor
from splitft.engine.server import Server
from splitft.engine.settings import Federation, RoundResult, same_start
from splitft.engine.workers import WorkersExecutor
from splitft.errors import AdapterError
from splitft.lora import AdapterBank, Layout
from splitft.loss import Targets, training_loss
from splitft.models.anatomy import without_dropout
from splitft.rng import torch_stream
from splitft.selfcheck import inspect_family, loud
from splitft.split import Route, SplitModel, first_rows
from splitft.transport.inproc import InProcess
from splitft.types import Key, Plan, RoundPlan

from ..fault.drive import Drive
from ..support import BLOCKS, VOCABULARY, build, federation, split_model

LENGTHS = (9, 6, 8)


def ids_and_mask(rows: int = 3, padded: bool = True) -> tuple[Tensor, Tensor | None]:
    ids = torch.randint(3, VOCABULARY, (rows, max(LENGTHS)), generator=torch_stream(1, "ids"))
    lengths = torch.tensor([LENGTHS[row % 3] for row in range(rows)])
    return ids, (torch.arange(ids.shape[1])[None] < lengths[:, None]).long() if padded else None


def filled_bank(split: SplitModel, rows: int) -> AdapterBank:
    layout = Layout.of(split.keys, 3, 1.0)
    bank = AdapterBank(layout, rows)
    with torch.no_grad():
        bank.values.normal_(0.0, 0.2, generator=torch_stream(2, "bank"))
    return bank


def whole_logits(family: str, ids: Tensor, mask: Tensor | None) -> Tensor:
    with torch.no_grad():
        return build(family)(input_ids=ids, attention_mask=mask, use_cache=False).logits


def apart(found: Tensor, wanted: Tensor, mask: Tensor | None) -> float:
    """Largest difference at tokens, relative to the largest value."""
    valid = torch.ones(wanted.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
    return float((found - wanted)[valid].abs().max() / wanted[valid].abs().max())


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("cut", range(1, BLOCKS + 1))
def test_front_and_back_are_the_whole(cut: int, padded: bool) -> None:
    split = split_model("gpt2")
    ids, mask = ids_and_mask(padded=padded)
    with torch.no_grad():
        front = split.run(Route(3, last=cut - 1), ids, mask)
        back = split.logits(split.run(Route(3, entries={cut: front}), None, mask))
    assert apart(back, whole_logits("gpt2", ids, mask), mask) < 1e-5


def test_a_second_addition_of_positions_at_the_cut_would_show() -> None:
    """GPT-2's forward adds position embeddings to what it is given. A back pass that let them through would differ by this much."""
    split = split_model("gpt2")
    ids, mask = ids_and_mask(padded=False)
    whole = whole_logits("gpt2", ids, mask)
    with torch.no_grad():
        front = split.run(Route(3, last=1), ids, mask)
        positions = split.model.transformer.wpe(torch.arange(ids.shape[1]))
        wrong = split.logits(split.run(Route(3, entries={2: front + positions}), None, mask))
        right = split.logits(split.run(Route(3, entries={2: front}), None, mask))
    assert apart(right, whole, mask) < 1e-5
    assert apart(wrong, whole, mask) > 0.05


def test_a_front_repeated_in_training_mode_differs_unless_dropout_is_off() -> None:
    """Recomputing the front with live dropout would give the backward another function than the forward."""
    config = tf.GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2)
    ids, _ = ids_and_mask(padded=False)
    outcomes = {}
    for name, chosen in (("live", config), ("off", without_dropout(config))):
        with torch.random.fork_rng(devices=[]):
            torch.random.default_generator.manual_seed(5)
            model = loud(tf.AutoModelForCausalLM.from_config(chosen, attn_implementation="sdpa").float())
            split = SplitModel(model, inspect_family(config, "gpt2"))
            split.model.train()
            with torch.no_grad():
                runs = [split.run(Route(3, last=0), ids, None) for _ in range(2)]
                split.model.eval()
                runs.append(split.run(Route(3, last=0), ids, None))
        outcomes[name] = runs
    assert not torch.equal(outcomes["live"][0], outcomes["live"][1])
    assert all(torch.equal(run, outcomes["off"][0]) for run in outcomes["off"])


def rows_seen(split: SplitModel) -> tuple[dict[int, list[int]], Callable[[], None]]:
    """Rows of the hidden state each block is given, filled by hooks; and what removes the hooks."""
    seen: dict[int, list[int]] = {index: [] for index in range(split.blocks)}

    def watch(index: int) -> Callable[..., None]:
        def note(module: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
            hidden = inputs[0] if inputs else named["hidden_states"]
            seen[index].append(hidden.shape[0])

        return note

    hooks = [block.register_forward_pre_hook(watch(index), with_kwargs=True) for index, block in enumerate(split._blocks)]
    return seen, lambda: [hook.remove() for hook in hooks] and None


@pytest.mark.parametrize("family", ["gpt2", "llama", "bloom"])
@pytest.mark.parametrize("padded", [False, True])
def test_a_ragged_pass_equals_separate_passes_and_computes_no_row_early(family: str, padded: bool) -> None:
    split = split_model(family)
    ids, mask = ids_and_mask(4, padded)
    cuts = [1, 2, 2, 4]
    bank = filled_bank(split, 4)

    def own(row: int) -> tuple[Tensor, Tensor | None, Tensor]:
        return ids[row : row + 1], None if mask is None else mask[row : row + 1], torch.tensor([row])

    fronts, separate, gradients = [], [], []
    for row, cut in enumerate(cuts):
        part, part_mask, rows = own(row)
        with torch.no_grad():
            fronts.append(split.run(Route(1, last=cut - 1, bank=bank, bank_rows=rows), part, part_mask))
        leaf = fronts[-1].clone().requires_grad_(True)
        final = split.run(Route(1, entries={cut: leaf}, bank=bank, bank_rows=rows), None, part_mask)
        (final * final.detach().cos()).sum().backward()
        separate.append(final.detach())
        gradients.append(leaf.grad)
    alone = bank.gradients.clone()
    bank.zero_gradients()

    seen, done = rows_seen(split)
    leaves = [front.clone().requires_grad_(True) for front in fronts]
    entries = {1: leaves[0], 2: torch.cat(leaves[1:3]), 4: leaves[3]}
    final = split.run(Route(4, entries=entries, bank=bank, bank_rows=torch.arange(4), sessions=4), None, mask)
    (final * final.detach().cos()).sum().backward()
    done()
    assert seen == {0: [], 1: [1], 2: [3], 3: [3]}, "a block computed rows that had not entered, or missed some that had"
    assert apart(final.detach(), torch.cat(separate), mask) < 1e-5
    for leaf, wanted in zip(leaves, gradients, strict=True):
        torch.testing.assert_close(leaf.grad, wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(bank.gradients, alone, rtol=1e-4, atol=1e-4)


def test_a_front_stops_at_its_cut_and_the_head_is_not_computed() -> None:
    split = split_model("gpt2")
    ids, mask = ids_and_mask()
    seen, done = rows_seen(split)
    heads: list[int] = []
    split.head.register_forward_pre_hook(lambda module, inputs: heads.append(1))
    split.run(Route(3, last=1), ids, mask)
    done()
    assert seen == {0: [3], 1: [3], 2: [], 3: []}
    split.run(Route(3), ids, mask)
    assert heads == []


def test_the_crossing_is_called_behind_every_block_with_its_state() -> None:
    split = split_model("gpt2")
    ids, mask = ids_and_mask()
    states: dict[int, Tensor] = {}

    def cross(index: int, hidden: Tensor) -> Tensor:
        states[index] = hidden
        return hidden

    with torch.no_grad():
        split.run(Route(3, cross=cross), ids, mask)
        for cut in range(1, BLOCKS + 1):
            assert torch.equal(split.run(Route(3, last=cut - 1), ids, mask), states[cut - 1])


@pytest.mark.parametrize("total", [2, 6])
def test_first_rows_takes_what_is_per_row_and_leaves_what_is_shared(total: int) -> None:
    mask, heads, table = torch.rand(total, 1, 5, 5), torch.rand(total * 4, 1, 5), torch.rand(1, 5, 8)
    value = {
        "mask": mask,
        "alibi": heads,
        "rotary": (table, torch.rand(total, 5, 8)),
        "flag": True,
        "none": None,
        "vector": torch.ones(total),
    }
    cut = first_rows(value, 1, total)
    assert torch.equal(cut["mask"], mask[:1])
    assert torch.equal(cut["alibi"], heads[:4])
    assert torch.equal(cut["rotary"][0], table)
    assert cut["rotary"][1].shape[0] == 1
    assert isinstance(cut["rotary"], tuple)
    assert (cut["flag"], cut["none"]) == (True, None)
    assert cut["vector"].shape == (total,)


def test_only_chosen_projections_take_adapters_and_the_choice_can_change() -> None:
    split = split_model("gpt2", ["mlp.c_fc"])
    assert set(split.keys) == {Key(block, "mlp.c_fc") for block in range(BLOCKS)}
    ids, mask = ids_and_mask()
    bank = filled_bank(split, 1)
    with torch.no_grad():
        adapted, plain = split.run(Route(3, bank=bank), ids, mask), split.run(Route(3), ids, mask)
        split.adapt([Key(2, "attn.c_attn")])
        assert torch.equal(split.run(Route(3, bank=bank), ids, mask), plain)
    assert apart(adapted, plain, mask) > 0.01
    assert set(split.keys) == {Key(2, "attn.c_attn")}
    assert split.keys[Key(2, "attn.c_attn")] == (32, 96)


def test_an_unknown_target_is_refused_with_the_known_ones() -> None:
    with pytest.raises(AdapterError, match="q_proj") as caught:
        split_model("gpt2", ["q_proj"])
    assert "attn.c_attn" in str(caught.value)


def test_the_frozen_model_is_never_trained() -> None:
    split = split_model("gpt2", "all")
    ids, mask = ids_and_mask()
    bank = filled_bank(split, 1)
    split.run(Route(3, bank=bank), ids, mask).sum().backward()
    assert all(not parameter.requires_grad and parameter.grad is None for parameter in split.parameters())
    assert float(bank.gradients.abs().sum()) > 0


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_gradient_checkpointing_changes_neither_loss_nor_gradients(family: str) -> None:
    outcomes = []
    for enabled in (False, True):
        split = split_model(family)
        split.set_checkpointing(enabled)
        ids, mask = ids_and_mask(4)
        bank = filled_bank(split, 2)
        seen, done = rows_seen(split)
        hidden = split.run(Route(4, bank=bank, sessions=2), ids, mask)
        labels = torch.where(mask.bool(), ids, -100)
        loss, _ = training_loss(hidden, Targets.of(labels), torch.ones(4), split.head, split.anatomy)
        loss.backward()
        done()
        outcomes.append((loss.detach(), bank.gradients, [len(calls) for calls in seen.values()]))
    assert torch.equal(outcomes[0][0], outcomes[1][0])
    assert torch.equal(outcomes[0][1], outcomes[1][1])
    assert outcomes[0][2] == [1] * BLOCKS
    assert outcomes[1][2] == [2] * BLOCKS, "nothing was recomputed, so nothing was saved"


def trained(fed: Federation, name: str, plans: tuple[Plan, ...]) -> RoundResult:
    executor = CohortExecutor(fed) if name == "cohort" else WorkersExecutor(fed, InProcess(), deterministic=name == "workers")
    return executor.train(RoundPlan(1, plans), 0, same_start(fed.layout.initial_row(1)), {}, lambda count: None)


@pytest.mark.parametrize("u_shape", [False, True])
@pytest.mark.parametrize("name", ["cohort", "workers", "workers-ragged"])
def test_checkpointing_in_a_round_gives_the_same_numbers_and_bytes(name: str, u_shape: bool) -> None:
    """Between a forward and its backward other clients' passes run through the same slots; and what crossed the wire is counted once."""
    plans = tuple(Plan(client, cut, 2, 3, u_shape, 0) for client, cut in enumerate((1, 2, 3)))
    results = []
    for enabled in (False, True):
        fed = federation(length=(6, 12))
        fed.split.set_checkpointing(enabled)
        results.append(trained(fed, name, plans))
    assert torch.equal(results[0].values, results[1].values)
    assert results[0].step_losses == results[1].step_losses
    assert results[0].ledger.clients == results[1].ledger.clients


def test_a_family_that_cannot_be_ragged_is_served_one_by_one() -> None:
    fed = federation()
    plan = RoundPlan(1, tuple(Plan(client, 1 + client, 1, 3) for client in range(3)))
    start = fed.layout.initial_row(1)
    assert Server(fed, plan, 0, same_start(start), {}, deterministic=False).deterministic is False
    object.__setattr__(fed.split.anatomy, "ragged", False)
    assert Server(fed, plan, 0, same_start(start), {}, deterministic=False).deterministic is True


@pytest.mark.parametrize(("deterministic", "calls"), [(False, [6]), (True, [2, 2, 2])])
def test_sessions_that_wait_together_share_one_server_pass(deterministic: bool, calls: list[int]) -> None:
    fed = federation(length=(6, 12))
    drive = Drive(fed)
    server = Server(fed, drive.plan, 0, same_start(fed.layout.initial_row(1)), {}, deterministic)
    seen, done = rows_seen(fed.split)
    replies = server.handle(sorted(drive.waiting.items()))
    done()
    assert [client for client, _ in replies] == [0, 1, 2]
    assert seen[BLOCKS - 1] == calls
