"""The words in which a run's differential privacy is told: never an epsilon without clip, noise and what it is an epsilon of."""

from __future__ import annotations

from collections.abc import Mapping

PREFIX = "privacy_"
NEEDED = ("epsilon", "delta", "clip", "noise_multiplier", "participants", "merges", "drawn_share", "replaced")
SCOPE = (
    "It covers what is learned from the global adapters, of all rounds. It does not cover what the server sees: activations at the cut, "
    "labels, each client's update; nor the figures of single clients in journal and report."
)


def claim_of(metrics: Mapping[str, float | None]) -> str | None:
    """The sentence for a merge's metrics; None when anything a claim needs is missing, or there was no noise."""
    found = {name: metrics.get(PREFIX + name) for name in NEEDED}
    values = {name: value for name, value in found.items() if value is not None}
    if len(values) < len(NEEDED) or values["clip"] <= 0 or values["noise_multiplier"] <= 0:
        return None
    unit = "one client's data replaced by anything" if values["replaced"] else "one client's update counted as zero"
    drawn = values["drawn_share"]
    sampling = f"{drawn:.3g} of the clients drawn in secret for each" if drawn < 1 else "every client counted as taking part in each"
    return (
        f"client-level differential privacy, epsilon {values['epsilon']:.3g} at delta {values['delta']:.2g} ({unit}): "
        f"clip {values['clip']:.3g}, noise {values['noise_multiplier']:.3g} clips on the sum of {values['participants']:.0f} updates, "
        f"{values['merges']:.0f} merges, {sampling}"
    )
