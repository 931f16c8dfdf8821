"""The letters of a federation: what client and server say to each other around the engine's own frames. Typed msgpack, bounded, validated.

    client                                   server
    HELLO (versions, name)              ->   WELCOME (run, seat, configuration, parts of the model)      or a refusal
    FETCH (part, offset)                ->   PART (bytes)                                                as often as needed
    READY (rows, memory, snapshots)     ->
                                        <-   OPEN (which snapshot to begin from, ROUND_START frame, moments)
    OPENED (ok, moments)                ->
    FRAME (STEP_UP ...)                 ->   FRAME (STEP_DOWN ...)                                       engine/messages, unchanged
    REPORT (losses, seconds), FRAME     ->   FRAME (ROUND_ACCEPTED), after the commit COMMITTED
                                        <-   FINISH (send what you have), REFUSED (why), FINISHED (the run is over)

HELLO and WELCOME are the payloads of the transport's own handshake. Every letter but FRAME is one msgpack struct.
"""

from __future__ import annotations

import enum
from typing import Annotated, Any, Literal, TypeVar

import msgspec

from splitft.errors import (
    AdapterError,
    CheckpointError,
    CodecError,
    ConfigError,
    DataError,
    IdentityError,
    MissingExtraError,
    ModelError,
    PolicyError,
    ProtocolError,
    ResourceError,
    SplitftError,
)

# A peer of another major version is refused at the door; a minor one adds fields that others ignore.
PROTOCOL_MAJOR, PROTOCOL_MINOR = 1, 0
MAX_LETTER_BYTES = 1 << 20
PART_BYTES = 4 << 20
MOST_WORDS = 2000
# What a client says of errors whose messages may quote its data, its files or its machine.
WORDLESS: dict[type[SplitftError], str] = {
    AdapterError: "the adapters do not fit",
    CheckpointError: "what it remembers cannot be used",
    CodecError: "a codec refuses what it is given",
    ConfigError: "it cannot follow the configuration",
    DataError: "its data cannot be used",
    IdentityError: "its certificate or a key cannot be used",
    MissingExtraError: "it lacks an optional package",
    ModelError: "the base model cannot be used",
    ResourceError: "its memory, disk or device is not enough",
}


class Letter(enum.IntEnum):
    """What a message of a session is."""

    FRAME = 1
    FETCH = 2
    PART = 3
    READY = 4
    OPEN = 5
    OPENED = 6
    REPORT = 7
    REFUSED = 8
    FINISH = 9
    COMMITTED = 10
    FINISHED = 11


class Hello(msgspec.Struct, frozen=True, omit_defaults=True):
    """A client at the door. `name` must be that of its certificate."""

    major: int
    minor: int
    version: str
    name: str
    takeover: bool = False
    needs: list[str] = []


class PartInfo(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A piece of the base model: a safetensors file, named by what it holds and by its content."""

    name: str
    sha256: str
    size_bytes: int


class Welcome(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a client is told at the door. `config` is the part of the run's configuration that binds both sides, as JSON."""

    major: int
    minor: int
    version: str
    run: str
    seat: int
    round: int
    rounds: int
    config: str
    model: str
    parts: list[PartInfo]
    offers: list[str] = []


class Fetch(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Bytes of a part from `offset` on, at most PART_BYTES."""

    sha256: str
    offset: int


class Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The answer to a FETCH."""

    sha256: str
    offset: int
    data: bytes


class Snapshot(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A client's state after a round it has taken part in; `digest` is that of the ROUND_END it sent."""

    round: int
    digest: str


class Ready(msgspec.Struct, frozen=True, omit_defaults=True):
    """A client that can take part: rows and tokens of its training data, rows it holds out, what it can hold and remembers."""

    rows: int
    tokens: int
    documents: int
    held_out_rows: int
    data: str
    memory_bytes: int
    snapshots: list[Snapshot] = []
    device: str = ""


class Open(msgspec.Struct, frozen=True, omit_defaults=True):
    """A round begins for a client: the engine's frame, the snapshot to begin from (none: afresh, `batches` drawn so far), moments of
    the blocks it is given ([from, to)), blocks whose moments it is to return."""

    round: int
    frame: bytes
    purpose: Literal["train", "evaluate"] = "train"
    base: Snapshot | None = None
    batches: Annotated[int, msgspec.Meta(ge=0, le=1 << 53)] = 0
    moments: bytes = b""
    gives: tuple[int, int] = (0, 0)
    returns: tuple[int, int] = (0, 0)


class Opened(msgspec.Struct, frozen=True, omit_defaults=True):
    """A client is at the beginning of the round; not `ok`: it has lost the snapshot."""

    round: int
    ok: bool = True
    moments: bytes = b""


class Report(msgspec.Struct, frozen=True, omit_defaults=True):
    """What only the client knows of its round: mean loss of each step, tokens, seconds by kind of work, facts of its codecs."""

    round: int
    step_losses: list[float] = []
    tokens: int = 0
    seconds: dict[str, float] = {}
    facts: dict[str, dict[str, float]] = {}


class Refused(msgspec.Struct, frozen=True, omit_defaults=True):
    """A message was refused; the client is out of this round, and `final` means of the run."""

    round: int
    text: str
    remedy: str
    strikes: int = 0
    final: bool = False


class Finish(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The round's deadline has come: send what is done."""

    round: int


class Committed(msgspec.Struct, frozen=True, omit_defaults=True):
    """A round is on the server's disk; `counted`: with this client's update."""

    round: int
    counted: bool = True


class Finished(msgspec.Struct, frozen=True, omit_defaults=True):
    """The run is over, or the server goes away (`over` false: come back)."""

    rounds: int
    over: bool = True
    text: str = ""
    adapter: list[PartInfo] = []


LetterT = TypeVar("LetterT", bound=msgspec.Struct)


def pack(letter: Any) -> bytes:
    """A letter as bytes."""
    return msgspec.msgpack.encode(letter)


def read(form: type[LetterT], data: bytes | bytearray | memoryview) -> LetterT:
    """A letter from bytes. Raises ProtocolError naming the field that is wrong."""
    try:
        return msgspec.msgpack.decode(data, type=form)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, OverflowError) as problem:
        raise ProtocolError(f"{form.__name__}: {problem}.", "run the same splitft version on both sides.") from problem


def refusal(index: int, problem: SplitftError) -> Refused:
    """What a client that leaves tells the server: in words only what is about the server's own orders and messages. Any other message stays
    with the client's operator, and so does every remedy: they name its files, and errors of data quote them."""
    text = problem.message[:MOST_WORDS]
    if type(problem) not in (PolicyError, ProtocolError):
        said = WORDLESS.get(type(problem))
        text = "it cannot go on; its own log says why." if said is None else f"{said} ({type(problem).__name__}); its own log says why."
    return Refused(index, text, "", final=True)
