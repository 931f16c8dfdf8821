"""engine/evaluate.py against a stock transformers loop, row by row and without padding; and the metric's definition."""

from __future__ import annotations

import math
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from splitft.data.base import TokenRows
from splitft.engine import evaluate as module
from splitft.engine.evaluate import Score, batches_by_length, evaluate, evaluate_own
from splitft.errors import DataError
from splitft.lora import Layout
from splitft.peft_format import merge_into
from splitft.rng import torch_stream
from splitft.split import Route

from ..support import VOCABULARY, build, random_rows, split_model

CPU = torch.device("cpu")


def stock(family: str, layout: Layout, row: Tensor, blocks_path: str, rows: TokenRows) -> tuple[float, int, int]:
    """Sum of nll, right predictions and targets with the adapter merged into the stock model, one unpadded row at a time."""
    model = build(family)
    merge_into(model, layout, row, blocks_path)
    total, right, count = 0.0, 0, 0
    for index in range(len(rows)):
        part = slice(int(rows.offsets[index]), int(rows.offsets[index + 1]))
        ids, trained = torch.from_numpy(rows.ids[part]).long(), torch.from_numpy(rows.trained[part])[1:]
        with torch.no_grad():
            logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
        losses = F.cross_entropy(logits, ids[1:], reduction="none")[trained]
        total, count = total + float(losses.double().sum()), count + len(losses)
        right += int((logits.argmax(-1) == ids[1:])[trained].sum())
    return total, right, count


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_scores_equal_a_stock_loop_on_rows_of_unequal_length(family: str) -> None:
    split = split_model(family, "all")
    layout = Layout.of(split.keys, 3, 1.5)
    row = torch.randn(layout.parameters, generator=torch_stream(1, "evaluate")) * 0.1
    sets = [random_rows(5, (3, 14), 1), random_rows(3, (8, 20), 2, prompt=4), random_rows(1, 2, 3)]
    found = evaluate(split, layout, row, sets, 3, CPU)
    for rows, score in zip(sets, found, strict=True):
        total, right, count = stock(family, layout, row, split.anatomy.blocks_path, rows)
        assert (score.tokens, score.correct) == (count, right)
        assert score.tokens == rows.target_tokens
        assert score.loss_sum == pytest.approx(total, rel=2e-5)
    assert len({round(score.loss, 3) for score in found}) == 3


def test_the_batch_size_and_the_company_do_not_matter() -> None:
    split = split_model("gpt2")
    layout = Layout.of(split.keys, 2, 1.0)
    row, sets = layout.initial_row(1), [random_rows(4, (4, 12), 1), random_rows(4, (4, 12), 2)]
    reference = evaluate(split, layout, row, sets, 1, CPU)
    for batch in (2, 3, 8, 100):
        for found, wanted in zip(evaluate(split, layout, row, sets, batch, CPU), reference, strict=True):
            assert (found.tokens, found.correct) == (wanted.tokens, wanted.correct)
            assert found.loss_sum == pytest.approx(wanted.loss_sum, rel=1e-5)
    assert evaluate(split, layout, row, sets[:1], 1, CPU)[0] == reference[0]


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_batches_hold_every_row_once_and_no_more_tokens_than_full_rows_would(batch_size: int) -> None:
    for lengths in (
        np.array([5, 1, 9, 2, 2, 2, 9, 4, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 3]),
        np.full(13, 7),
        np.array([4]),
        np.array([], np.int64),
    ):
        found = list(batches_by_length(lengths, batch_size))
        assert sorted(row for batch in found for row in batch.tolist()) == list(range(len(lengths)))
        widths = [int(lengths[batch].max()) for batch in found]
        assert widths == sorted(widths)
        most = batch_size * lengths.max(initial=0)
        assert all(len(batch) * width <= most for batch, width in zip(found, widths, strict=True))
        # None could be larger: the shortest row of the next one would be too much.
        assert all((len(batch) + 1) * int(lengths[other].min()) > most for batch, other in pairwise(found))


def test_rows_of_one_length_come_in_batches_of_the_size_given() -> None:
    assert [len(batch) for batch in batches_by_length(np.full(19, 128), 8)] == [8, 8, 3]


