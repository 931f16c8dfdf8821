"""A bottleneck in a configuration: which cuts have one, what it begins as, what it does not go with, and its file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save
from torch import Tensor

from splitft.apps.report_files import write_atomically
from splitft.bottleneck import Pair, begin, pair_of, principal
from splitft.compress.noise import Noise, noise_in
from splitft.data.federate import public_rows
from splitft.data.python_docs import PythonDocs
from splitft.errors import ConfigError, DataError
from splitft.lora import Layout
from splitft.split import Route, SplitModel

if TYPE_CHECKING:
    from splitft.apps.assemble import Base, Components
    from splitft.compress.base import Codec
    from splitft.config import RunConfig
    from splitft.config_bottleneck import BottleneckSection

# Public text that a pair begins with: enough for the axes of any width, a second's work for a small model.
DOCUMENTS, ROWS, ROW_TOKENS, ROWS_AT_ONCE = 300, 128, 128, 16
FILE_NAME = "bottleneck.safetensors"


def cuts_of(config: RunConfig, blocks: int) -> tuple[int, ...]:
    """The cuts that have a bottleneck: those named, those of policy "fixed", else all that the section `split` allows."""
    if config.bottleneck.cuts:
        return config.bottleneck.cuts
    fixed = config.policy.fields.get("cuts") if config.policy.name == "fixed" else None
    if fixed:
        return tuple(sorted(set(fixed)))
    # A U-shaped client with all blocks but the tail holds the whole model: nothing crosses.
    deepest = blocks - config.split.tail_blocks - (config.split.labels == "client")
    return tuple(range(config.split.minimum_cut, min(config.split.maximum_cut or deepest, deepest) + 1))


def with_bottleneck(config: RunConfig, layout: Layout, split: SplitModel) -> Layout:
    """The layout with the bottlenecks of this run, if it has any. Raises ConfigError for one that the model has no room for."""
    section, width, blocks = config.bottleneck, split.hidden_size, split.blocks
    if not section.channels:
        return layout
    if section.channels > width:
        raise ConfigError(
            f"bottleneck.channels is {section.channels}; {config.model.path!r} has states of {width} channels.",
            f"set it to {width} or less: a quarter is a beginning.",
        )
    end = blocks - config.split.tail_blocks
    cuts = cuts_of(config, blocks)
    if outside := [cut for cut in cuts if not 1 <= cut <= end]:
        raise ConfigError(f"a bottleneck is to be at cut {outside[0]} of a model that allows 1 to {end}.", "correct bottleneck.cuts.")
    rate, trained = section.learning_rate or 1.0, section.learning_rate > 0
    pairs = [pair_of("cut", cut, width, section.channels, rate, trained, section.clip) for cut in cuts]
    if config.split.labels == "client":
        pairs.append(pair_of("exit", end, width, section.channels, rate, trained))
    return layout.beside([matrix for pair in pairs for matrix in (pair.encoder, pair.decoder)])


def begin_bottlenecks(base: Base, split: SplitModel, layout: Layout, row: Tensor) -> None:
    """Write into a row [p] what every pair begins as: the principal axes of the base model's states there, on Python's own documentation.

    Nothing of it depends on anybody's data, on cuts or on clients: whoever has the base model can compute it again.
    """
    pairs: dict[int, list[Pair]] = {}
    for one in layout.matrices:
        if one.encodes:
            pairs.setdefault(one.boundary, []).append(layout.pair(one.place, one.boundary))
    if not pairs:
        return
    positions = int(getattr(base.config.get_text_config(), "max_position_embeddings", 0) or ROW_TOKENS)
    rows = public_rows(PythonDocs(max_documents=DOCUMENTS).documents(), base.tokenizer, "blocks", min(ROW_TOKENS, positions))
    if int(rows.ids.max()) >= int(base.config.get_text_config().vocab_size):
        raise DataError("The tokenizer makes tokens that the model does not know.", "take the tokenizer of the model.")
    ids = torch.from_numpy(rows.batch([k for k in range(len(rows)) if rows.lengths[k] == rows.lengths.max()][:ROWS])[0])
    states: dict[int, list[Tensor]] = {boundary: [] for boundary in pairs}

    def note(block: int, hidden: Tensor) -> Tensor:
        if block + 1 in states:
            states[block + 1].append(hidden.float().cpu())
        return hidden

    with torch.no_grad():
        for part in torch.split(ids, ROWS_AT_ONCE):
            split.run(Route(len(part), last=max(pairs) - 1, cross=note), part.to(base.device), None)
    for boundary, here in pairs.items():
        mean, axes = principal(states[boundary], here[0].channels)
        for pair in here:
            begin(pair, row, mean, axes)


def with_noise(section: BottleneckSection, uplink: Codec) -> Codec:
    """The uplink with the bottleneck's noise around it: drawn and kept as any of codec `noise`. Raises ConfigError over other noise."""
    if not section.channels or not section.noise:
        return uplink
    if noise_in(uplink) is not None:
        raise ConfigError("bottleneck.noise and the codec of uplink both put noise on what leaves at the cut.", "leave out one of them.")
    # In both forms the unit is the root mean square of a row; the codec's own unit with a clip is the row's length.
    multiple = section.noise / section.channels**0.5 if section.clip else section.noise
    return Noise(uplink, section.clip, multiple)


