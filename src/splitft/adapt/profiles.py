"""Device profiles: presets, a TOML file of one's own, and how a run assigns them to its clients.

The presets are orders of magnitude for comparing plans, not measurements of your device. flops_per_s is what training in small
batches achieves, well below the peak on the data sheet: about a third of it on large accelerators (training of PaLM, tuned by its
makers, used 46 %: Chowdhery et al. 2022, arXiv 2204.02311), much less on small ones.

    phone            2.5e10 flops/s: 15-30 GFLOP/s measured for training on Snapdragon 8 CPUs, where the GPU was no faster
                     (Das et al. 2022, arXiv 2202.10100). 8 GB. Mobile network: 11 Mbit/s up, 36 down, the world means of the
                     Speedtest Global Index (Ookla, September 2020); 20 ms one way.
    tablet           4e10: a phone's processor with better cooling. 8 GB. Home network: 46 Mbit/s up, 86 down (same index); 10 ms.
    laptop           1e11: about 50 GFLOP/s per core in float32 products, times a few cores, less what a small batch loses. 16 GB.
                     Home network.
    desktop          4e11: the same with 8 to 16 cores. 32 GB. Home network.
    edge-gpu         1e12: Jetson Orin Nano class, 1024 CUDA cores at 625 MHz = 1.3 TFLOP/s float32 peak, about 10 in its tensor
                     cores (NVIDIA data sheet). 8 GB shared. 100 Mbit/s both ways; 5 ms.
    workstation-gpu  4e13: GeForce RTX 4090 class, 83 TFLOP/s float32 peak, 165 bfloat16. 24 GB. 1 Gbit/s both ways; 1 ms.
    hospital-server  2e13: one NVIDIA T4 (8.1 TFLOP/s float32 peak, 65 float16), 16 GB. 100 Mbit/s both ways through a firewall; 10 ms.
    server-a100      1e14: NVIDIA A100 80 GB, 312 TFLOP/s bfloat16 peak. 10 Gbit/s; 0.5 ms.
    server-h200      3e14: NVIDIA H200 141 GB, 989 TFLOP/s bfloat16 peak. 10 Gbit/s; 0.5 ms.

As the server of a run only a profile's flops_per_s counts: transfers are timed on the clients' links, the narrow side.
"""

from __future__ import annotations

import difflib
import math
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path

from splitft.errors import ConfigError
from splitft.types import Profile

MBIT_BYTES_PER_S = 125_000.0
GB = 1e9

PRESETS: Mapping[str, Profile] = {
    profile.name: profile
    for profile in (
        Profile("phone", 2.5e10, 8 * GB, 11 * MBIT_BYTES_PER_S, 36 * MBIT_BYTES_PER_S, 0.02),
        Profile("tablet", 4e10, 8 * GB, 46 * MBIT_BYTES_PER_S, 86 * MBIT_BYTES_PER_S, 0.01),
        Profile("laptop", 1e11, 16 * GB, 46 * MBIT_BYTES_PER_S, 86 * MBIT_BYTES_PER_S, 0.01),
        Profile("desktop", 4e11, 32 * GB, 46 * MBIT_BYTES_PER_S, 86 * MBIT_BYTES_PER_S, 0.01),
        Profile("edge-gpu", 1e12, 8 * GB, 100 * MBIT_BYTES_PER_S, 100 * MBIT_BYTES_PER_S, 0.005),
        Profile("workstation-gpu", 4e13, 24 * GB, 1000 * MBIT_BYTES_PER_S, 1000 * MBIT_BYTES_PER_S, 0.001),
        Profile("hospital-server", 2e13, 16 * GB, 100 * MBIT_BYTES_PER_S, 100 * MBIT_BYTES_PER_S, 0.01),
        Profile("server-a100", 1e14, 80 * GB, 10_000 * MBIT_BYTES_PER_S, 10_000 * MBIT_BYTES_PER_S, 0.0005),
        Profile("server-h200", 3e14, 141 * GB, 10_000 * MBIT_BYTES_PER_S, 10_000 * MBIT_BYTES_PER_S, 0.0005),
    )
}

