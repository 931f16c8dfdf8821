"""A text that is sent again with other noise is attacked as what it is: several looks at the same thing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from splitft.audit.base import Options
from splitft.audit.bottom import Bottom
from splitft.audit.run import audit, bank_of, own_tap, worst_by_cut
from splitft.compress.cast import Cast
from splitft.compress.noise import Noise
from splitft.compress.projection import Projection
from splitft.compress.quantize import Quantize

from .scenes import adapted, scene

OPTIONS = Options(sequences=3, tokens=16, public_sequences=200, seconds=600.0, candidates=32, widest=32)


def test_the_mean_of_visits_has_the_noise_of_a_mean() -> None:
    _, _, case = scene()
    case = replace(case, settings=replace(case.settings, uplink=Noise(multiple=1.0)))
    hidden = Bottom(case.split, bank_of(case, case.adapters), 2).hidden(case.private)
    errors = {}
    for visits in (1, 4, 16):
        tap = own_tap(case, 2)
        tap.visits = visits
        errors[visits] = {
            "private": float((tap.private(hidden) - hidden).square().mean().sqrt()),
            "public": float((tap.public(hidden, 3) - hidden).square().mean().sqrt()),
        }
    for way in ("private", "public"):
        assert errors[4][way] / errors[1][way] == pytest.approx(1 / 2, rel=0.05)
        assert errors[16][way] / errors[1][way] == pytest.approx(1 / 4, rel=0.05)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("inner", [Cast("bfloat16"), Projection(Cast("bfloat16"), dimensions=16)], ids=["all channels", "few axes"])
def test_more_visits_leak_more_through_noise(inner: Cast | Projection) -> None:
    """The axes come with the first visit only, and serve all of them."""
    _, _, case = scene()
    multiple = 2.0 if isinstance(inner, Cast) else 1.5
    coded = adapted(case, private=case.private[:, :16], trained=case.trained[:, :16])
    coded = replace(coded, settings=replace(case.settings, uplink=Noise(inner, multiple=multiple)))
    leaks, errors = {}, {}
    for visits in (1, 8):
        made = audit(coded, replace(OPTIONS, visits=visits))
        known = made.cuts[0].best("K")
        assert known is not None
        assert made.visits == visits
        assert known.visit == ("first" if visits == 1 else "mean of 8")
        looked = "one is attacked" if visits == 1 else "the mean of 8 visits is attacked"
        assert any(looked in note for note in made.notes), made.notes
        leaks[visits], errors[visits] = known.figures.accuracy, made.cuts[0].wire_error
    assert errors[8] < 0.8 * errors[1]  # of all that arrives, noise included
    assert leaks[1] < 0.6, leaks
    assert leaks[8] > leaks[1] + 0.2, leaks
    assert worst_by_cut(coded, (2,), replace(OPTIONS, visits=8))[2].figures.accuracy == leaks[8]  # the bound looks as often


@pytest.mark.timeout(60)
def test_without_random_numbers_another_visit_says_nothing_new() -> None:
    _, _, case = scene()
    coded = adapted(case, settings=replace(case.settings, uplink=Quantize(8)))
    one, eight = (audit(coded, replace(OPTIONS, visits=visits)) for visits in (1, 8))
    assert one.visits == eight.visits == 1
    assert one.notes == eight.notes
    for first, second in zip(one.cuts[0].findings, eight.cuts[0].findings, strict=True):
        assert replace(first, seconds=0.0) == replace(second, seconds=0.0)


@pytest.mark.timeout(60)
def test_labels_come_out_of_the_mean_of_noisy_gradients() -> None:
    _, _, case = scene(True)
    coded = replace(case, settings=replace(case.settings, exit_uplink=Noise(Cast("bfloat16"), multiple=8.0)))
    leaks = {}
    for visits in (1, 8):
        label = audit(coded, replace(OPTIONS, visits=visits)).cuts[0].best("L")
        assert label is not None
        assert label.visit == ("first" if visits == 1 else "mean of 8")
        leaks[visits] = label.figures.accuracy
    assert leaks[8] > leaks[1] + 0.2, leaks


@pytest.mark.timeout(60)
def test_outputs_that_differ_have_gradients_that_are_not_averaged() -> None:
    _, _, case = scene(True)
    noise = Noise(Cast("bfloat16"), multiple=1.0)
    coded = replace(case, settings=replace(case.settings, uplink=noise, exit_uplink=noise))
    made = audit(coded, replace(OPTIONS, visits=4))
    assert {one.attacker: one.visit for one in made.cuts[0].findings} == {"K": "mean of 4", "B": "mean of 4", "L": "first"}


def test_a_tap_without_noise_is_used_once() -> None:
    _, _, case = scene()
    tap = own_tap(case, 2)
    tap.visits = 8
    hidden = torch.randn(2, 5, case.split.hidden_size, generator=torch.Generator().manual_seed(0))
    tap.private(hidden)
    assert tap.private_streams[0].facts.get("packets", 1) == 1
    assert not tap.draws