def bottleneck_clashes(config: RunConfig, built: Components) -> Iterator[str]:
    """One line for everything that a bottleneck contradicts."""
    section, name = config.bottleneck, "bottleneck.channels"
    if not section.channels:
        return
    if not built.aggregator.partial_uploads:
        yield (
            f'{name}: a pair is averaged among the clients of its cut, value by value, which aggregator "{config.aggregator.name}" '
            'cannot; "average" can, also under "fed_avgm", "fed_adam", "fed_yogi", "norm_clip", "median" and "trimmed_mean"'
        )
    if config.secure_aggregation.enabled:
        yield f"{name}: an encoder's offset may be larger than secure_aggregation.limit, and a cut may have fewer than three owners"
    if not built.adapter_downlink.lossless:
        yield f'{name}: how a pair begins is sent, not known, so there is nothing to send changes against: adapter_downlink = "identity"'
    if config.split.server != "per_client":
        yield f'{name} needs split.server = "per_client"; it is "{config.split.server}"'
    if config.clients.buffer or not built.synchronisation.always:
        yield f'{name} needs a merge of all at the end of every round: set clients.buffer = 0 and synchronisation "every_round"'
    if not built.controller.fixed:
        yield f'{name}: controller "{config.controller.name}" probes the codecs with whole states, which do not cross: choose "fixed"'
    if config.policy.name == "whole":
        yield f'{name}: with policy "whole" nothing crosses a cut'
    if config.train.moments == "keep" and config.policy.name not in ("fixed", "whole"):
        yield f'{name}: a block that moves takes its moments along, a pair stays at its cut: set train.moments = "reset" or policy "fixed"'


def bottleneck_facts(layout: Layout) -> dict[str, Any]:
    """What is said of a run's pairs, for its journal and its file."""
    cuts = [one.boundary for one in layout.matrices if one.encodes and one.place == "cut"]
    channels = next(one.outputs for one in layout.matrices if one.encodes)
    return {"channels": channels, "cuts": cuts, "clip": max(one.clip for one in layout.matrices), "trained": layout.matrices[0].trained}


def write_bottleneck(folder: Path, layout: Layout, row: Tensor) -> Path | None:
    """The pairs of a row [p] as `bottleneck.safetensors` beside an adapter: `cut_3.encoder` [channels, width + 1] makes z = E [h; 1] of the
    state behind three blocks, `cut_3.decoder` makes h' = D [z; 1]. None where there are none."""
    if not layout.matrices:
        return None
    tensors = {one.name: (one.of(row).detach().cpu().float() * one.scale).contiguous() for one in layout.matrices}
    folder.mkdir(parents=True, exist_ok=True)
    return write_atomically(folder / FILE_NAME, save(tensors, {"bottleneck": json.dumps(bottleneck_facts(layout))}))
