"""The attacks find the leaks that are there, none that are not, and less through more noise. On a really trained model."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from splitft.audit.base import Options
from splitft.audit.bottom import Bottom
from splitft.audit.gradient import NO_LABEL, client_step, read_labels
from splitft.audit.run import audit, worst_by_cut
from splitft.audit.tap import Span, Tap, along, directions_of
from splitft.audit.visits import bank_of
from splitft.compress.base import Codec
from splitft.compress.cast import Cast
from splitft.compress.error_bounded import ErrorBounded
from splitft.compress.identity import Identity
from splitft.compress.noise import Noise
from splitft.compress.projection import Projection
from splitft.compress.quantize import Quantize
from splitft.compress.residual import Residual
from splitft.types import IGNORE_LABEL
from splitft.wire import Stream

from .scenes import NoiseOnly, Noisy, adapted, scene

QUICK = Options(sequences=3, tokens=32, public_sequences=200, seconds=600.0)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("uplink", [Identity(), Quantize(8)], ids=["no codec", "int8"])
def test_a_known_adapter_gives_every_token_away_and_the_base_nearly_every(uplink: Codec) -> None:
    """P01 and P02, after a hundred steps on the client's text."""
    _, _, case = scene()
    made = audit(adapted(case, settings=replace(case.settings, uplink=uplink)), QUICK)
    assert made.seconds < 60
    known, base = made.cuts[0].best("K"), made.cuts[0].best("B")
    assert known is not None
    assert base is not None
    assert known.figures.accuracy == 1.0
    assert known.figures.exact == 1.0
    assert known.figures.rouge_l == 1.0
    assert known.unresolved == 0.0
    assert base.figures.accuracy >= 0.85
    assert "fused" in base.family
    assert torch.equal(made.cuts[0].found["K"], case.private)
    assert made.labels_sent
    assert made.verdict.text.startswith("labels are sent: text is disclosed; the states alone: disclosed: ")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("deviations", [0.0, 2.0])
def test_noise_in_place_of_the_text_gives_nothing(deviations: float) -> None:
    """P03: an attack that named tokens here would have invented them. At a noisy wire the language model guesses along."""
    _, _, case = scene()
    case = adapted(case, private=case.private[:, :16], trained=case.trained[:, :16])
    options = replace(QUICK, candidates=32)
    made = audit(case, options, open_tap=lambda one, cut: NoiseOnly(one, cut, deviations))
    assert {one.attacker for one in made.cuts[0].findings} == {"K", "B"}
    for finding in made.cuts[0].findings:
        assert max(finding.family.values()) <= 3 * made.floors.chance, finding.family
        assert finding.figures.exact == 0.0
        assert ("beam" in finding.family) == (deviations > 0)
    known = made.cuts[0].best("K")
    assert known is not None
    if not deviations:
        assert known.unresolved > 0.9  # no candidate gives what arrived, and the audit says so


@pytest.mark.timeout(120)
@pytest.mark.parametrize("way", ["noise per channel", "codec noise"])
def test_more_noise_never_leaks_more(way: str) -> None:
    """P05, best of the family at 0, 0.5, 1, 2 and 4 standard deviations of a channel, or root mean squares of a row in the run's codec."""
    _, _, case = scene()
    case = adapted(case, private=case.private[:, :12], trained=case.trained[:, :12])
    options = replace(QUICK, tokens=12, candidates=32)
    leaks = []
    for deviations in (0.0, 0.5, 1.0, 2.0, 4.0):
        if way == "codec noise":
            coded = replace(case.settings, uplink=Noise(Identity(), multiple=deviations))
            made = audit(replace(case, settings=coded), options)
        else:
            made = audit(case, options, open_tap=lambda one, cut, much=deviations: Noisy(one, cut, much))
        found = [made.cuts[0].best(attacker) for attacker in ("K", "B")]
        leaks.append(max(one.figures.accuracy for one in found if one is not None))
    assert leaks[0] == 1.0
    assert all(after <= before + 0.03 for before, after in pairwise(leaks)), leaks
    assert min(leaks[:2]) > 0.9, leaks  # little noise hides little from a tuned attacker
    assert leaks[-1] < 0.7, leaks


