"""A journal read back as typed values: what a report, a table or an exporter may rely on."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import msgspec

from splitft.errors import CheckpointError
from splitft.types import DIRECTIONS, KINDS

JOURNAL_NAME = "journal.jsonl"
T = TypeVar("T")
Status = Literal["finished", "interrupted", "unfinished"]


class Score(msgspec.Struct, frozen=True):
    """Token-weighted held-out figures; None where nothing was measured."""

    loss: float | None = None
    perplexity: float | None = None
    accuracy: float | None = None
    tokens: int = 0


class ClientScore(Score, frozen=True, kw_only=True):
    """The same for one client's held-out slice."""

    client: int


class Evaluation(msgspec.Struct, frozen=True):
    """Event `evaluation`; round 0 is before training. `overall` is the journal's `global`."""

    round: int
    overall: Score = msgspec.field(name="global", default=Score())
    clients: tuple[ClientScore, ...] = ()


class Stage(NamedTuple):
    """One bar of the time line, in absolute virtual seconds."""

    client: int
    kind: str
    start_s: float
    end_s: float


class ClientRound(msgspec.Struct, frozen=True):
    """One client's part in a round. `bytes` is direction -> kind -> bytes; `busy_s`, stage kind -> seconds, may be absent.

    `status`: done, partial (cut short, counted) or lost. `refused_cut`: the deeper cut that was planned. `ranks`: one per adapter when
    they are not all `rank`; `truncated`: share of the global adapter's energy they could not hold. `staleness`: versions the update
    had missed when it was merged; only asynchronous rounds have it, and there the training may lie rounds back. `codec`: place ("up
    activations") -> what the codec there knows, as sums over its packets; `apps/report_codecs.py` reads it.
    """

    client: int
    cut: int
    rank: int = 0
    steps: int = 0
    status: str = "done"
    tokens: int = 0
    loss_first: float | None = None
    loss_mean: float | None = None
    loss_last: float | None = None
    finish_s: float | None = None
    server_wait_s: float = 0.0
    barrier_wait_s: float = 0.0
    bytes: dict[str, dict[str, float]] = {}
    busy_s: dict[str, float] = {}
    predicted_s: float | None = None
    refused_cut: int | None = None
    ranks: tuple[int, ...] = ()
    truncated: float | None = None
    staleness: float | None = None
    codec: dict[str, dict[str, float | None]] = {}

    def traffic(self, direction: str, kind: str | None = None) -> float:
        """Bytes in one direction, of one kind or of all."""
        kinds = self.bytes.get(direction, {})
        return sum(kinds.values()) if kind is None else kinds.get(kind, 0.0)


class Round(msgspec.Struct, frozen=True):
    """Event `round`. `metrics`: figures of the aggregation rule and of the synchronisation rule. `dial`: the factor of the codecs' errors
    in this round; `probe`: the loss of a probe slice with and without them; `controller`: what turned the dial says of it."""

    round: int
    clients: tuple[ClientRound, ...] = ()
    step_losses: tuple[float | None, ...] = ()
    virtual_start_s: float = 0.0
    virtual_end_s: float = 0.0
    wall_s: float = 0.0
    learning_rate: float | None = None
    aggregated: bool = True
    metrics: dict[str, float | None] = {}
    timeline: tuple[Stage, ...] = ()
    dial: dict[str, float | None] = {}
    probe: dict[str, float | None] = {}
    controller: dict[str, float | None] = {}

    @property
    def tokens(self) -> int:
        return sum(client.tokens for client in self.clients)

    @property
    def states(self) -> dict[str, int]:
        """How many participants are done, partial and lost."""
        counts = Counter(client.status for client in self.clients)
        return {state: counts[state] for state in ("done", "partial", "lost")}

    @property
    def duration_s(self) -> float:
        return max(0.0, self.virtual_end_s - self.virtual_start_s)

    @property
    def loss(self) -> float | None:
        """Mean training loss over the tokens of all participants."""
        known = [(c.loss_mean, max(c.tokens, 1)) for c in self.clients if c.loss_mean is not None and math.isfinite(c.loss_mean)]
        return sum(loss * tokens for loss, tokens in known) / sum(tokens for _, tokens in known) if known else None

    def traffic(self, direction: str, kind: str | None = None) -> float:
        return sum(client.traffic(direction, kind) for client in self.clients)


class ClientInfo(msgspec.Struct, frozen=True):
    """One client as the run began."""

    client: int
    name: str = ""
    documents: int = 0
    train_rows: int = 0
    train_tokens: int = 0
    held_out_tokens: int = 0
    profile: str = ""
    length_histogram: tuple[float, ...] = ()


