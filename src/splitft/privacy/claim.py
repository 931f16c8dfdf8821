"""The words in which a run's differential privacy is told: never an epsilon without clip, noise and what it is an epsilon of."""

from __future__ import annotations

from collections.abc import Mapping

PREFIX = "privacy_"
NEEDED = ("epsilon", "delta", "clip", "noise_multiplier", "participants", "merges", "replaced")
SCOPE = (
    "It covers what is learned from the global adapters, of all rounds. It does not cover what the server sees: activations at the cut, "
    "labels, each client's update; nor the figures of single clients in journal and report; nor the losses measured on clients' own "
    "held-out rows, which are published each round. It is a claim about real numbers: what the rounding of floating-point noise gives "
    "away (Mironov 2012) is outside of it."
)


def claim_of(metrics: Mapping[str, float | None]) -> str | None:
    """The sentence for a merge's metrics; None when anything a claim needs is missing, or there was no noise."""
    found = {name: metrics.get(PREFIX + name) for name in NEEDED}
    values = {name: value for name, value in found.items() if value is not None}
    if len(values) < len(NEEDED) or values["clip"] <= 0 or values["noise_multiplier"] <= 0:
        return None
    unit = "one client's data replaced by anything" if values["replaced"] else "one client's update counted as zero"
    return (
        f"client-level differential privacy, epsilon {values['epsilon']:.3g} at delta {values['delta']:.2g} ({unit}): "
        f"clip {values['clip']:.3g}, noise {values['noise_multiplier']:.3g} clips on the sum of {values['participants']:.0f} updates, "
        f"{values['merges']:.0f} merges, every client counted as taking part in each"
    )