@pytest.mark.timeout(60)
def test_the_verdict_without_labels_and_two_runs_alike() -> None:
    _, _, case = scene(True)
    options = QUICK
    first, second = (audit(case, options) for _ in range(2))
    assert not first.labels_sent
    assert first.verdict.word == "disclosed"
    assert {one.attacker for one in first.cuts[0].findings} == {"K", "B", "L"}
    for one, other in zip(first.cuts[0].findings, second.cuts[0].findings, strict=True):
        assert replace(one, seconds=0.0) == replace(other, seconds=0.0)
    label = first.cuts[0].best("L")
    assert label is not None
    assert label.figures.accuracy == 1.0
    assert label.figures.tokens == int(case.trained[:, 1:].sum())


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("tail_blocks", "known", "least"), [(0, False, 1.0), (1, False, 0.7), (1, True, 1.0)])
def test_labels_come_out_of_returned_gradients(tail_blocks: int, known: bool, least: float) -> None:
    """P04: exact with the head alone and with a known tail; through a private block mostly."""
    _, _, case = scene(True)
    case = adapted(case, plan=replace(case.plan, tail_blocks=tail_blocks), private=case.private[:2], trained=case.trained[:2])
    bank = bank_of(case, case.adapters)
    returned = client_step(case, bank, 2)
    end = case.split.blocks - tail_blocks
    read = read_labels(case.split, bank if known else None, end, [returned], float("inf"))
    found, reached = read.found, read.reached
    counted = returned.labels != IGNORE_LABEL
    assert reached == found.shape[1]
    assert float((found == returned.labels)[counted].double().mean()) >= least
    assert bool((found[:, -1] == NO_LABEL).all())  # nothing follows the last token


@pytest.mark.timeout(60)
def test_untrained_positions_have_no_label_to_find() -> None:
    _, _, case = scene(True)
    trained = case.trained.clone()
    trained[:, 5:12] = False
    case = replace(case, trained=trained)
    returned = client_step(case, bank_of(case, case.adapters), 2)
    found = read_labels(case.split, None, case.split.blocks, [returned], float("inf")).found
    counted = returned.labels != IGNORE_LABEL
    assert not bool(counted[:, 4:11].any())
    assert torch.equal(found[counted], returned.labels[counted])
    assert bool((found[~counted] == NO_LABEL).all())


@pytest.mark.timeout(60)
def test_a_codec_that_remembers_is_attacked_on_a_later_visit_too() -> None:
    _, _, case = scene()
    coded = replace(case.settings, uplink=Residual(ErrorBounded(bound=0.125), ignore=0.2))
    made = audit(adapted(case, settings=coded), QUICK)
    visits = {one.visit: one.figures.accuracy for one in made.cuts[0].findings if one.attacker == "K"}
    assert set(visits) == {"first", "later"}
    assert min(visits.values()) >= 0.95
    assert 0.01 < made.cuts[0].wire_error < 0.5


def test_a_later_visit_is_not_the_first_again() -> None:
    """What arrives of a text whose states have moved differs from what arrived before, by no more than the codec's errors."""
    _, _, case = scene()
    coded = replace(case.settings, uplink=Residual(ErrorBounded(bound=0.125), ignore=0.2))
    tap = Tap(coded, case.plan, 2)
    assert tap.remembers
    before = Bottom(case.split, None, 2).hidden(case.private)
    now = Bottom(case.split, bank_of(case, adapted(case).adapters), 2).hidden(case.private)
    first, later = tap.private(before), tap.private(now)
    fresh = Tap(coded, case.plan, 2).private(now)
    assert not torch.equal(first, later)
    assert not torch.equal(later, fresh)


