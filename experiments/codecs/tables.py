"""The page's tables."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from experiments.codecs.figures import LINKS
from experiments.codecs.measures import WITHIN, Against, cheapest_within, load, places
from experiments.codecs.runs import COARSE, LONG, MEDIUM
from experiments.codecs.settings import LENGTHS, SETTINGS
from experiments.codecs.stacks import LONG_COARSE, PRESETS, RECOMMENDED, UNCOMPRESSED, Preset, stacks

CONTROLLED = (
    "recommended",
    "recommended_energy",
    "recommended_bang_bang",
    "recommended_open",
    "recommended_ddpg",
    "splitcom",
    "splitcom_bang_bang",
)
DASH = "—"


@dataclass(frozen=True)
class Target:
    """What was to be reached: bytes of some columns of a run of so many epochs, as a share of 16-bit values, and in which settings."""

    epochs: int
    what: str
    starts: tuple[str, ...]
    limit: float
    exit: str


TARGETS = (
    Target(1, "total", ("up_", "down_"), 0.22, "server"),
    Target(3, "total", ("up_", "down_"), 0.18, "server"),
    Target(10, "total", ("up_", "down_"), 0.10, "server"),
    Target(50, "uplink", ("up_",), 0.014, "server"),
    Target(50, "total", ("up_", "down_"), 0.042, "client"),
)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown; all columns but the first to the right."""
    marks = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, marks, *rows)) + "\n"


def percent(values: Sequence[float], digits: int = 2, sign: bool = False) -> str:
    """Mean ± sample standard deviation in per cent; one value has no spread."""
    if not values:
        return DASH
    form = f"{'+' if sign else ''}.{digits}f"
    mean = f"{100 * statistics.fmean(values):{form}}"
    text = mean if len(values) == 1 else f"{mean} ± {100 * statistics.stdev(values):.{digits}f}"
    return text.replace("-", "\N{MINUS SIGN}")


def title(stack: str, epochs: int = MEDIUM) -> str:
    """What the page calls a stack."""
    known = stacks(epochs)
    return known[stack].title if stack in known else stack


def targets() -> str:
    """Every target in every setting: what the recommended stacks took, and at what quality."""
    rows = []
    for target in TARGETS:
        for name, setting in SETTINGS.items():
            for stack, kind in ((RECOMMENDED, PRESETS[target.epochs][0]), (COARSE, "long, coarse")):
                runs = load(name, target.epochs).get(stack, []) if setting.exit == target.exit else []
                if not runs or (stack != RECOMMENDED and target.epochs != LONG):
                    continue
                taken, excess = [run.share(*target.starts) for run in runs], [run.excess() for run in runs]
                sides = [one.run for one in runs], [one.reference for one in runs]
                own, reference = (statistics.fmean(one.perplexity() for one in side) for side in sides)
                rows.append(
                    (
                        setting.heading,
                        f"{target.epochs} ({kind})",
                        f"{target.what} ≤ {100 * target.limit:g} %",
                        percent(taken),
                        percent(excess, sign=True),
                        f"{own:.2f} / {reference:.2f}",
                        str(len(runs)),
                        _verdict(statistics.fmean(taken), target.limit, statistics.fmean(excess)),
                    )
                )
    head = ("setting", "epochs (preset)", "target", "bytes, %", "perplexity above, %", "perplexity / uncompressed", "seeds", "verdict")
    return table(head, rows)


def _verdict(taken: float, limit: float, excess: float) -> str:
    """Both conditions; how far inside or outside the bytes are."""
    if taken > limit:
        return f"missed, {taken / limit:.2f} × the limit"
    if excess > WITHIN:
        return f"quality missed, {taken / limit:.2f} × the limit"
    return f"met, {taken / limit:.2f} × the limit"


def best() -> str:
    """Of all stacks the one with the fewest bytes within the tolerance, in each setting and length."""
    rows = []
    for name, setting in SETTINGS.items():
        for epochs in LENGTHS:
            found = places({stack: runs for stack, runs in load(name, epochs).items() if stack != UNCOMPRESSED})
            if not found:
                continue
            place, words = cheapest_within(found), ""
            if place is None:
                place, words = min(found, key=lambda one: one.excess), "none; nearest: "
            rows.append((setting.heading, str(epochs), str(len(found)), words + title(place.stack, epochs), *_cells(place.runs)))
    return table(("setting", "epochs", "of stacks", "best", "total, %", "uplink, %", "downlink, %", "perplexity above, %"), rows)


