"""Fleets: the devices of all clients drawn from a few tiers, and what befalls them round by round.

A preset is a table of tiers. The numbers are orders of magnitude chosen by us for comparing methods, not measurements of a population;
the profiles they start from are described in `adapt/profiles.py`. In every preset each client can take part in every round and none is
lost, so that methods are compared on the same participants; `clients.availability`, `clients.dropout` and `clients.speed_jitter` come
on top.

    uniform     Laptops, all alike: the fleet on which nothing needs adapting.
    two_tier    Half desktops on a good home line (twice the mean: 92 Mbit/s up), half phones on a mobile network: 16 times the
                speed, 8 times the uplink. Two sharp groups without spread, client by client in turn.
    long_tail   Phones and tablets as users bring them. 70 % phones around the preset (log-normal, sigma 0.5 in speed and 0.7 in
                the link: nine in ten within a factor of 2.3 and 3.2), 20 % tablets with less spread, 10 % old phones on a weak
                network (a third of speed and link). A log-normal speed makes the time of a step log-normal too: most devices near
                the median, a few several times as slow. Speeds waver from round to round (jitter 0.2) as devices warm up.
    cross_silo  Hospitals and their partners. Half have a server with one small GPU behind a firewall (links spread, sigma 0.5), a
                quarter a workstation GPU on a line of 100 Mbit/s, a quarter only a desktop without a GPU: a hundred times slower.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from splitft.adapt.profiles import find_profile
from splitft.errors import ConfigError
from splitft.rng import numpy_stream
from splitft.toml import nearest, read_toml
from splitft.types import Profile

SHARES_TOLERANCE = 0.01


@dataclass(frozen=True)
class Device:
    """One client's device. `availability`: chance that it can be drawn for a round; `dropout`: that it is lost in a round it takes part
    in; `jitter`: sigma of the log-normal factors on its speed and link from round to round."""

    profile: Profile
    availability: float = 1.0
    dropout: float = 0.0
    jitter: float = 0.0


@dataclass(frozen=True)
class Tier:
    """Devices of one kind: `count` of them exactly, or a `share` of the clients that counts leave.

    `speed_factor` and `link_factor` multiply the profile's flops/s and link rates. The spreads are sigmas of log-normal factors with
    median 1, drawn once per device: on flops/s, on memory, and (one factor) on both link rates.
    """

    profile: str
    share: float = 0.0
    count: int = 0
    speed_factor: float = 1.0
    link_factor: float = 1.0
    speed_spread: float = 0.0
    memory_spread: float = 0.0
    link_spread: float = 0.0
    availability: float = 1.0
    dropout: float = 0.0
    jitter: float = 0.0


FLEETS: Mapping[str, tuple[Tier, ...]] = {
    "uniform": (Tier("laptop", 1.0),),
    "two_tier": (Tier("desktop", 0.5, link_factor=2.0), Tier("phone", 0.5)),
    "long_tail": (
        Tier("phone", 0.7, speed_spread=0.5, memory_spread=0.2, link_spread=0.7, jitter=0.2),
        Tier("tablet", 0.2, speed_spread=0.3, memory_spread=0.2, link_spread=0.4, jitter=0.2),
        Tier("phone", 0.1, speed_factor=0.33, link_factor=0.33, speed_spread=0.5, memory_spread=0.2, link_spread=0.7, jitter=0.2),
    ),
    "cross_silo": (
        Tier("hospital-server", 0.5, link_spread=0.5),
        Tier("workstation-gpu", 0.25, link_factor=0.1),
        Tier("desktop", 0.25, link_factor=2.0, link_spread=0.5),
    ),
}

_FIELDS = tuple(field.name for field in fields(Tier))
# What a file may give: (least, most, whether the least itself is allowed).
_BOUNDS: Mapping[str, tuple[float, float, bool]] = {
    "share": (0.0, 1.0, False),
    "speed_factor": (0.0, 1e6, False),
    "link_factor": (0.0, 1e6, False),
    "speed_spread": (0.0, 3.0, True),
    "memory_spread": (0.0, 3.0, True),
    "link_spread": (0.0, 3.0, True),
    "availability": (0.0, 1.0, False),
    "dropout": (0.0, 1.0, True),
    "jitter": (0.0, 2.0, True),
}


def draw_fleet(name_or_path: str, clients: int, seed: int, known: Mapping[str, Profile]) -> tuple[Device, ...]:
    """One device per client, from a preset or a TOML file (its name ends in .toml) of tiers:

        [[tier]]
        profile = "phone"        # a preset, or from clients.profiles_file
        share = 0.9              # or count = 9
        speed_spread = 0.4       # any other field of `Tier`
        dropout = 0.05

    Tiers get their clients by largest remainder and are mixed evenly, so that the first few clients already show every larger tier.
    A drawn profile is named after its origin and its client: `phone-03`. Raises ConfigError with every problem of a file, for
    an unknown name, and for counts that do not suit `clients`.
    """
    tiers = _tiers(name_or_path, known)
    width = max(2, len(str(clients - 1)))
    devices = []
    for client, index in enumerate(_deal(_sizes(tiers, clients, name_or_path))):
        tier = tiers[index]
        profile = _drawn(tier, find_profile(tier.profile, known), seed, client)
        device = Device(replace(profile, name=f"{tier.profile}-{client:0{width}d}"), tier.availability, tier.dropout, tier.jitter)
        devices.append(device)
    return tuple(devices)


def available(devices: Sequence[Device], seed: int, round_index: int, attempt: int = 0) -> list[bool]:
    """Which clients can be drawn for a round. When too few can, ask again with the next `attempt`: an independent draw."""
    return [
        device.availability >= 1.0 or float(numpy_stream(seed, "availability", client, round_index, attempt).random()) < device.availability
        for client, device in enumerate(devices)
    ]


def lost_after(device: Device, client: int, seed: int, round_index: int, steps: int) -> int | None:
    """None if the client stays to the end of the round; otherwise how many of its `steps` it finished before it was lost, 0..steps - 1,
    each equally likely."""
    if device.dropout <= 0.0:
        return None
    stream = numpy_stream(seed, "dropout", client, round_index)
    if float(stream.random()) >= device.dropout:
        return None
    return int(stream.integers(0, max(1, steps)))


def slowed(profile: Profile, jitter: float, client: int, seed: int, round_index: int) -> Profile:
    """The device as it is in this round: one log-normal factor with median 1 and sigma `jitter` on flops/s, and independently one on
    both link rates (whatever crowds a link crowds it both ways)."""
    if jitter <= 0.0:
        return profile
    speed, link = numpy_stream(seed, "jitter", client, round_index).standard_normal(2)
    return _scaled(profile, math.exp(jitter * speed), 1.0, math.exp(jitter * link))


def _drawn(tier: Tier, profile: Profile, seed: int, client: int) -> Profile:
    # All three are drawn whatever the spreads are, so that changing one of them leaves the others' draws alone.
    speed, memory, link = numpy_stream(seed, "fleet", client).standard_normal(3)
    return _scaled(
        profile,
        tier.speed_factor * math.exp(tier.speed_spread * speed),
        math.exp(tier.memory_spread * memory),
        tier.link_factor * math.exp(tier.link_spread * link),
    )


def _scaled(profile: Profile, speed: float, memory: float, link: float) -> Profile:
    return replace(
        profile,
        flops_per_s=profile.flops_per_s * speed,
        memory_bytes=profile.memory_bytes * memory,
        uplink_bytes_per_s=profile.uplink_bytes_per_s * link,
        downlink_bytes_per_s=profile.downlink_bytes_per_s * link,
    )


def _sizes(tiers: Sequence[Tier], clients: int, name: str) -> list[int]:
    """How many clients each tier gets: counts exactly, the rest by shares with the largest remainders rounded up."""
    rest = clients - sum(tier.count for tier in tiers)
    shares = sum(tier.share for tier in tiers)
    if rest < 0 or (rest > 0 and shares == 0):
        counted = clients - rest
        raise ConfigError(
            f"fleet {name!r} counts {counted} clients, this run has {clients}.", "Change the counts, or give a tier a share of the rest."
        )
    exact = [rest * tier.share / shares if tier.share else 0.0 for tier in tiers]
    sizes = [tier.count + math.floor(part) for tier, part in zip(tiers, exact, strict=True)]
    by_remainder = sorted(range(len(tiers)), key=lambda index: (math.floor(exact[index]) - exact[index], index))
    for index in by_remainder[: clients - sum(sizes)]:
        sizes[index] += 1
    return sizes


def _deal(sizes: Sequence[int]) -> list[int]:
    """The tier of every client: member k of a tier of n stands at (k + 1/2) / n of the line, the earlier tier first at equal places."""
    places = [((member + 0.5) / size, index) for index, size in enumerate(sizes) for member in range(size)]
    return [index for _, index in sorted(places)]


def _tiers(name_or_path: str, known: Mapping[str, Profile]) -> tuple[Tier, ...]:
    if name_or_path in FLEETS:
        return FLEETS[name_or_path]
    if name_or_path.endswith(".toml"):
        return _read_fleet(Path(name_or_path), known)
    near = nearest(name_or_path, list(FLEETS))
    raise ConfigError(
        f"unknown fleet {name_or_path!r}; known: {', '.join(FLEETS)}" + (f"; did you mean {near!r}?" if near else "."),
        "Choose one of these, or name a file that ends in .toml.",
    )


def _read_fleet(path: Path, known: Mapping[str, Profile]) -> tuple[Tier, ...]:
    tables = read_toml(path)
    problems = [f"{name} is not known at the top of a fleet; it is a list of [[tier]]" for name in tables if name != "tier"]
    rows = tables.get("tier")
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        rows = []
        problems.append("there is no [[tier]]")
    tiers = [_read_tier(f"tier {number}", row, known, problems) for number, row in enumerate(rows, 1)]
    shares = [tier.share for tier in tiers if tier is not None and tier.share]
    if None not in tiers and shares and abs(sum(shares) - 1.0) > SHARES_TOLERANCE:
        problems.append(f"the shares add up to {sum(shares):.4g}; allowed is 1")
    if problems:
        raise ConfigError(
            f"{path}: {problems[0]}." + (f" ({len(problems)} problems)" if len(problems) > 1 else ""),
            f"A tier has a profile, share or count, and may have {', '.join(_FIELDS[3:])}.",
            tuple(problems),
        )
    return tuple(tier for tier in tiers if tier is not None)


def _read_tier(where: str, row: Mapping[str, object], known: Mapping[str, Profile], problems: list[str]) -> Tier | None:
    """The tier of one table, or None after adding what is wrong with it to `problems`."""
    before = len(problems)
    values: dict[str, float] = {}
    for field, value in row.items():
        number = value if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
        if field not in _FIELDS:
            problems.append(f"{where} has no field {field!r}; allowed: {', '.join(_FIELDS)}{_hint(field, _FIELDS)}")
        elif field == "count" and not (isinstance(number, int) and number >= 1):
            problems.append(f"{where}: count is {value!r}; allowed are whole numbers from 1")
        elif field in _BOUNDS and not _within(number, *_BOUNDS[field]):
            least, most, closed = _BOUNDS[field]
            problems.append(f"{where}: {field} is {value!r}; allowed are numbers {'from' if closed else 'above'} {least:g} to {most:g}")
        elif field != "profile":
            values[field] = number
    profile = row.get("profile")
    if not isinstance(profile, str) or profile not in known:
        said = f"profile is {profile!r}; known: {', '.join(sorted(known))}" if "profile" in row else "profile is missing"
        problems.append(f"{where}: {said}{_hint(str(profile), tuple(known))}")
    if ("share" in row) == ("count" in row):
        problems.append(f"{where} needs either share or count" + (", not both" if "share" in row else ""))
    if len(problems) > before:
        return None
    return replace(Tier(str(profile)), **values)  # type: ignore[arg-type]  # each checked above


def _within(number: float, least: float, most: float, closed: bool) -> bool:
    return (least <= number if closed else least < number) and number <= most


def _hint(name: str, known: Sequence[str]) -> str:
    near = nearest(name, list(known))
    return f"; did you mean {near!r}?" if near else ""