NUMBERS = tuple(field.name for field in fields(Profile) if field.name != "name")


def preset(name: str) -> Profile:
    """The preset called `name`; ConfigError with the nearest name if there is none."""
    return find_profile(name, PRESETS)


def find_profile(name: str, known: Mapping[str, Profile]) -> Profile:
    """The profile called `name` among `known`; ConfigError with the nearest name if there is none."""
    if name in known:
        return known[name]
    raise ConfigError(
        f"unknown device profile {name!r}; known: {', '.join(sorted(known))}{_hint(name, known)}",
        "Choose one of these, or describe the device in clients.profiles_file.",
    )


def load_profiles(path: Path) -> dict[str, Profile]:
    """The presets together with the profiles of a TOML file; a profile of the file replaces a preset of the same name.

    One table per profile, named after it, with every number of `Profile`; or with `like = "<preset>"` and the numbers that differ:

        [ward-tablet]
        like = "tablet"
        uplink_bytes_per_s = 2.5e6

    Raises ConfigError with every problem of the file.
    """
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"cannot read the profiles file {str(path)!r}: {error.strerror or error}.", "Check clients.profiles_file."
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not a TOML file in UTF-8: {error}.", "Correct the file at that place.") from error
    known = dict(PRESETS)
    problems: list[str] = []
    for name, table in tables.items():
        if not isinstance(table, dict):
            problems.append(f"{name} = {table!r} stands outside a table; every profile is a table such as [{name}]")
        elif (profile := _read_profile(name, table, problems)) is not None:
            known[name] = profile
    if problems:
        raise ConfigError(
            f"{path}: {problems[0]}." + (f" ({len(problems)} problems)" if len(problems) > 1 else ""),
            f"A profile has {', '.join(NUMBERS)}, or like = a preset and the numbers that differ.",
            tuple(problems),
        )
    return known


def assign_profiles(names: Sequence[str], clients: int, known: Mapping[str, Profile] = PRESETS) -> tuple[Profile, ...]:
    """One profile per client: a single name serves all of them, otherwise one name each, in client order.

    Raises ConfigError for an unknown name and for a list of another length.
    """
    if len(names) not in (1, clients):
        raise ConfigError(
            f"clients.profiles has {len(names)} entries for {clients} clients; allowed are one for all or one per client.",
            f"Give 1 or {clients} profile names.",
        )
    found = [find_profile(name, known) for name in names]
    return tuple(found if len(found) == clients else found * clients)


def _read_profile(name: str, table: Mapping[str, object], problems: list[str]) -> Profile | None:
    """The profile of one table, or None after adding what is wrong with it to `problems`."""
    before = len(problems)
    base = table.get("like")
    if base is not None and (not isinstance(base, str) or base not in PRESETS):
        problems.append(f"{name}.like is {base!r}; allowed: {', '.join(sorted(PRESETS))}{_hint(str(base), PRESETS)}")
    values: dict[str, float] = {}
    for field, value in table.items():
        if field == "like":
            continue
        if field not in NUMBERS:
            problems.append(f"{name} has no field {field!r}; allowed: like, {', '.join(NUMBERS)}{_hint(field, NUMBERS)}")
        elif isinstance(value, bool) or not isinstance(value, int | float) or not _allowed(field, float(value)):
            bound = "0 or more" if field == "latency_s" else "more than 0"
            problems.append(f"{name}.{field} is {value!r}; allowed is a finite number, {bound}")
        else:
            values[field] = float(value)
    missing = [field for field in NUMBERS if field not in table]
    if base is None and missing:
        problems.append(f"{name} lacks {', '.join(missing)}")
    if len(problems) > before:
        return None
    return replace(PRESETS[base], name=name, **values) if isinstance(base, str) else Profile(name, **values)


def _allowed(field: str, value: float) -> bool:
    return math.isfinite(value) and (value > 0 or (field == "latency_s" and value == 0))


def _hint(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
