"""Fleets: who gets which device, what a file may say, and how often devices are away, lost or slow."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitft.adapt import fleets
from splitft.adapt.fleets import FLEETS, Device, Tier, available, draw_fleet, lost_after, slowed
from splitft.adapt.profiles import PRESETS
from splitft.errors import ConfigError
from splitft.types import Profile

PHONE = PRESETS["phone"]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "fleet.toml"


def origins(devices: tuple[Device, ...]) -> list[str]:
    return [device.profile.name.rsplit("-", 1)[0] for device in devices]


@pytest.mark.parametrize("name", FLEETS)
def test_presets_add_up_and_let_everybody_take_part(name: str) -> None:
    tiers = FLEETS[name]
    assert sum(tier.share for tier in tiers) == pytest.approx(1)
    assert all(tier.count == 0 and tier.availability == 1 and tier.dropout == 0 for tier in tiers)
    assert all(tier.profile in PRESETS for tier in tiers)
    assert f"    {name} " in (fleets.__doc__ or "")
    devices = draw_fleet(name, 40, 1, PRESETS)
    assert available(devices, 1, 1) == [True] * 40
    assert {lost_after(device, 0, 1, 1, 5) for device in devices} == {None}


@pytest.mark.parametrize("name", FLEETS)
@pytest.mark.parametrize("clients", [1, 2, 7, 128])
def test_names_are_unique_and_readable_and_the_draw_is_reproducible(name: str, clients: int) -> None:
    devices = draw_fleet(name, clients, 5, PRESETS)
    assert devices == draw_fleet(name, clients, 5, PRESETS)
    names = [device.profile.name for device in devices]
    assert len(set(names)) == clients
    assert [int(one.rsplit("-", 1)[1]) for one in names] == list(range(clients))
    assert all(one.rsplit("-", 1)[0] in PRESETS for one in names)
    assert len({len(one.rsplit("-", 1)[1]) for one in names}) == 1


def test_another_seed_draws_another_fleet_with_the_same_tiers() -> None:
    first, second = (draw_fleet("long_tail", 20, seed, PRESETS) for seed in (1, 2))
    assert origins(first) == origins(second)
    assert all(one.profile.flops_per_s != other.profile.flops_per_s for one, other in zip(first, second, strict=True))


def test_uniform_is_uniform() -> None:
    (device,) = set(draw_fleet("uniform", 1, 1, PRESETS))
    assert device.profile == Profile("laptop-00", *[getattr(PRESETS["laptop"], field) for field in fleets_numbers()])
    assert len({d.profile.flops_per_s for d in draw_fleet("uniform", 9, 1, PRESETS)}) == 1


def fleets_numbers() -> tuple[str, ...]:
    return ("flops_per_s", "memory_bytes", "uplink_bytes_per_s", "downlink_bytes_per_s", "latency_s")


def test_two_tiers_alternate_and_are_as_far_apart_as_the_page_says() -> None:
    devices = draw_fleet("two_tier", 5, 3, PRESETS)
    assert origins(devices) == ["desktop", "phone", "desktop", "phone", "desktop"]
    assert set(origins(draw_fleet("two_tier", 2, 3, PRESETS))) == {"desktop", "phone"}
    fast, slow = devices[0].profile, devices[1].profile
    assert fast.flops_per_s / slow.flops_per_s == 16
    assert fast.uplink_bytes_per_s / slow.uplink_bytes_per_s == pytest.approx(8.4, abs=0.1)
    assert len({device.profile.flops_per_s for device in devices}) == 2


def test_the_long_tail_is_long_and_slow() -> None:
    devices = draw_fleet("long_tail", 400, 0, PRESETS)
    seconds = sorted(1 / device.profile.flops_per_s for device in devices)
    median = statistics.median(seconds)
    assert 0.8 < median * PHONE.flops_per_s < 1.2
    assert statistics.mean(seconds) > 1.1 * median
    assert seconds[-1] / median > median / seconds[0], "the tail is on the slow side"
    assert seconds[int(0.95 * 400)] > 2 * median
    # Nine in ten ordinary phones lie within the factors the page gives.
    phones = [d.profile for d, tier in zip(devices, deal(FLEETS["long_tail"], 400), strict=True) if tier == 0]
    for field, factor in (("flops_per_s", 2.3), ("uplink_bytes_per_s", 3.2)):
        inside = sum(1 / factor < getattr(p, field) / getattr(PHONE, field) < factor for p in phones)
        assert 0.85 < inside / len(phones) < 0.95


def deal(tiers: tuple[Tier, ...], clients: int) -> list[int]:
    return fleets._deal(fleets._sizes(tiers, clients, "here"))


def test_uplink_and_downlink_are_slow_together_and_apart_from_speed() -> None:
    devices = [d.profile for d in draw_fleet("long_tail", 60, 0, PRESETS)]
    ratios = {round(p.uplink_bytes_per_s / p.downlink_bytes_per_s, 9) for p in devices if p.name.startswith("phone")}
    assert len(ratios) == 1
    speed = [math.log(p.flops_per_s) for p in devices if p.name.startswith("phone")]
    link = [math.log(p.uplink_bytes_per_s) for p in devices if p.name.startswith("phone")]
    assert abs(statistics.correlation(speed, link)) < 0.6


@given(st.lists(st.integers(1, 20), min_size=1, max_size=5), st.integers(1, 60))
def test_shares_are_met_by_largest_remainder(parts: list[int], clients: int) -> None:
    tiers = tuple(Tier("phone", share=part / sum(parts)) for part in parts)
    sizes = fleets._sizes(tiers, clients, "here")
    assert sum(sizes) == clients
    exact = [clients * part / sum(parts) for part in parts]
    assert all(abs(size - want) < 1 for size, want in zip(sizes, exact, strict=True))
    raised = [want % 1 for size, want in zip(sizes, exact, strict=True) if size > want + 1e-9]
    left = [want % 1 for size, want in zip(sizes, exact, strict=True) if size < want - 1e-9]
    assert not raised or not left or min(raised) >= max(left) - 1e-9
    assert Counter(fleets._deal(sizes)) == Counter({index: size for index, size in enumerate(sizes) if size})


def test_a_rare_tier_stands_in_the_middle_not_in_front() -> None:
    assert fleets._deal([1, 3]) == [1, 0, 1, 1]
    assert fleets._deal([1, 4, 2]) == [1, 2, 1, 0, 1, 2, 1]


@given(st.integers(1, 30), st.integers(1, 30))
def test_tiers_are_mixed_evenly(first: int, second: int) -> None:
    """Any beginning of the line holds each tier within one of its share."""
    line = fleets._deal([first, second])
    for length in range(1, len(line) + 1):
        assert abs(line[:length].count(0) - length * first / (first + second)) <= 1


def test_a_file_gives_counts_shares_and_every_field(file: Path) -> None:
    file.write_text(
        '[[tier]]\nprofile = "desktop"\ncount = 1\n'
        '[[tier]]\nprofile = "ward"\nshare = 0.75\nspeed_factor = 2\nlink_factor = 0.5\navailability = 0.9\ndropout = 0.05\njitter = 0.1\n'
        '[[tier]]\nprofile = "phone"\nshare = 0.25\nspeed_spread = 0.4\nmemory_spread = 0.1\nlink_spread = 0.5\n'
    )
    ward = Profile("ward", 1e12, 8e9, 1e6, 2e6, 0.0)
    devices = draw_fleet(str(file), 9, 1, {**PRESETS, "ward": ward})
    assert Counter(origins(devices)) == {"desktop": 1, "ward": 6, "phone": 2}
    one = next(device for device in devices if device.profile.name.startswith("ward"))
    assert (one.profile.flops_per_s, one.profile.uplink_bytes_per_s, one.profile.downlink_bytes_per_s) == (2e12, 5e5, 1e6)
    assert (one.availability, one.dropout, one.jitter) == (0.9, 0.05, 0.1)
    assert (one.profile.memory_bytes, one.profile.latency_s) == (8e9, 0.0)
    phone = next(device for device in devices if device.profile.name.startswith("phone"))
    assert phone.profile.memory_bytes != PHONE.memory_bytes


def test_a_profile_of_ones_own_replaces_the_presets(file: Path) -> None:
    own = Profile("phone", 1.0, 2.0, 3.0, 4.0, 5.0)
    devices = draw_fleet("two_tier", 2, 1, {**PRESETS, "phone": own})
    assert devices[1].profile == Profile("phone-01", 1.0, 2.0, 3.0, 4.0, 5.0)


def test_counts_that_do_not_suit_the_run_are_refused(file: Path) -> None:
    file.write_text('[[tier]]\nprofile = "phone"\ncount = 3\n')
    assert len(draw_fleet(str(file), 3, 1, PRESETS)) == 3
    for clients in (2, 4):
        with pytest.raises(ConfigError, match=rf"counts 3 clients, this run has {clients}"):
            draw_fleet(str(file), clients, 1, PRESETS)


def test_every_problem_of_a_file_is_reported(file: Path) -> None:
    file.write_text(
        "seed = 1\n"
        '[[tier]]\nprofile = "phoen"\nshare = 0.5\nspeed_spred = 0.1\n'
        "[[tier]]\nshare = 0.5\ncount = 2\navailability = 0\ndropout = 1.5\n"
        '[[tier]]\nprofile = "phone"\njitter = "much"\nlink_spread = -1\n'
        '[[tier]]\nprofile = "phone"\ncount = 1.0\nspeed_factor = nan\n'
    )
    with pytest.raises(ConfigError, match=r"fleet\.toml: .*\(\d+ problems\)") as caught:
        draw_fleet(str(file), 5, 1, PRESETS)
    problems = "\n".join(caught.value.problems)
    for part in (
        "seed is not known at the top of a fleet",
        "tier 1: profile is 'phoen'; known: desktop",
        "did you mean 'phone'?",
        "tier 1 has no field 'speed_spred'",
        "did you mean 'speed_spread'?",
        "tier 2: profile is missing",
        "tier 2 needs either share or count, not both",
        "tier 2: availability is 0; allowed are numbers above 0 to 1",
        "tier 2: dropout is 1.5; allowed are numbers from 0 to 1",
        "tier 3: jitter is 'much'; allowed are numbers from 0 to 2",
        "tier 3: link_spread is -1",
        "tier 3 needs either share or count",
        "tier 4: count is 1.0; allowed are whole numbers from 1",
        "tier 4: speed_factor is nan",
    ):
        assert part in problems


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"there is no \[\[tier\]\]"),
        ("tier = 3\n", r"there is no \[\[tier\]\]"),
        ('[tier]\nprofile = "phone"\n', r"there is no \[\[tier\]\]"),
        ('[[tier]]\nprofile = "phone"\nshare = 0.5\n', r"shares add up to 0\.5; allowed is 1"),
        ("[[tier]\n", r"fleet\.toml:1:"),
    ],
)
def test_broken_files_are_named(file: Path, text: str, message: str) -> None:
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        draw_fleet(str(file), 3, 1, PRESETS)


def test_an_unknown_fleet_names_the_nearest_and_a_missing_file_is_named(file: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown fleet 'twotier'; known: uniform, .*did you mean 'two_tier'\?"):
        draw_fleet("twotier", 3, 1, PRESETS)
    with pytest.raises(ConfigError, match=r"Cannot read .*fleet\.toml"):
        draw_fleet(str(file), 3, 1, PRESETS)
    with pytest.raises(ConfigError, match="unknown device profile 'laptop'"):
        draw_fleet("uniform", 3, 1, {"phone": PHONE})


def within(successes: int, trials: int, chance: float) -> bool:
    """Within five standard deviations of a binomial count: a right draw fails once in two million seeds, a wrong one nearly always."""
    return abs(successes - trials * chance) <= 5 * math.sqrt(trials * chance * (1 - chance))


@pytest.mark.parametrize("chance", [0.1, 0.5, 0.93])
def test_availability_comes_out_as_asked(chance: float) -> None:
    devices = [Device(PHONE, availability=chance)] * 40
    draws = [available(devices, 3, round_index) for round_index in range(50)]
    assert within(sum(map(sum, draws)), 2000, chance)
    assert all(within(sum(row[client] for row in draws), 50, chance) for client in range(40))
    assert draws[7] == available(devices, 3, 7)
    assert draws[7] != available(devices, 4, 7)
    assert draws[7] != available(devices, 3, 7, attempt=1)


def test_a_client_is_there_or_not_whoever_else_is_in_the_fleet() -> None:
    many = [Device(PHONE, availability=0.5)] * 30
    assert available(many[:10], 1, 4) == available(many, 1, 4)[:10]


@pytest.mark.parametrize("chance", [0.05, 0.4, 1.0])
def test_losses_come_out_as_asked_at_any_step_alike(chance: float) -> None:
    device = Device(PHONE, dropout=chance)
    ends = [lost_after(device, client, 2, round_index, 4) for client in range(40) for round_index in range(50)]
    lost = [end for end in ends if end is not None]
    assert within(len(lost), 2000, chance)
    assert set(lost) == {0, 1, 2, 3}
    assert all(within(lost.count(step), len(lost), 0.25) for step in range(4))
    again = [lost_after(device, client, 2, round_index, 4) for client in range(40) for round_index in range(50)]
    assert again == ends
    assert [lost_after(device, client, 9, round_index, 4) for client in range(40) for round_index in range(50)] != ends
    assert lost_after(Device(PHONE, dropout=1.0), 0, 1, 1, 1) == 0


def test_jitter_has_median_one_and_the_spread_asked_for() -> None:
    drawn = [slowed(PHONE, 0.3, client, 1, round_index) for client in range(20) for round_index in range(50)]
    speed = [math.log(one.flops_per_s / PHONE.flops_per_s) for one in drawn]
    link = [math.log(one.uplink_bytes_per_s / PHONE.uplink_bytes_per_s) for one in drawn]
    for values in (speed, link):
        assert abs(statistics.mean(values)) < 5 * 0.3 / math.sqrt(1000)
        assert statistics.stdev(values) == pytest.approx(0.3, rel=0.12)
    assert abs(statistics.correlation(speed, link)) < 0.16
    for one, log in zip(drawn, link, strict=True):
        assert math.log(one.downlink_bytes_per_s / PHONE.downlink_bytes_per_s) == pytest.approx(log)
        assert (one.name, one.memory_bytes, one.latency_s) == (PHONE.name, PHONE.memory_bytes, PHONE.latency_s)


def test_jitter_is_of_the_client_the_round_and_the_seed() -> None:
    assert slowed(PHONE, 0.0, 1, 2, 3) == PHONE
    base = slowed(PHONE, 0.5, 1, 2, 3)
    assert base == slowed(PHONE, 0.5, 1, 2, 3)
    assert len({base, slowed(PHONE, 0.5, 2, 2, 3), slowed(PHONE, 0.5, 1, 3, 3), slowed(PHONE, 0.5, 1, 2, 4)}) == 4