@pytest.mark.parametrize("at_a_time", [1, 2, 16])
def test_own_models_are_scored_like_each_client_alone(at_a_time: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the number of clients whose adapters are in the bank together."""
    monkeypatch.setattr(module, "OWN_MODELS", at_a_time)
    split = split_model("gpt2", "all")
    layout = Layout.of(split.keys, 2, 1.0)
    adapters = [torch.randn(layout.parameters, generator=torch_stream(client, "own")) * 0.2 for client in range(5)]
    sets = [random_rows(2 + client, (4, 12), client) if client != 3 else TokenRows.build([]) for client in range(5)]
    common = random_rows(4, (4, 12), 9)
    own, shared = evaluate_own(split, layout, adapters, sets, common, 3, CPU)
    assert own[3] is None
    for client, row in enumerate(adapters):
        for found, wanted in zip((own[client], shared[client]), evaluate(split, layout, row, [sets[client], common], 3, CPU), strict=True):
            if wanted is not None:
                assert (found.tokens, found.correct) == (wanted.tokens, wanted.correct)
                assert found.loss_sum == pytest.approx(wanted.loss_sum, rel=1e-5)
    assert len({round(score.loss, 4) for score in shared}) == 5


def test_own_models_without_targets_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "OWN_MODELS", 2)
    split = split_model("gpt2")
    layout = Layout.of(split.keys, 2, 1.0)
    sets = [random_rows(1, 5, 1), random_rows(1, 5, 1), random_rows(2, 5, 1, prompt=5)]
    with pytest.raises(DataError, match="rows of client c have no token to predict"):
        evaluate_own(split, layout, [layout.initial_row(1)] * 3, sets, sets[0], 4, CPU, names=["client a", "client b", "client c"])


def test_the_adapter_is_used() -> None:
    split = split_model("gpt2")
    layout = Layout.of(split.keys, 2, 1.0)
    rows = [random_rows(4, 10, 1)]
    plain = evaluate(split, layout, layout.initial_row(1), rows, 4, CPU)[0]
    moved = evaluate(split, layout, torch.randn(layout.parameters, generator=torch_stream(2, "a")) * 0.3, rows, 4, CPU)[0]
    assert abs(plain.loss - moved.loss) > 0.01


def test_only_the_first_rows_are_taken_when_limited() -> None:
    split = split_model("gpt2")
    layout = Layout.of(split.keys, 2, 1.0)
    rows = random_rows(6, (4, 9), 1)
    limited = evaluate(split, layout, layout.initial_row(1), [rows], 4, CPU, 2)[0]
    first = evaluate(split, layout, layout.initial_row(1), [rows.select([0, 1])], 4, CPU)[0]
    assert limited.tokens == first.tokens == rows.select([0, 1]).target_tokens
    assert limited.loss_sum == pytest.approx(first.loss_sum, rel=1e-6)


def oracle(shift: int) -> Any:
    """Stands for a split model that says, at every position, token + `shift` of its own input with certainty."""
    config = SimpleNamespace(vocab_size=VOCABULARY, get_text_config=lambda: config)

    def run(route: Route, ids: Tensor, mask: Tensor | None) -> Tensor:
        return 30.0 * F.one_hot((ids + shift) % VOCABULARY, VOCABULARY).float()

    return SimpleNamespace(run=run, needed_mask=lambda mask: mask, logits=lambda hidden: hidden, model=SimpleNamespace(config=config))


def test_accuracy_has_the_one_token_shift() -> None:
    """Rows count upwards: who repeats the input is never right, who adds one always is. Without the shift it is the other way round."""
    rows = TokenRows.build(
        [(np.arange(start, start + size, dtype=np.int32), np.ones(size, bool)) for start, size in ((0, 9), (40, 5), (7, 2))]
    )
    layout = Layout.of({}, 1, 1.0)
    copying, knowing = (evaluate(oracle(shift), layout, torch.zeros(0), [rows], 2, CPU)[0] for shift in (0, 1))
    assert copying.accuracy == 0.0
    assert copying.loss > 20
    assert knowing.accuracy == 1.0
    assert knowing.loss < 1e-6
    assert knowing.tokens == 8 + 4 + 1


def test_rows_without_targets_are_refused_by_name() -> None:
    split = split_model("gpt2")
    layout = Layout.of(split.keys, 2, 1.0)
    for names, said in (((), "set 1"), (("client 0 (ada)", "client 1 (bo)"), r"client 1 \(bo\)")):
        with pytest.raises(DataError, match=f"rows of {said} have no token to predict"):
            evaluate(split, layout, layout.initial_row(1), [random_rows(1, 5, 1), random_rows(2, 5, 1, prompt=5)], 4, CPU, names=names)


def test_a_set_without_rows_has_no_score_and_does_not_disturb_others() -> None:
    split = split_model("gpt2")
    layout = Layout.of(split.keys, 2, 1.0)
    rows, nothing = random_rows(3, (4, 9), 1), TokenRows.build([])
    (alone,) = evaluate(split, layout, layout.initial_row(1), [rows], 4, CPU)
    assert evaluate(split, layout, layout.initial_row(1), [nothing, rows, nothing], 4, CPU) == [None, alone, None]
    assert evaluate(split, layout, layout.initial_row(1), [nothing], 4, CPU) == [None]


def test_a_score_is_token_weighted() -> None:
    total = Score(10.0, 1, 4) + Score(2.0, 3, 6)
    assert total == Score(12.0, 4, 10)
    assert total.loss == 1.2
    assert total.accuracy == 0.4
    assert total.perplexity == pytest.approx(math.exp(1.2))
    assert total.to_json() == {"loss": 1.2, "perplexity": total.perplexity, "accuracy": 0.4, "tokens": 10}


def test_a_perplexity_beyond_the_range_of_floats_is_infinite() -> None:
    assert Score(800.0, 0, 1).perplexity == math.inf
