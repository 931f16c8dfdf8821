"""The audit attacks what leaves a bottleneck, with what each attacker knows of it."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from splitft.audit.base import Case, Options
from splitft.audit.bottom import Bottom
from splitft.audit.run import audit, worst_by_cut
from splitft.audit.tap import Tap
from splitft.bottleneck import begin, pair_of, principal
from splitft.compress.cast import Cast
from splitft.compress.noise import Noise
from splitft.split import Route

from .scenes import adapted, scene

OPTIONS = Options(sequences=3, tokens=32, seconds=40.0, public_sequences=600, widest=512)
CUT = 2


@lru_cache(maxsize=8)
def narrow(channels: int, turned: bool = False, exit_on_client: bool = False) -> Case:
    """The trained client with a bottleneck at its cut (and exit) as it begins; `turned`: other axes of the same space since, as training
    might leave them, which the public beginning does not tell."""
    case = adapted(scene()[2]) if not exit_on_client else scene(True)[2]
    split, width = case.split, case.split.hidden_size
    pairs = [pair_of("cut", CUT, width, channels)]
    if exit_on_client:
        pairs.append(pair_of("exit", split.blocks, width, channels))
    layout = case.layout.beside([matrix for pair in pairs for matrix in (pair.encoder, pair.decoder)])
    begun, now = layout.row(scene()[2].layout.factors(case.earlier)), layout.row(case.layout.factors(case.adapters))
    ids = torch.from_numpy(case.public.batch(range(60))[0])
    for pair in (layout.pair("cut", CUT), *([layout.pair("exit", split.blocks)] if exit_on_client else [])):
        with torch.no_grad():
            hidden = split.run(Route(len(ids), last=pair.encoder.boundary - 1), ids, None)
        mean, axes = principal([hidden], channels)
        begin(pair, begun, mean, axes)
        if turned:
            draw = torch.Generator().manual_seed(2)
            axes = torch.linalg.qr(torch.randn(channels, channels, generator=draw, dtype=torch.float64))[0] @ axes
        begin(pair, now, mean, axes)
    return replace(case, layout=layout, adapters=now, earlier=begun, begun=begun)


def found(case: Case, cut: int = CUT) -> float:
    return worst_by_cut(case, (cut,), OPTIONS)[cut].figures.accuracy


def test_fewer_channels_never_leak_more_and_under_noise_few_leak_little() -> None:
    width = scene()[2].split.hidden_size
    noisy = Noise(Cast("bfloat16"), 0.0, 0.5)
    leaks = [
        found(replace(case, settings=replace(case.settings, uplink=noisy))) for case in map(narrow, (width, width // 4, width // 16, 2))
    ]
    assert all(one >= other - 0.05 for one, other in pairwise(leaks)), leaks
    assert leaks[0] > 0.9, leaks
    assert leaks[-1] < 0.5, leaks


def test_two_channels_without_noise_are_enough_for_who_knows_the_pair() -> None:
    """Narrow is not private: a state of two exact numbers still tells which token made it."""
    assert found(narrow(2)) > 0.95


def test_only_the_few_channels_are_attacked() -> None:
    case, seen = narrow(16), set()

    class Watched(Tap):
        def private(self, hidden: Tensor, place: int = 0) -> Tensor:
            seen.add(("private", hidden.shape[-1]))
            return super().private(hidden, place)

        def public(self, hidden: Tensor, batch: int) -> Tensor:
            seen.add(("public", hidden.shape[-1]))
            return super().public(hidden, batch)

    audit(case, OPTIONS, (CUT,), lambda case, cut: Watched(case.settings, case.plan, cut), gradients=False)
    assert seen == {("private", 16), ("public", 16)}


def test_noise_in_place_of_what_leaves_gives_nothing() -> None:
    case = narrow(16)

    class Other(Tap):
        def private(self, hidden: Tensor, place: int = 0) -> Tensor:
            flat = hidden.reshape(-1, hidden.shape[-1])
            return flat.mean(0) + flat.std(0) * torch.randn(hidden.shape, generator=torch.Generator().manual_seed(3))

    made = audit(case, OPTIONS, (CUT,), lambda case, cut: Other(case.settings, case.plan, cut), gradients=False)
    chance = max(made.floors.chance, made.floors.language_model)
    assert all(one.figures.low <= chance for one in made.cuts[0].findings), [one.figures.accuracy for one in made.cuts[0].findings]


def test_who_knows_the_base_model_alone_does_not_know_the_trained_pair() -> None:
    channels = scene()[2].split.hidden_size // 4
    made = {turned: audit(narrow(channels, turned), OPTIONS, (CUT,), gradients=False).cuts[0] for turned in (False, True)}
    leaks = {turned: {who: one.best(who).figures.accuracy for who in ("K", "B")} for turned, one in made.items()}  # type: ignore[union-attr, arg-type]
    assert abs(leaks[True]["K"] - leaks[False]["K"]) < 0.1, f"other axes of the same space are all the same to who knows them: {leaks}"
    assert leaks[True]["B"] < leaks[False]["B"] - 0.2, leaks


def test_a_copy_of_the_blocks_gives_what_leaves_token_by_token() -> None:
    case = narrow(16)
    from splitft.audit.visits import bank_of

    bank = bank_of(case, case.adapters)
    whole, bottom = Bottom(case.split, bank, CUT), Bottom(case.split, bank, CUT, bank)
    codes, states = bottom.hidden(case.private), whole.hidden(case.private)
    matrix = case.layout.pair("cut", CUT).encoder.of(case.adapters)
    torch.testing.assert_close(codes, states @ matrix[:, :-1].T + matrix[:, -1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(bottom.replay(case.private), codes, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(bottom.at_cuts(case.private, [CUT])[CUT], codes)


@pytest.mark.parametrize(("share", "least"), [(1, 0.9), (4, 0.5)])
def test_labels_come_out_of_gradients_with_respect_to_a_bottleneck(share: int, least: float) -> None:
    case = narrow(scene()[2].split.hidden_size // share, exit_on_client=True)
    made = audit(case, OPTIONS, (CUT,))
    finding = made.cuts[0].best("L")
    assert finding is not None
    assert finding.figures.accuracy > least
