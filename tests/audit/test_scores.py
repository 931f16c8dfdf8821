"""Figures against numbers worked out by hand, the fixed words, and public text that is never the client's."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from splitft.audit.base import Figures, Finding, Floors, Options, Verdict
from splitft.audit.public import apart, frequencies, notable_tokens, public_text, shuffled
from splitft.audit.scores import clustered, common_rate, floors_of, language_model_rate, rare_tokens, rouge_l, score, t_quantile, wilson
from splitft.audit.verdict import verdict_of, word_of
from splitft.data.base import Document, Segment, TokenRows
from splitft.data.python_docs import PythonDocs
from splitft.errors import ConfigError, DataError
from splitft.models.load import load_tokenizer

from ..support import random_rows, split_model
from .scenes import scene

FLOORS = Floors(uniform=0.001, common=0.05, language_model=0.2)


@pytest.mark.parametrize(
    ("hits", "trials", "low", "high"),
    # Worked out with z = 1.96: (p + z2/2n -+ z sqrt(p(1-p)/n + z2/4n2)) / (1 + z2/n).
    [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (10, 10, 0.7225, 1.0), (81, 263, 0.2553, 0.3662), (0, 0, 0.0, 1.0)],
)
def test_wilson(hits: int, trials: int, low: float, high: float) -> None:
    assert wilson(hits, trials) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize(
    ("found", "true", "expected"),
    [
        ([1, 2, 3], [1, 2, 3], 1.0),
        ([1, 2, 3], [3, 2, 1], 1 / 3),
        ([1, 9, 2, 3], [1, 2, 3, 4], 0.75),  # the common subsequence is 1 2 3
        ([1, 2], [1, 5, 2, 6], 2 / 3),  # precision 1, recall 1/2
        ([7, 7, 7], [1, 2, 3], 0.0),
        ([], [1], 0.0),
    ],
)
def test_rouge_l(found: list[int], true: list[int], expected: float) -> None:
    assert rouge_l(found, true) == pytest.approx(expected)


def test_figures_of_a_small_text() -> None:
    true = torch.tensor([[1, 2, 3, 4], [1, 1, 5, 6]])
    found = torch.tensor([[1, 2, 3, 4], [1, 2, 5, 7]])
    rare = torch.zeros(8, dtype=torch.bool)
    rare[[4, 6]] = True
    figures = score(found, true, torch.ones(2, 4, dtype=torch.bool), rare)
    assert figures.accuracy == 6 / 8
    assert figures.tokens == 8
    assert figures.exact == 0.5
    assert figures.rouge_l == pytest.approx((1.0 + 0.5) / 2)
    assert (figures.rare_tokens, figures.rare_recall) == (2, 0.5)
    assert figures.by_position == (1.0, 0.5, 1.0, 0.5)
    assert common_rate(true) == 3 / 8


def test_only_what_counts_is_scored() -> None:
    true, found = torch.tensor([[1, 2, 3]]), torch.tensor([[9, 2, 9]])
    figures = score(found, true, torch.tensor([[False, True, False]]), torch.zeros(10, dtype=torch.bool))
    assert (figures.tokens, figures.accuracy, figures.exact, figures.rare_recall) == (1, 1.0, 1.0, None)


def test_rare_is_seldom_or_notable() -> None:
    frequency = torch.tensor([0.5, 0.00009, 0.4, 0.0])
    notable = torch.tensor([False, False, True, False])
    assert rare_tokens(frequency, notable).tolist() == [False, True, True, True]


def test_the_language_model_floor_is_one_for_what_it_would_say_itself() -> None:
    split = split_model("gpt2")
    ids = torch.tensor([[5]])
    for _ in range(7):
        with torch.no_grad():
            from splitft.split import Route

            following = split.logits(split.run(Route(1), ids, None)[:, -1]).argmax(-1)
        ids = torch.cat([ids, following[:, None]], 1)
    assert language_model_rate(split, ids) == 1.0
    assert language_model_rate(split, (ids + 1) % 96) < 0.5


def test_floors_of_a_case() -> None:
    _, _, case = scene()
    case = replace(case, private=torch.full_like(case.private, 3))
    floors = floors_of(case)
    assert floors.uniform == 1 / case.vocabulary
    assert floors.common == floors.chance == 1.0


def finding(accuracy: float, exact: float = 0.0, rare: float | None = 0.0) -> Finding:
    figures = Figures(100, accuracy, 0.0, 1.0, exact, accuracy, rare, 10, (accuracy,))
    return Finding("K", 2, "first", figures, {}, 0.0, 1, None, 0.0)


@pytest.mark.parametrize(
    ("made", "word"),
    [
        (finding(0.5), "disclosed"),
        (finding(0.02, exact=0.25), "disclosed"),
        (finding(0.151), "partly disclosed"),
        (finding(0.15), "not recovered by these attacks"),
        (finding(0.01, rare=0.06), "partly disclosed"),
        (finding(0.01, rare=0.05), "not recovered by these attacks"),
        (finding(0.01, rare=None), "not recovered by these attacks"),
    ],
)
def test_words(made: Finding, word: str) -> None:
    assert word_of(made, FLOORS) == word


def test_the_worst_attacker_gives_the_verdict_and_nothing_found_is_no_proof() -> None:
    assert verdict_of([finding(0.01), finding(0.2), finding(0.16)], FLOORS, False).text.startswith("partly disclosed: 0.200")
    assert verdict_of([finding(0.01)], FLOORS, False).text.endswith("(not a proof)")
    sent = "labels are sent: text is disclosed"
    assert verdict_of([], FLOORS, True).text == sent
    for share in (0.01, 0.6):
        beside = verdict_of([finding(share)], FLOORS, False).text
        assert verdict_of([finding(share)], FLOORS, True) == Verdict("disclosed", f"{sent}; the states alone: {beside}")


def document(text: str, origin: str) -> Document:
    return Document((Segment(text, trained=True),), origin=origin)


def test_public_text_shares_neither_text_nor_file_with_the_client() -> None:
    own = [document("secret", "a.py:3"), document("other", "")]
    given = [document("secret", "b.py:1"), document("fine", "b.py:9"), document("near", "a.py:90"), document("loose", "")]
    assert [one.segments[0].text for one in apart(given, own)] == ["fine", "loose"]


def test_python_documentation_of_the_clients_own_is_left_out() -> None:
    own = list(PythonDocs(max_documents=60).documents())
    tokenizer = load_tokenizer("embedded")
    rows = public_text(tokenizer, own, 64, 4096, PythonDocs(max_documents=90))
    everything = public_text(tokenizer, [], 64, 4096, PythonDocs(max_documents=90))
    assert 0 < len(rows) < len(everything)
    with pytest.raises(DataError, match="client's own"):
        public_text(tokenizer, own, 64, 4096, PythonDocs(max_documents=60))


def test_rows_for_the_attacker_are_long_and_drawn_from_the_seed() -> None:
    rows = TokenRows.concatenate([random_rows(20, 8, 1), random_rows(3, 5, 2)])
    drawn = shuffled(rows, 6, 4)
    assert drawn.lengths.tolist() == [8] * 6
    assert drawn.ids.tolist() == shuffled(rows, 6, 4).ids.tolist() != shuffled(rows, 6, 5).ids.tolist()
    assert float(frequencies(rows, 96).sum()) == pytest.approx(1.0)


def test_notable_tokens_have_a_digit_or_a_capital() -> None:
    tokenizer = load_tokenizer("embedded")
    notable = notable_tokens(tokenizer, len(tokenizer))
    chosen = {text: bool(notable[number]) for text, number in tokenizer.get_vocab().items() if text in ("ĠThe", "Ġthe", "1", "the", "A")}
    assert chosen["ĠThe"]
    assert chosen["1"]
    assert chosen["A"]
    assert not chosen["Ġthe"]
    assert not chosen["the"]


@pytest.mark.parametrize(("field", "value"), [("sequences", 0), ("tokens", 3), ("seconds", 0.0), ("candidates", 1)])
def test_senseless_options_are_refused(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=field):
        replace(Options(), **{field: value})


def test_intervals_know_how_few_rows_there_are() -> None:
    few = (t_quantile(3) / 1.959963984540054) ** 2  # four rows
    assert clustered([5, 5, 5, 5], [10, 10, 10, 10]) == wilson(20 / few, 40 / few)
    assert clustered([0, 0, 0, 0], [10, 10, 10, 10]) == wilson(0, 40 / few)
    assert clustered([7], [10]) == wilson(0.7, 1)  # one row says nothing of how much rows differ
    assert clustered([], []) == clustered([0], [0]) == (0.0, 1.0)
    low, high = clustered([9, 3, 6, 6], [10, 10, 10, 10])
    assert low < wilson(24 / few, 40 / few)[0] < wilson(24 / few, 40 / few)[1] < high


def test_students_point_is_that_of_tables() -> None:
    for freedom, point in ((1, 12.7062), (3, 3.1824), (7, 2.3646), (11, 2.2010), (30, 2.0423), (1000, 1.9623)):
        assert t_quantile(freedom) == pytest.approx(point, abs=2e-3)


@pytest.mark.parametrize(("rows", "shape", "tokens"), [(4, (2, 3), 48), (4, (1, 9), 48), (12, (2, 3), 16)])
def test_intervals_of_rows_that_differ_cover_what_they_should(rows: int, shape: tuple[float, float], tokens: int) -> None:
    """Rows with shares of their own: the plain interval covers their mean far less often than 95 %."""
    draw, mean = np.random.default_rng(5), shape[0] / sum(shape)
    covered = {"clustered": 0, "plain": 0}
    for _ in range(600):
        hits = [int(draw.binomial(tokens, draw.beta(*shape))) for _ in range(rows)]
        for name, (low, high) in (("clustered", clustered(hits, [tokens] * rows)), ("plain", wilson(sum(hits), rows * tokens))):
            covered[name] += low <= mean <= high
    assert covered["plain"] < 0.85 * 600
    assert covered["clustered"] >= 0.92 * 600
