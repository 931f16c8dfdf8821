"""What the chosen codecs would send in a run, before anything is trained: bits a value, bytes each way, beside 16-bit values.

Arithmetic on `Codec.expected_bytes`, the codecs' own estimates: what a run counts may differ where the rate follows the data.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from splitft import catalog
from splitft.adapt.cost import CostModel
from splitft.apps.report_text import bytes_text, number_text, percent_text, shorten
from splitft.compress.base import HEADER_BYTES, Codec
from splitft.compress.cast import Cast
from splitft.config import RunConfig
from splitft.engine.adapters import ROW

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

EPOCHS_SHOWN = (1.0, 3.0, 10.0)
# A codec's estimate no longer changes after so many visits; a run may make millions.
VISITS_APART = 64
LINE_CHARACTERS = 56
NOTE = (
    "All clients and rounds. Bits a value with headers, when samples are sent for the first time and again; epochs: how often the run goes "
    "through its data. Estimates of the codecs; labels and control messages are not in them."
)


@dataclass(frozen=True)
class Stream:
    """The packets of one tensor in a whole run: `rows` x `width` values of `dtype` in each, `packets` of all clients together.

    `place` begins with the direction ("up activations"). `epochs`: how often the same samples are sent; None where that is the number
    of epochs of the data. `samples`: in a packet.
    """

    place: str
    codec: Codec
    rows: int
    width: int
    dtype: torch.dtype
    packets: float
    epochs: float | None = None
    samples: int = 1


class StreamPlan(NamedTuple):
    """What is expected of one stream: bits a value, header included, when its samples are sent for the first time and later; bytes of the
    whole run as 16-bit values, and with its codec for each number of epochs asked for."""

    place: str
    codec: str
    first_bits: float
    later_bits: float
    plain_bytes: float
    run_bytes: tuple[float, ...]


@dataclass(frozen=True)
class Shapes:
    """What the packets of a run are made of.

    `batch_rows`: rows (samples) of a batch; `adapter_values`: of one client's adapters, on average; `exchanges`: packets of one tensor at
    the cut, of all clients and rounds; `participations`: client rounds; `client_rounds`: rounds of one client.
    """

    batch_rows: int
    row_tokens: int
    hidden_size: int
    dtype: torch.dtype
    adapter_values: float
    exchanges: float
    participations: float
    client_rounds: float


def shapes_of(config: RunConfig, costs: CostModel, cuts: Sequence[int], dtype: torch.dtype) -> Shapes:
    """The packets of a run of clients that stay at these cuts, all take `train.local_steps` and are there when they are asked.

    Clients that hold the whole model exchange nothing at a cut. Adapters travel in every round.
    """
    clients, train = len(cuts), config.train
    participants = min(clients, max(config.clients.minimum, round(config.clients.participation * clients)))
    plans = [costs.plan(cut) for cut in cuts]
    crossing = sum(not plan.is_whole(len(costs.shape.blocks)) for plan in plans) / clients
    adapters_bytes = sum(costs.cost(plan).adapters_up_bytes for plan in plans) / clients
    return Shapes(
        batch_rows=train.batch_size,
        row_tokens=costs.sequence_tokens,
        hidden_size=costs.crossing_width or costs.shape.hidden_size,
        dtype=dtype,
        adapter_values=adapters_bytes / costs.adapter_bytes,
        exchanges=config.rounds * participants * crossing * train.local_steps * train.gradient_accumulation,
        participations=float(config.rounds * participants),
        client_rounds=config.rounds * participants / clients,
    )


def streams_of(shapes: Shapes, codecs: Mapping[str, Codec], exit_on_client: bool) -> list[Stream]:
    """The tensors that cross the wire, each with its codec: `codecs` has uplink, downlink, exit_downlink, exit_uplink (of a U-shape),
    adapter_uplink and adapter_downlink. What nothing is sent of is left out."""
    cut = {"up activations": "uplink", "down gradients": "downlink"}
    if exit_on_client:
        cut = {"up activations": "uplink", "down activations": "exit_downlink", "up gradients": "exit_uplink", "down gradients": "downlink"}
    rows = shapes.batch_rows * shapes.row_tokens
    kept = cut.items() if shapes.exchanges else ()
    found = [
        Stream(place, codecs[name], rows, shapes.hidden_size, shapes.dtype, shapes.exchanges, samples=shapes.batch_rows)
        for place, name in kept
    ]
    values = round(shapes.adapter_values)
    adapters = {"up adapters": "adapter_uplink", "down adapters": "adapter_downlink"} if values else {}
    for place, name in adapters.items():
        # A codec that loses something is given changes, in rows of a fixed width.
        form = (1, values) if codecs[name].lossless else (-(-values // ROW), ROW)
        found.append(Stream(place, codecs[name], *form, torch.float32, shapes.participations, max(1.0, shapes.client_rounds)))
    return found


def plan_codecs(streams: Sequence[Stream], epochs: Sequence[float] = EPOCHS_SHOWN) -> list[StreamPlan]:
    """One row a stream; `epochs`: how often the run goes through its data, for which whole-run bytes are wanted."""
    return [_planned(stream, epochs) for stream in streams]


def _planned(stream: Stream, epochs: Sequence[float]) -> StreamPlan:
    values = stream.rows * stream.width
    plain = Cast().packet_bytes((stream.rows, stream.width), stream.dtype)
    return StreamPlan(
        stream.place,
        describe_codec(stream.codec),
        8 * packet_bytes(stream, 0) / values,
        8 * packet_bytes(stream, 1) / values,
        stream.packets * plain,
        tuple(run_bytes(stream, stream.epochs or count) for count in epochs),
    )


def packet_bytes(stream: Stream, visit: int) -> float:
    """Expected bytes of one packet whose samples were sent `visit` times before, header included."""
    return HEADER_BYTES + stream.codec.expected_bytes(stream.rows, stream.width, stream.dtype, visit, stream.samples)


def run_bytes(stream: Stream, epochs: float) -> float:
    """Expected bytes of the whole run if it goes `epochs` times through the samples: a packet in `epochs` is a first visit, and so on."""
    if epochs <= 1:
        return stream.packets * packet_bytes(stream, 0)
    one_pass, total = stream.packets / epochs, 0.0
    apart = min(math.ceil(epochs), VISITS_APART)
    for visit in range(apart):
        left = stream.packets - visit * one_pass
        total += (left if visit == apart - 1 else min(one_pass, left)) * packet_bytes(stream, visit)
    return total


def describe_codec(codec: Codec) -> str:
    """The codec as configured, in one line: its name, its first field and those that are not as by default; "over" the one inside."""
    names = {kind: name for name, kind in catalog.CODECS.items()}
    told: list[str] = []
    inside = ""
    kind: Any = type(codec)  # a frozen dataclass, as all codecs are; their base class is none
    for one in fields(kind):
        value = getattr(codec, one.name)
        if isinstance(value, Codec):
            inside = f" over {describe_codec(value)}"
        elif value != one.default or not told:
            told.append(f"{one.name} {_value_text(value)}")
    name = names.get(type(codec), type(codec).__name__.lower())
    return name + (f" ({', '.join(told)})" if told else "") + inside


def _value_text(value: object) -> str:
    """As the configuration file has it."""
    return f"{value:g}" if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else str(value)


def render_codecs(plans: Sequence[StreamPlan], console: Console, epochs: Sequence[float] = EPOCHS_SHOWN) -> None:
    """Print the block "Codecs": how each tensor is sent, and what the whole run sends beside 16-bit values; nothing without streams.

    Where no codec tells first from later visits, the number of epochs makes no difference and one column says it.
    """
    from rich.text import Text

    if not plans:
        return
    console.print(Text("Codecs", style="bold"))
    for plan in plans:
        console.print(Text(f"  {plan.place:<17} {shorten(plan.codec, LINE_CHARACTERS)}"), no_wrap=True, overflow="ellipsis")
    same = all(max(plan.run_bytes) - min(plan.run_bytes) <= 1e-9 * max(plan.run_bytes) for plan in plans)
    heads = ("run",) if same else tuple("1 epoch" if count == 1 else f"{_count_text(count)} epochs" for count in epochs)
    console.print(_table(plans, heads))
    console.print(Text(NOTE, style="dim"))


def _count_text(count: float) -> str:
    """A number of epochs: whole where it is."""
    return f"{count:g}" if count == int(count) else number_text(count, 2)


def _table(plans: Sequence[StreamPlan], heads: Sequence[str]) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, pad_edge=False)
    table.add_column("whole run", no_wrap=True)
    for head in ("bits,\nfirst", "bits,\nlater", "16 bit", *heads):
        table.add_column(Text(head), justify="right", no_wrap=True)
    for plan in plans:
        bits = (number_text(plan.first_bits), number_text(plan.later_bits))
        table.add_row(plan.place, *bits, bytes_text(plan.plain_bytes), *(bytes_text(value) for value in plan.run_bytes[: len(heads)]))
    table.add_section()
    for name, kept in (("up", "up "), ("down", "down "), ("both", "")):
        plain, sums = _sums([plan for plan in plans if plan.place.startswith(kept)], len(heads))
        table.add_row(name, "", "", bytes_text(plain), *(bytes_text(value) for value in sums), style="bold" if name == "both" else "")
    plain, sums = _sums(plans, len(heads))
    table.add_row("of 16 bit", "", "", "100 %", *(percent_text(value / plain) for value in sums), style="bold")
    return table


def _sums(plans: Sequence[StreamPlan], columns: int) -> tuple[float, list[float]]:
    return sum(plan.plain_bytes for plan in plans), [sum(plan.run_bytes[index] for plan in plans) for index in range(columns)]
