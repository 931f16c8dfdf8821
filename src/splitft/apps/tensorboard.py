"""TensorBoard events from a journal: the same figures as the report, for those who keep their runs side by side there.

Written after the fact and with the journal's own times, so exporting twice gives the same file. Needs the extra `tensorboard`;
neither TensorFlow nor torch is used.
"""

from __future__ import annotations

import importlib
import io
import math
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from splitft.apps.report_codecs import codec_sums
from splitft.apps.report_files import write_atomically
from splitft.apps.report_record import Evaluation, Round, RunRecord, load_record
from splitft.apps.report_text import clean
from splitft.errors import MissingExtraError
from splitft.types import DIRECTIONS

FOLDER = "tensorboard"
EVENTS_NAME = "events.out.tfevents.splitft"


class Scalar(NamedTuple):
    """One point: the chart it belongs to, its position (round, or local step for `train/step_loss`), its value, when (Unix seconds)."""

    tag: str
    step: int
    value: float
    moment_s: float


def export_tensorboard(run_dir: Path) -> Path:
    """Write `tensorboard/events.out.tfevents.splitft` into the run folder and return its path, replacing an earlier one.

    Raises `MissingExtraError` without the package `tensorboard`, `CheckpointError` for a journal that cannot be read.
    """
    event_type, summary_type, writer_type = _tensorboard()
    record = load_record(Path(run_dir))
    buffer = io.BytesIO()
    # RecordWriter closes what it writes to, and the bytes are needed after that: keep them on flush.
    writer = writer_type(buffer)
    writer.write(event_type(wall_time=_started_s(record), file_version="brain.Event:2").SerializeToString())
    for point in scalars(record):
        summary = summary_type(value=[summary_type.Value(tag=point.tag, simple_value=point.value)])
        writer.write(event_type(wall_time=point.moment_s, step=point.step, summary=summary).SerializeToString())
    writer.flush()
    folder = Path(run_dir) / FOLDER
    folder.mkdir(exist_ok=True)
    return write_atomically(folder / EVENTS_NAME, buffer.getvalue())


def _tensorboard() -> tuple[Any, Any, Any]:
    """The three classes used, typed loosely: the package has no annotations."""
    try:
        event = importlib.import_module("tensorboard.compat.proto.event_pb2")
        summary = importlib.import_module("tensorboard.compat.proto.summary_pb2")
        writer = importlib.import_module("tensorboard.summary.writer.record_writer")
    except ImportError as error:
        raise MissingExtraError(
            f"TensorBoard events need the package tensorboard ({error}).", 'Install it with: pip install "splitft[tensorboard]"'
        ) from error
    return event.Event, summary.Summary, writer.RecordWriter


def _started_s(record: RunRecord) -> float:
    """The start of the run in Unix seconds; 0 when the journal does not say."""
    try:
        moment = datetime.fromisoformat(record.started.utc)
    except ValueError:
        return 0.0
    return moment.timestamp() if moment.tzinfo is not None else 0.0


def scalars(record: RunRecord) -> Iterator[Scalar]:
    """Every finite figure of the run in order. Wall time advances by each round's own seconds."""
    now_s = _started_s(record)
    evaluations = {item.round: item for item in record.evaluations}
    names = {client: clean(record.client_name(client)).replace("/", "_") for client in record.client_ids}
    step = 0
    if 0 in evaluations:
        yield from _finite(_evaluation_points(evaluations[0], names), 0, now_s)
    for item in record.rounds:
        for index, loss in enumerate(item.step_losses, start=1):
            share = index / len(item.step_losses)
            yield from _finite([("train/step_loss", loss)], step + index, now_s + share * item.wall_s)
        step += len(item.step_losses)
        now_s += item.wall_s
        yield from _finite(_round_points(item, names, record.kinds), item.round, now_s)
        if item.round in evaluations:
            yield from _finite(_evaluation_points(evaluations[item.round], names), item.round, now_s)


def _finite(points: list[tuple[str, float | None]], step: int, moment_s: float) -> Iterator[Scalar]:
    for tag, value in points:
        if value is not None and math.isfinite(value):
            yield Scalar(tag, step, float(value), moment_s)


def _round_points(item: Round, names: dict[int, str], kinds: tuple[str, ...]) -> list[tuple[str, float | None]]:
    points: list[tuple[str, float | None]] = [
        ("train/loss", item.loss),
        ("train/learning_rate", item.learning_rate),
        ("train/tokens", item.tokens),
        ("time/virtual_round_s", item.duration_s),
        ("time/wall_round_s", item.wall_s),
        ("aggregation/aggregated", float(item.aggregated)),
    ]
    points += [(f"aggregation/{clean(name).replace('/', '_')}", value) for name, value in item.metrics.items()]
    points += [(f"clients/{state}", float(count)) for state, count in item.states.items()]
    for way in DIRECTIONS:
        points += [(f"bytes_{way}/{kind}", item.traffic(way, kind)) for kind in kinds]
        points.append((f"bytes_{way}/total", item.traffic(way)))
    for client in item.clients:
        points += [(f"cut/{names[client.client]}", client.cut), (f"train_loss/{names[client.client]}", client.loss_mean)]
    return points + _codec_points(item)


def _codec_points(item: Round) -> list[tuple[str, float | None]]:
    """Ratios of each place's codec, the dial and the probe; the place with an underscore, as tags have it."""
    points: list[tuple[str, float | None]] = []
    for place in dict.fromkeys(place for client in item.clients for place in client.codec):
        sums = codec_sums((item,), place)
        figures = {"share": sums.share, "skip_rate": sums.skip_rate, "residual_share": sums.residual_share, "error": sums.error}
        points += [(f"codec/{_tag(place)}/{name}", value) for name, value in figures.items()]
    for group, values in (("dial", item.dial), ("probe", item.probe)):
        points += [(f"{group}/{_tag(name)}", value) for name, value in values.items()]
    return points


def _tag(name: str) -> str:
    return clean(name).replace("/", "_").replace(" ", "_")


def _evaluation_points(item: Evaluation, names: dict[int, str]) -> list[tuple[str, float | None]]:
    points: list[tuple[str, float | None]] = [
        ("held_out/loss", item.overall.loss),
        ("held_out/perplexity", item.overall.perplexity),
        ("held_out/accuracy", item.overall.accuracy),
    ]
    return points + [(f"perplexity/{names[score.client]}", score.perplexity) for score in item.clients]