class ModelInfo(msgspec.Struct, frozen=True):
    """The model as the run began."""

    name: str = ""
    architecture: str = ""
    parameters: int = 0
    blocks: int = 0
    hidden_size: int = 0
    vocabulary: int = 0


class RunStarted(msgspec.Struct, frozen=True):
    """Event `run_started`."""

    version: str = ""
    utc: str = ""
    name: str = ""
    config: dict[str, Any] = {}
    model: ModelInfo = ModelInfo()
    clients: tuple[ClientInfo, ...] = ()
    length_edges: tuple[float, ...] = ()
    skew_index: float | None = None
    clock: str = "virtual"
    partition: str = ""
    references: tuple[Any, ...] = ()


class Resumed(msgspec.Struct, frozen=True):
    """Event `resumed`: rounds up to `round` count, later ones were run again."""

    round: int
    utc: str = ""


class Warned(msgspec.Struct, frozen=True):
    """Event `warning`: what the run noticed in a round that its user should know."""

    text: str
    round: int = 0
    client: int | None = None


class RunFinished(msgspec.Struct, frozen=True):
    """Event `run_finished`."""

    rounds: int = 0
    wall_s: float = 0.0
    virtual_s: float = 0.0


@dataclass(frozen=True)
class RunRecord:
    """All a journal says of one run: rounds and evaluations in order, each once, the last version where a resumed run repeated one."""

    started: RunStarted
    rounds: tuple[Round, ...] = ()
    evaluations: tuple[Evaluation, ...] = ()
    resumed: tuple[Resumed, ...] = ()
    finished: RunFinished | None = None
    status: Status = "unfinished"
    warnings: tuple[Warned, ...] = ()

    @property
    def asynchronous(self) -> bool:
        """Whether rounds merge updates as they arrive."""
        return any(client.staleness is not None for item in self.rounds for client in item.clients)

    @property
    def client_ids(self) -> tuple[int, ...]:
        """Every client the run began with or that took part, in order."""
        ids = {info.client for info in self.started.clients}
        ids.update(client.client for item in self.rounds for client in item.clients)
        ids.update(score.client for item in self.evaluations for score in item.clients)
        return tuple(sorted(ids))

    @cached_property
    def _infos(self) -> dict[int, ClientInfo]:
        return {info.client: info for info in self.started.clients}

    def info(self, client: int) -> ClientInfo:
        return self._infos.get(client) or ClientInfo(client)

    def client_name(self, client: int) -> str:
        return self.info(client).name or f"client-{client}"

    @property
    def rounds_planned(self) -> int | None:
        planned = self.started.config.get("rounds")
        return planned if isinstance(planned, int) else None

    @property
    def tokens(self) -> int:
        """Tokens trained on, repeats included."""
        return sum(item.tokens for item in self.rounds)

    def traffic(self, direction: str | None = None, kind: str | None = None) -> float:
        """Bytes sent in one direction or both, of one kind or all."""
        return sum(item.traffic(way, kind) for item in self.rounds for way in ((direction,) if direction else DIRECTIONS))

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of bytes, in the fixed order; kinds a later version may add follow."""
        seen = {kind for item in self.rounds for client in item.clients for way in client.bytes.values() for kind in way}
        return KINDS + tuple(sorted(seen - set(KINDS)))

    @property
    def virtual_s(self) -> float:
        return max([item.virtual_end_s for item in self.rounds] + [self.finished.virtual_s if self.finished else 0.0])

    @property
    def wall_s(self) -> float:
        return max(sum(item.wall_s for item in self.rounds), self.finished.wall_s if self.finished else 0.0)

    @cached_property
    def _perplexities(self) -> dict[int | None, dict[int, float]]:
        """Client (None: the cohort) -> round -> perplexity, where measured and finite."""
        table: dict[int | None, dict[int, float]] = {}
        for item in self.evaluations:
            scores: list[tuple[int | None, Score]] = [(None, item.overall), *((score.client, score) for score in item.clients)]
            for client, score in scores:
                if score.perplexity is not None and math.isfinite(score.perplexity):
                    table.setdefault(client, {})[item.round] = score.perplexity
        return table

    def perplexities(self, client: int | None = None) -> list[tuple[int, float | None]]:
        """(round, held-out perplexity) for every evaluation, of the cohort (None) or one client; None where it was not measured."""
        known = self._perplexities.get(client, {})
        return [(item.round, known.get(item.round)) for item in self.evaluations]

    def before_after(self, client: int | None = None) -> tuple[float | None, float | None]:
        """Perplexity before training (round 0 only) and at the last evaluation after it that has one."""
        series = self.perplexities(client)
        before = next((value for number, value in series if number == 0), None)
        return before, next((value for number, value in reversed(series) if number > 0 and value is not None), None)


def read_journal(path: Path) -> list[dict[str, Any]]:
    """Events in order. A torn last line (the run died while writing it) is left out; any other damage raises `CheckpointError`."""
    return [event for _, event in _numbered_events(path)]


def load_record(path: Path) -> RunRecord:
    """The record of a run folder or of a journal file. Raises `CheckpointError` when it is missing, damaged or empty."""
    journal = path / JOURNAL_NAME if path.is_dir() else path
    return _build(journal, _numbered_events(journal))


def _numbered_events(path: Path) -> list[tuple[int, dict[str, Any]]]:
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise CheckpointError(
            f"No journal can be read at {path} ({error.strerror}).",
            f"Give the folder of a run, the one that holds {JOURNAL_NAME}.",
        ) from error
    filled = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    events: list[tuple[int, dict[str, Any]]] = []
    for position, (number, line) in enumerate(filled):
        try:
            event = json.loads(line)
            if not isinstance(event, dict) or not isinstance(event.get("event"), str):
                raise ValueError("it is not an object with a text field 'event'")
        except (ValueError, RecursionError) as error:
            if position == len(filled) - 1:
                break
            raise _damaged(path, number, str(error)) from error
        events.append((number, event))
    return events


def _damaged(path: Path, number: int, why: str) -> CheckpointError:
    return CheckpointError(
        f"{path}, line {number}: not a journal event: {why}.",
        "Only the last line of a journal may be incomplete; restore the file from a copy, or remove the damaged line.",
    )


def _build(path: Path, events: Sequence[tuple[int, dict[str, Any]]]) -> RunRecord:
    started: RunStarted | None = None
    rounds: dict[int, Round] = {}
    evaluations: dict[int, Evaluation] = {}
    resumed: list[Resumed] = []
    warnings: list[Warned] = []
    finished: RunFinished | None = None
    status: Status = "unfinished"
    for number, event in events:
        kind = event["event"]
        if kind in ("resumed", "round", "evaluation"):
            finished, status = None, "unfinished"
        if kind == "run_started":
            started = _convert(event, RunStarted, path, number)
            rounds, evaluations, resumed, warnings, finished, status = {}, {}, [], [], None, "unfinished"
        elif kind == "round":
            item = _convert(event, Round, path, number)
            rounds[item.round] = item
        elif kind == "evaluation":
            scored = _convert(event, Evaluation, path, number)
            evaluations[scored.round] = scored
        elif kind == "joined" and started is not None:
            started = _with_client(started, _convert(event, ClientInfo, path, number))
        elif kind == "warning":
            warnings.append(_convert(event, Warned, path, number))
        elif kind == "resumed":
            resumed.append(_convert(event, Resumed, path, number))
            rounds = _up_to(rounds, resumed[-1].round)
            evaluations = _up_to(evaluations, resumed[-1].round)
            warnings = [one for one in warnings if one.round <= resumed[-1].round]
        elif kind == "interrupted":
            status = "interrupted"
        elif kind == "run_finished":
            finished, status = _convert(event, RunFinished, path, number), "finished"
    if started is None:
        raise CheckpointError(f"{path} holds no run_started event.", "The run stopped before it began; start it again.")
    return RunRecord(started, _in_order(rounds), _in_order(evaluations), tuple(resumed), finished, status, tuple(warnings))


def _convert(event: dict[str, Any], kind: type[T], path: Path, number: int) -> T:
    try:
        return msgspec.convert(event, kind)
    except msgspec.ValidationError as error:
        raise _damaged(path, number, str(error)) from error


def _with_client(started: RunStarted, joined: ClientInfo) -> RunStarted:
    """The beginning of a run with what a client of a federation has said of itself since."""
    clients = tuple(
        msgspec.structs.replace(
            one, name=joined.name, documents=joined.documents, train_rows=joined.train_rows, train_tokens=joined.train_tokens
        )
        if one.client == joined.client
        else one
        for one in started.clients
    )
    return msgspec.structs.replace(started, clients=clients)


def _up_to(items: dict[int, T], last: int) -> dict[int, T]:
    return {number: item for number, item in items.items() if number <= last}


def _in_order(items: dict[int, T]) -> tuple[T, ...]:
    return tuple(items[number] for number in sorted(items))


def finite(values: Iterable[float | None]) -> list[float]:
    """The values that are there and finite."""
    return [value for value in values if value is not None and math.isfinite(value)]