@pytest.mark.timeout(60)
def test_cuts_together_and_the_function_for_policies() -> None:
    _, _, case = scene()
    options = QUICK
    leaks = worst_by_cut(adapted(case), [1, 3], options)
    assert list(leaks) == [1, 3]
    assert {(one.cut, one.attacker, one.figures.accuracy) for one in leaks.values()} == {(1, "K", 1.0), (3, "K", 1.0)}


@pytest.mark.timeout(60)
def test_without_a_cache_the_findings_are_the_same() -> None:
    _, _, case = scene()
    ids = torch.from_numpy(case.public.batch(range(2))[0])[:, :8]
    cached, plain = (Bottom(case.split, bank_of(case, adapted(case).adapters), 3) for _ in range(2))
    plain.cached = False
    first, second = cached.replay(ids), plain.replay(ids)
    assert cached.cached
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-4)
    candidates = torch.tensor([[5, 9, 30], [8, 2, 77]])
    found = []
    for one in (cached, plain):
        prefix = one.start(2)
        for place in range(4):
            prefix, _ = one.extend(prefix, ids[:, place])
        found.append(one.try_(prefix, candidates))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)


@pytest.mark.timeout(60)
def test_too_little_time_is_kept_and_said() -> None:
    _, _, case = scene()
    made = audit(case, replace(QUICK, seconds=1e-6))
    known = made.cuts[0].best("K")
    assert known is not None
    assert known.positions < 32
    assert any("positions verified in the time given" in note for note in made.notes)
    assert made.cuts[0].public_sequences < 200


def test_a_wrong_prefix_does_not_pass_for_the_right_one() -> None:
    """The twin: an attacker with another adapter finds no state that fits, so a fit means something."""
    _, _, case = scene()
    wrong = case.layout.initial_row(5)
    wrong += 0.3 * torch.randn(wrong.shape, generator=torch.Generator().manual_seed(1))
    known = bank_of(case, adapted(case).adapters)
    right, other = (Bottom(case.split, bank, 2).hidden(case.private) for bank in (known, bank_of(case, wrong)))
    distance = (right - other).norm(dim=-1) / right.norm(dim=-1)
    assert float(distance.min()) > 1e-3


class Narrow(Tap):
    """Sends and receives states in bfloat16, as a model of that kind does."""

    def _carry(self, stream: Stream, tensor: Tensor, first: int = 0, scaled: bool = False) -> Tensor:
        return super()._carry(stream, tensor.bfloat16(), first, scaled)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("states", ["float32", "bfloat16"])
