"""Journals with what codecs tell, for the tests of their figures: sums whose ratios are known."""

from __future__ import annotations

from typing import Any

from report_journals import Journal, write_events

__all__ = ["Journal", "codec_facts", "coded_events", "write_events"]

VALUES = 1000.0


def codec_facts(number: int) -> dict[str, dict[str, float]]:
    """One client's facts of round `number`. Uplink: 100 samples, a tenth more of them skipped each round, residual share 0.5 / number,
    relative error 0.1, of 2000 plain bytes 400 sent. Downlink: 500 of 2000, relative error 0.2, a lossless stage that took 100 off.
    Adapters: no stages, 300 of 600."""
    first = number == 1
    skipped = 0.0 if first else min(90.0, 10.0 * number)
    up = {
        "packets": 1.0, "bytes": 400.0, "plain_bytes": 2000.0, "samples": 100.0, "skipped": skipped,
        "squared": VALUES, "squared_error": 0.01 * VALUES, "stage_codes_bytes": 250.0, "stage_scales_bytes": 100.0,
        "stage_flags_bytes": 18.0, "rank_sum": 400.0, "rank_samples": 100.0,
    }  # fmt: skip
    if not first:
        up |= {"known_squared": VALUES, "residual_squared": 0.5 * VALUES / number}
        for index in range(20):
            up[f"similarity_{index:02d}"] = 1.0 + (30.0 * number if index == 19 else 5.0 if index >= 15 else 0.0)
    down = {
        "packets": 1.0, "bytes": 500.0, "plain_bytes": 2000.0, "squared": 2.0, "squared_error": 0.08, "samples": 100.0, "skipped": 0.0,
        "stage_codes_bytes": 450.0, "stage_scales_bytes": 118.0, "stage_entropy_bytes": 468.0, "stage_entropy_saved_bytes": 100.0,
    }  # fmt: skip
    return {"up activations": up, "down gradients": down, "up adapters": {"packets": 1.0, "bytes": 300.0, "plain_bytes": 600.0}}


def coded_events(clients: int = 3, rounds: int = 9, controlled: bool = True) -> list[dict[str, Any]]:
    """A run with codecs; `controlled`: probed every round, the excess from 3 % down to 0, the dial of activations from 2 to 1."""
    events = Journal(clients=clients, rounds=rounds).events()
    for event in events:
        if event["event"] != "round":
            continue
        number = event["round"]
        for part in event["clients"]:
            part["codec"] = codec_facts(number)
        if controlled:
            clean, late = 3.0 - 0.1 * number, (number - 1) / max(1, rounds - 1)
            event["probe"] = {"clean_loss": clean, "coded_loss": clean * (1.0 + 0.03 * (1 - late)), "bytes": 4096.0}
            event["dial"] = {"activations": 2.0 - late, "gradients": 1.0}
            event["controller"] = {"budget": 0.01}
    return events
