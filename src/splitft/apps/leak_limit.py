"""`split.max_leak`: no cut at which the audit's strongest informed attacker recovers more of a client's text than this."""

from __future__ import annotations

from splitft.config import RunConfig, override
from splitft.errors import ConfigError

# Rows and tokens of each that are attacked at every cut: a bound to plan with, where the audit itself gives a figure to report.
SEQUENCES, TOKENS, SECONDS = 2, 48, 30.0


def bounded(config: RunConfig) -> tuple[RunConfig, str]:
    """The configuration with `split.minimum_cut` raised so far that every cut a policy may choose keeps to `split.max_leak`, and a sentence
    on what was found. Raises ConfigError where no cut does.

    The attacker knows the adapter (K of docs/privacy.md), works through the run's own codecs, on the text of the client with the shallowest
    cut.
    """
    if config.split.max_leak >= 1.0:
        return config, ""
    from splitft.apps.audit_command import Request, prepare
    from splitft.audit.base import Options
    from splitft.audit.run import leak_by_cut

    options = Options(SEQUENCES, TOKENS, SECONDS, seed=config.seed)
    free = override(config, ["split.max_leak=1.0"])
    prepared = prepare(Request(free, None, -1, 0, True, None), options)
    least = config.split.minimum_cut
    most = config.split.maximum_cut or max(prepared.cuts)
    leaks = leak_by_cut(prepared.case, tuple(cut for cut in prepared.cuts if least <= cut <= most), options)
    told = ", ".join(f"cut {cut}: {leak:.2f}" for cut, leak in sorted(leaks.items()))
    allowed = least
    for cut, leak in sorted(leaks.items()):
        if leak > config.split.max_leak:
            allowed = cut + 1
    if allowed not in leaks:
        raise ConfigError(
            f"no cut keeps to split.max_leak = {config.split.max_leak:g}: recovered was {told}.",
            "depth hides little; put noise over a projection on the uplink (docs/privacy.md), or raise the limit.",
        )
    text = f"split.max_leak = {config.split.max_leak:g}: recovered was {told}; no cut below {allowed} is taken."
    return override(config, [f"split.minimum_cut={allowed}"]), text
