"""The sum is exact, whoever falls silent and whenever; too few left open nothing; small cohorts stay closed."""

from __future__ import annotations

import numpy as np
import pytest

from splitft.errors import ProtocolError
from splitft.secure.cohorts import openable
from splitft.secure.field import FixedPoint

from .scenes import PHASES, Played, even_terms, terms_of


def check_exact(played: Played, survivors: tuple[int, ...]) -> None:
    opened = played.opened()
    assert opened.survivors == survivors
    plain, integers = played.plain_sums(survivors), played.integer_sums(survivors)
    for number, cohort in enumerate(played.terms.cohorts):
        assert (number in opened.sums) == openable(cohort, survivors, 3)
        if number in opened.sums:
            assert opened.sums[number].tolist() == plain[number].tolist()
            columns = [column for start, stop in cohort.ranges for column in range(start, stop)]
            assert opened.sums[number].view(np.int64).tolist() == [integers[column] for column in columns]


@pytest.mark.parametrize("count", [3, 5, 10])
@pytest.mark.parametrize("phase", [*PHASES, "never"])
def test_sum_is_exact_with_any_number_of_drop_outs_in_any_phase(count: int, phase: str) -> None:
    threshold = count // 2 + 1
    for gone in range(count - threshold + 1 if phase != "never" else 1):
        silent = dict.fromkeys(range(0, 2 * gone, 2), phase) if 2 * gone <= count else dict.fromkeys(range(gone), phase)
        survivors = tuple(k for k in range(count) if k not in silent or phase in ("confirmations", "answers"))
        check_exact(Played(even_terms(count, threshold=threshold), gone, silent), survivors)


def test_drop_outs_of_every_phase_at_once() -> None:
    silent = {1: "keys", 9: "shares", 4: "inputs", 0: "inputs", 7: "confirmations", 2: "answers"}
    # 8 answers are the keys', shares' and inputs' survivors; four are left to unmask
    terms = even_terms(13, threshold=7)
    check_exact(Played(terms, 3, silent), tuple(k for k in range(13) if k not in (0, 1, 4, 9)))


@pytest.mark.timeout(60)
def test_fifty_clients_with_a_third_gone() -> None:
    silent = {client: PHASES[client % 3] for client in range(0, 48, 3)}
    check_exact(Played(even_terms(50, columns=7), 1, silent), tuple(k for k in range(50) if k not in silent))


@pytest.mark.parametrize("phase", PHASES)
def test_below_the_threshold_nothing_is_opened(phase: str) -> None:
    terms = even_terms(5, threshold=4)
    with pytest.raises(ProtocolError, match=r"of 3 clients; a sealing of 5 needs 4|2 clients"):
        Played(terms, silent={0: phase, 3: phase}).play()
    assert Played(terms, silent={3: phase}).opened().sums


MIXED = {0: ((0, 4),), 1: ((0, 9),), 2: ((0, 9),), 3: ((0, 9),), 4: ((0, 4), (12, 14))}


def test_mixed_cuts_open_every_column_with_enough_owners() -> None:
    owned = {**MIXED, 4: ((0, 4),)}
    terms = terms_of(owned, 9, threshold=3)
    assert [cohort.owners for cohort in terms.cohorts] == [(0, 1, 2, 3, 4), (1, 2, 3)]
    check_exact(Played(terms), (0, 1, 2, 3, 4))


def test_a_column_of_too_few_owners_is_refused() -> None:
    with pytest.raises(ProtocolError, match="a cohort of clients \\(4,\\)"):
        terms_of(MIXED, 14)


@pytest.mark.parametrize("phase", ["keys", "shares", "inputs"])
def test_a_cohort_that_shrinks_below_three_stays_closed_and_the_others_open(phase: str) -> None:
    terms = terms_of({**MIXED, 4: ((0, 4),)}, 9, threshold=3)
    played = Played(terms, silent={2: phase})
    check_exact(played, (0, 1, 3, 4))
    total, known = played.server.opened().values()
    assert known.tolist() == [True] * 4 + [False] * 5 + [True]
    assert not total[4:9].any()
    assert total[9] == sum(played.weights[client] for client in (0, 1, 3, 4))
    # Nobody gave away a share of the closed cohort's seeds: the server could not open it if it wished.
    for answer in played.server.answers.values():
        assert [len(shares) for _, shares in sorted(answer.seeds.items())] == [1, 1, 1, 1]


def test_a_mean_is_off_by_half_a_step_at_most() -> None:
    played = Played(even_terms(6, columns=200))
    total, _ = played.opened().values()
    exact = sum(np.float64(played.weights[k]) * played.rows[k].astype(np.float64) for k in range(6)) / sum(played.weights.values())
    assert np.abs(total[:-1] / total[-1] - exact).max() <= played.terms.number.step / 2 + 1e-15
    coarse = FixedPoint(8, 8, 10_000, 6)
    words = coarse.encode(played.rows[0], 3)
    assert 0 < np.abs(coarse.decode(words) / 3 - played.rows[0]).max() <= coarse.step / 2
