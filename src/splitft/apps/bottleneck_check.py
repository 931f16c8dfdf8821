"""After a run with bottlenecks: what the joined model is worth through them, beside what it is worth as it is exported."""

from __future__ import annotations

from functools import reduce
from operator import add
from typing import Any

from splitft.apps.bottleneck_setup import bottleneck_facts
from splitft.bottleneck import Place
from splitft.engine.evaluate import evaluate
from splitft.engine.rounds import Run


def measured_through(run: Run) -> list[dict[str, Any]]:
    """The event `bottleneck` of a finished run, and a warning that says it in words; nothing without bottlenecks.

    The headline of a run is the exported adapter over the whole model, which crosses no cut (decision 0007). The same rows here go through
    the pair of each cut that clients had last, without codecs and noise.
    """
    federation, rules, state = run.federation, run.rules, run.state
    layout = federation.layout
    if not layout.matrices:
        return []
    pairs = {one.boundary for one in layout.matrices if one.encodes and one.place == "cut"}
    cuts = sorted(pairs & {one.cut for one in state.clients.values()} or pairs)
    rows = [run.common_held_out] if len(run.common_held_out) else [one.held_out for one in federation.clients]
    exits: dict[int, Place] = dict.fromkeys((one.boundary for one in layout.matrices if one.encodes and one.place == "exit"), "exit")
    places: list[dict[int, Place]] = [{}, *({cut: "cut", **exits} for cut in cuts)]
    scores = []
    for through in places:
        how = (rules.evaluate_batch, federation.device, rules.evaluate_rows)
        found = evaluate(federation.split, layout, state.adapters, rows, *how, through=through)
        scores.append(reduce(add, (one for one in found if one is not None)))
    bare, *others = scores
    event = {
        "event": "bottleneck",
        "round": state.round,
        **bottleneck_facts(layout),
        "exported": bare.to_json(),
        "through": [{"cut": cut, **one.to_json()} for cut, one in zip(cuts, others, strict=True)],
    }
    told = ", ".join(f"{one.perplexity:.1f} at cut {cut}" for cut, one in zip(cuts, others, strict=True))
    text = (
        f"the exported adapter has no bottleneck: perplexity {bare.perplexity:.1f} on rows held out; through the bottleneck of "
        f"{event['channels']} channels, without noise: {told}."
    )
    return [event, {"event": "warning", "round": state.round, "text": text}]
