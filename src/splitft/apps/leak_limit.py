"""`split.max_leak`: no cut at which the audit's informed attackers may recover more of a client's text or labels than this."""

from __future__ import annotations

from collections.abc import Sequence

from splitft.config import RunConfig, override
from splitft.errors import ConfigError

# Rows and tokens of each that are attacked at every cut: a bound to plan with, where the audit itself gives a figure to report.
SEQUENCES, TOKENS, SECONDS = 4, 48, 120.0


def bounded(config: RunConfig) -> tuple[RunConfig, str]:
    """The configuration with bounds between which every cut a policy may choose keeps to `split.max_leak`, and a sentence on what was
    found. Raises ConfigError where no cut does, or a cut that is named does not, and where labels are sent, which are the text.

    The attackers are K, L and both together of docs/privacy.md, through the run's own codecs, on the text of the client with the
    shallowest cut, over as many visits of a text as the client with the fewest rows makes. What is compared is the upper end of the
    figure's 95 % interval; a cut where time was too short for all attacks is not taken for measured.
    """
    limit = config.split.max_leak
    if limit >= 1.0:
        return config, ""
    if config.split.labels == "server":
        raise ConfigError(
            f'split.max_leak = {limit:g} with split.labels = "server": labels are the text, one token on, and are sent in clear.',
            'set split.labels = "client", or leave out split.max_leak.',
        )
    from dataclasses import replace

    from splitft.apps.audit_command import Request, prepare
    from splitft.audit.base import Options
    from splitft.audit.run import worst_by_cut

    options = Options(SEQUENCES, TOKENS, SECONDS, seed=config.seed)
    free = override(config, ["split.max_leak=1.0"])
    # A policy may begin with whole models on clients, where nothing crosses, and not stay there.
    prepared = prepare(Request(free, None, -1, 0, True, None, cut=config.split.minimum_cut), options)
    options = replace(options, visits=prepared.most_sent)
    wanted = _cuts(config, prepared.cuts)
    worst = worst_by_cut(prepared.case, wanted, options)
    told = "; ".join(
        f"cut {cut}: {one.figures.accuracy:.3f} by {one.attacker}, at most {one.figures.high:.3f}" for cut, one in sorted(worst.items())
    )
    if hasty := [cut for cut, one in sorted(worst.items()) if not one.complete and one.figures.high <= limit]:
        raise ConfigError(
            f"split.max_leak cannot be checked here: at cut {hasty[0]} not all attacks ended within {SECONDS:g} s.",
            "measure with splitft audit CONFIG --seconds, and leave out split.max_leak; or check it on a faster machine.",
        )
    good = [cut for cut, one in sorted(worst.items()) if one.figures.high <= limit]
    if not good or (_fixed(config) and len(good) < len(wanted)):
        labels = [one for one in worst.values() if one.attacker.startswith("L") and one.figures.high > limit]
        reason = " Labels come out of the gradients that a U-shape returns, whatever the cut." if labels else ""
        raise ConfigError(
            f"no cut keeps to split.max_leak = {limit:g}: recovered was {told}.{reason}",
            "depth hides little. More noise or fewer channels (bottleneck = { channels = N, noise = X }) hide more of the states, noise of "
            "several rms on exit_uplink more of the labels, and both cost what is learned (docs/privacy.md); or raise the limit.",
        )
    text = f"split.max_leak = {limit:g}: recovered was {told} (95 % interval)"
    if _fixed(config):
        return config, f"{text}."
    first, last = _longest(good)
    return override(config, [f"split.minimum_cut={first}", f"split.maximum_cut={last}"]), f"{text}; cuts {first} to {last} are taken."


def _fixed(config: RunConfig) -> list[int]:
    """The cuts that the configuration itself names."""
    return sorted(set(config.policy.fields.get("cuts") or [])) if config.policy.name == "fixed" else []


def _cuts(config: RunConfig, there: Sequence[int]) -> tuple[int, ...]:
    """The cuts that may be chosen, of those `there`."""
    least, most = config.split.minimum_cut, config.split.maximum_cut or max(there)
    named = _fixed(config) or range(least, most + 1)
    return tuple(cut for cut in named if cut in there)


def _longest(cuts: Sequence[int]) -> tuple[int, int]:
    """First and last of the longest row of neighbours among some cuts; of two, the deeper: a policy knows bounds, not gaps."""
    rows: list[list[int]] = []
    for cut in cuts:
        if rows and rows[-1][-1] == cut - 1:
            rows[-1].append(cut)
        else:
            rows.append([cut])
    best = max(rows, key=lambda row: (len(row), row[-1]))
    return best[0], best[-1]