def _cells(runs: Sequence[Against]) -> tuple[str, ...]:
    shares = ([run.share(*starts) for run in runs] for starts in (("up_", "down_"), ("up_",), ("down_",)))
    return (*(percent(share) for share in shares), percent([run.excess() for run in runs], sign=True))


def pareto(setting: str) -> str:
    """Every stack after ten epochs, fewest bytes first; the number is the dot's in the picture."""
    rows = []
    for number, place in enumerate(places(load(setting, MEDIUM)), 1):
        cut = [run.part("up_activations", "up_gradients", "down_activations", "down_gradients") for run in place.runs]
        adapters = [run.part("up_adapters", "down_adapters") for run in place.runs]
        *shares, excess = _cells(place.runs)
        name = f"{number} {title(place.stack)}"
        rows.append((name, *shares, percent(cut), percent(adapters), excess, f"{place.within}/{len(place.runs)}"))
    head = ("stack", "total, %", "uplink, %", "downlink, %", "at the cut, %", "adapters, %", "perplexity above, %", "seeds within 1 %")
    return table(head, rows)


def links(setting: str) -> str:
    """Virtual seconds to within 1 % of the uncompressed run's last perplexity, by link; fastest on the first one first."""
    rows: list[tuple[float, tuple[str, ...]]] = []
    for place in places(load(setting, MEDIUM)):
        cells, means = [], []
        for link in LINKS:
            found = [seconds for run in place.runs if (seconds := run.seconds(link)) is not None]
            whole = len(found) == len(place.runs)
            means.append(statistics.fmean(found) if whole else math.inf)
            cells.append(f"{statistics.fmean(found):.2f}" if whole else f"{DASH} ({len(found)}/{len(place.runs)})")
        rows.append((means[0], (title(place.stack), *cells)))
    rows.sort(key=lambda row: (row[0], row[1]))
    quickest = [min((float(row[1][at]) for row in rows if row[1][at][0] != DASH), default=None) for at in range(1, len(LINKS) + 1)]
    shown = [(row[0], *(_marked(cell, fast) for cell, fast in zip(row[1:], quickest, strict=True))) for _, row in rows]
    return table(("stack", *(f"s at {link}" for link in LINKS)), shown)


def _marked(cell: str, fastest: float | None) -> str:
    return f"**{cell}**" if fastest is not None and cell[0] != DASH and float(cell) == fastest else cell


def controllers(setting: str, epochs: str) -> str:
    """By stack and seed: after how many rounds the loss was inside the budget of 1 %, and what it cost."""
    grouped, rows = load(setting, int(epochs)), []
    for stack in CONTROLLED:
        for run in grouped.get(stack, []):
            losses = [run.loss_excess(index) for index in range(1, run.run.rounds + 1)]
            dials = [dial for line in run.run.lines if (dial := line["dial"]) is not None]
            rows.append(
                (
                    title(stack, int(epochs)),
                    str(run.run.seed),
                    f"{sum(one <= WITHIN for one in losses)}/{len(losses)}",
                    f"{percent([max(losses)], sign=True)} ({losses.index(max(losses)) + 1})",
                    percent([losses[-1]], sign=True),
                    percent([run.excess()], sign=True),
                    f"{min(dials):.2f} to {max(dials):.2f}" if dials else DASH,
                    percent([run.total()]),
                )
            )
    head = ("stack", "seed", "rounds inside", "worst loss above, % (round)", "last, %", "perplexity, last, %", "dial", "total bytes, %")
    return table(head, rows)


def presets() -> str:
    """The recommended errors by length of run; of cached tensors the bound and what is ignored."""
    names = [field.name for field in dataclasses.fields(Preset)]
    listed = [(epochs, kind, one) for epochs, (kind, one) in PRESETS.items()] + [(LONG, "long, coarse", LONG_COARSE)]
    rows = [(f"{epochs}", kind, *(_number(getattr(one, name)) for name in names)) for epochs, kind, one in listed]
    return table(("epochs", "preset", *(name.replace("_", " ") for name in names)), rows)


def _number(value: object) -> str:
    if dataclasses.is_dataclass(value):
        return " / ".join(_number(getattr(value, field.name)) for field in dataclasses.fields(value))
    return f"{value:g}" if isinstance(value, float | int) else str(value)


MAKERS: Mapping[str, Callable[..., str]] = {
    "targets": targets,
    "best": best,
    "presets": presets,
    "pareto": pareto,
    "links": links,
    "controllers": controllers,
}
