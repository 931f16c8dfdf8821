"""A text that is sent again with other noise is attacked as what it is: several looks at the same thing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from splitft.audit.base import Options
from splitft.audit.beam import listen
from splitft.audit.bottom import Bottom
from splitft.audit.run import audit, worst_by_cut
from splitft.audit.tap import MOST_PLAYED
from splitft.audit.visits import bank_of, own_tap
from splitft.compress.base import Codec
from splitft.compress.cast import Cast
from splitft.compress.feedback import Feedback
from splitft.compress.noise import Noise
from splitft.compress.projection import Projection
from splitft.compress.quantize import Quantize
from splitft.compress.residual import Residual
from splitft.compress.topk import TopK

from .scenes import adapted, scene

OPTIONS = Options(sequences=3, tokens=16, public_sequences=200, seconds=600.0, candidates=32, widest=32)


def test_the_mean_of_visits_has_the_noise_of_a_mean() -> None:
    _, _, case = scene()
    case = replace(case, settings=replace(case.settings, uplink=Noise(multiple=1.0)))
    hidden = Bottom(case.split, bank_of(case, case.adapters), 2).hidden(case.private)
    errors = {}
    for visits in (1, 4, 16):
        tap = own_tap(case, 2)
        tap.come_by(visits)
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
    multiple = 4.0 if isinstance(inner, Cast) else 2.0
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
    assert errors[8] < 0.95 * errors[1]  # of all that arrives, noise included
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


@pytest.mark.timeout(120)
def test_noise_both_ways_is_read_from_both_sides_and_from_every_visit() -> None:
    """Every visit's output is another, with another gradient: they add up all the same. And who has the states has the gradients too."""
    _, _, case = scene(True)
    noise = Noise(Cast("bfloat16"), multiple=4.0)
    short = replace(case, private=case.private[:, :16], trained=case.trained[:, :16])
    coded = replace(short, settings=replace(case.settings, uplink=noise, exit_uplink=noise))
    leaks = {}
    for visits in (1, 4):
        made = audit(coded, replace(OPTIONS, visits=visits)).cuts[0]
        seen = {"K": "first", "B": "first", "L": "first", "K+L": "first"}
        if visits > 1:
            seen = {"K": "mean of 4", "B": "mean of 4", "L": "4 visits", "K+L": "mean of 4"}
        assert {one.attacker: one.visit for one in made.findings} == seen
        leaks[visits] = {one.attacker: one.figures.accuracy for one in made.findings}
        worst = worst_by_cut(coded, (2,), replace(OPTIONS, visits=visits))[2]
        assert worst.attacker == "K+L", "a bound on leaks goes by who joins them"
    assert leaks[4]["L"] > leaks[1]["L"] + 0.1, leaks
    assert leaks[1]["K+L"] > max(leaks[1]["K"], leaks[1]["L"]) + 0.1, leaks


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("codec", "best"), [(Residual(TopK(share=0.02)), "later"), (Feedback(TopK(share=0.02)), "mean of 8")])
def test_what_a_codec_leaves_out_at_one_visit_comes_at_another(codec: Codec, best: str) -> None:
    _, _, case = scene()
    short = adapted(case, private=case.private[:2, :12], trained=case.trained[:2, :12])
    options = replace(OPTIONS, visits=8, public_sequences=100)
    known = audit(replace(short, settings=replace(case.settings, uplink=codec)), options).cuts[0]
    leaks = {one.visit: one.figures.accuracy for one in known.findings if one.attacker == "K"}
    assert set(leaks) == {"first", "later", "mean of 8"}
    assert leaks[best] == max(leaks.values())
    assert leaks[best] > leaks["first"] + 0.2, leaks


def test_a_mean_is_called_after_what_was_looked_at() -> None:
    """What rounds after the noise rounds otherwise every time: the mean of many visits is not rounded. Where visits are played one by
    one, no more are claimed than were."""
    _, _, case = scene()
    hidden = Bottom(case.split, bank_of(case, case.adapters), 2).hidden(case.private)
    errors = {}
    for inner, looked in ((Quantize(4), 256), (TopK(share=0.5), MOST_PLAYED)):
        tap = own_tap(replace(case, settings=replace(case.settings, uplink=Noise(inner, multiple=4.0))), 2)
        tap.come_by(256)
        assert tap.looked == looked
        errors[looked] = float(((tap.private(hidden) - hidden).norm(dim=-1) / hidden.norm(dim=-1)).mean())
    assert errors[256] == pytest.approx(4.0 / 16, rel=0.05)
    assert errors[MOST_PLAYED] > 0.3


def test_what_an_attacker_hears_of_the_wire_is_its_noise() -> None:
    """Noise in proportion to a row, and noise of one size: size and form are found on public text; a guess that is wrong raises doubt."""
    _, _, case = scene()
    bottom, ids = Bottom(case.split, None, 2), torch.from_numpy(case.public.batch(range(6))[0])
    for codec, by_length in ((Noise(multiple=0.5), True), (Noise(multiple=0.5, clip=1.0), False)):
        wire = listen(bottom, own_tap(replace(case, settings=replace(case.settings, uplink=codec)), 2), ids, None, codec.clip, 1 << 21)
        assert wire.by_length == by_length
        assert float(wire.size.mean()) == pytest.approx(0.5, rel=0.05)
    states = bottom.replay(ids)
    right, wrong = wire.doubted(states, wire.shortened(states)), wire.doubted(states.roll(1, 1), wire.shortened(states))
    assert torch.equal(right.size, wire.size)
    assert bool((wrong.size >= wire.size).all())


def test_a_tap_without_noise_is_used_once() -> None:
    _, _, case = scene()
    tap = own_tap(case, 2)
    tap.come_by(8)
    hidden = torch.randn(2, 5, case.split.hidden_size, generator=torch.Generator().manual_seed(0))
    tap.private(hidden)
    assert tap.private_streams[0].facts.get("packets", 1) == 1
    assert not tap.draws