@pytest.mark.parametrize("inner", [Identity(), Cast("bfloat16")], ids=["exact coordinates", "cast coordinates"])
@pytest.mark.parametrize("noise", [0.0, 0.5], ids=["no noise", "noise"])
def test_few_axes_hide_nothing_from_who_has_the_axes(monkeypatch: pytest.MonkeyPatch, states: str, inner: Codec, noise: float) -> None:
    """A guess is compared along the axes that were sent; compared along all, the right one differs by what was left out."""
    _, _, case = scene()
    codec: Codec = Projection(inner, dimensions=case.split.hidden_size // 8)
    if noise:
        codec = Noise(codec, multiple=noise)
    coded = adapted(case, private=case.private[:, :20], trained=case.trained[:, :20])
    coded = replace(coded, settings=replace(case.settings, uplink=codec))

    kind = Narrow if states == "bfloat16" else Tap

    def leak() -> float:
        made = audit(coded, QUICK, gradients=False, open_tap=lambda one, cut: kind(one.settings, one.plan, cut))
        return max(one.figures.accuracy for one in made.cuts[0].findings if one.attacker == "K")

    along_the_axes = leak()
    monkeypatch.setattr("splitft.audit.visits.directions_of", lambda arrived: None)
    along_all = leak()
    assert along_all < 0.8 * along_the_axes if not noise else along_all <= along_the_axes, (along_all, along_the_axes)
    assert along_the_axes >= (0.9 if not noise else 0.3), along_the_axes


@pytest.mark.timeout(60)
def test_a_wrong_guess_at_directions_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Directions that are no more than a guess: whole states are compared too, and the better of the two counts."""
    _, _, case = scene()
    case = adapted(case)

    def wrong(arrived: Tensor) -> Span:
        return Span(torch.linalg.qr(torch.randn(arrived.shape[-1], 2, generator=torch.Generator().manual_seed(1))).Q.T, False)

    monkeypatch.setattr("splitft.audit.visits.directions_of", wrong)
    known = audit(case, replace(QUICK, tokens=12), gradients=False).cuts[0].best("K")
    assert known is not None
    assert known.figures.accuracy == 1.0
    assert known.family["exact, own axes, all directions"] > known.family["exact"]


def test_the_directions_of_what_arrived() -> None:
    draw = torch.Generator().manual_seed(3)
    axes = torch.linalg.qr(torch.randn(32, 5, generator=draw)).Q.T
    few = torch.randn(4, 12, 5, generator=draw) @ axes
    found = directions_of(few)
    assert found is not None
    assert found.exact
    assert found.axes.shape == (5, 32)
    torch.testing.assert_close(along(few, found.axes), few, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(along(torch.eye(32), found.axes), axes.T @ axes, rtol=1e-4, atol=1e-4)
    assert directions_of(torch.randn(4, 12, 32, generator=draw)) is None  # nothing was left out
    assert directions_of(torch.randn(2, 5, 32, generator=draw)) is None  # no more directions than rows says nothing
    assert directions_of(torch.zeros(2, 5, 32)) is None


@pytest.mark.parametrize("large", [1.0, 300.0])
def test_directions_are_found_under_rounding_of_any_size(large: float) -> None:
    """States in bfloat16, of which one channel may be far larger than all others, as in trained models."""
    draw = torch.Generator().manual_seed(3)
    axes = torch.linalg.qr(torch.randn(32, 5, generator=draw)).Q.T
    size = torch.ones(32)
    size[7] = large
    decay = torch.logspace(0, -1, 5)
    few = ((torch.randn(4, 12, 5, generator=draw) * decay) @ axes * size).bfloat16().float()
    found = directions_of(few)
    assert found is not None
    assert not found.exact
    assert found.axes.shape == (5, 32)
    torch.testing.assert_close(along(few, found.axes) / size, few / size, rtol=0.0, atol=0.02)
    strong = torch.randn(4, 12, 32, generator=draw) * torch.logspace(0, -4, 32) * size + 50 * size
    assert directions_of(strong) is None  # channels of very different size, and a mean above all of them
    rotated = torch.randn(4, 40, 32, generator=draw) * torch.logspace(0, -3, 32) @ torch.linalg.qr(torch.randn(32, 32, generator=draw)).Q
    assert directions_of(rotated) is None  # axes of very different size that end nowhere


def test_real_states_end_nowhere() -> None:
    _, _, case = scene()
    for cut in (1, 2, 4):
        assert directions_of(Bottom(case.split, bank_of(case, adapted(case).adapters), cut).hidden(case.private)) is None


def test_who_has_other_weights_learns_along_axes_of_public_text_too() -> None:
    """The axes were fitted to the private text; which public text is the better guide to them differs by model, so B tries both."""
    _, _, case = scene()
    case = adapted(case, private=case.private[:, :20], trained=case.trained[:, :20])
    coded = replace(case, settings=replace(case.settings, uplink=Projection(Identity(), dimensions=case.split.hidden_size // 8)))
    cut = audit(coded, QUICK, gradients=False).cuts[0]
    known, base = cut.best("K"), cut.best("B")
    assert known is not None
    assert base is not None
    assert {name.partition(",")[2] for name in base.family} == {"", " own axes", " own axes, all directions"}
    assert base.figures.accuracy == max(base.family.values())
    assert base.figures.accuracy > base.family["ridge"]
    assert set(known.family) == {"ridge", "exact"}, "every position had a candidate within the wire's error: nothing else is tried"
