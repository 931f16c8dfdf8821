"""The bytes of split fine-tuning in closed form: ours from the message format, and the SplitFT paper's published figures from a formula.

SplitFT: arXiv 2604.26388. The formula is a reconstruction from the figures themselves: the paper states neither the number of steps, nor
what it counts, nor that its "MB" are 2^20 bytes; with the values below every published row comes out within 0.06.

Axes: b sequences, t tokens, d width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from splitft.engine.ledger import Counts, empty_counts, merge_counts

MIB = 2**20
CLIENTS, TOTAL_STEPS, TURN_STEPS, UPLOADS = 5, 1143, 20, 57
# Table I: cut -> (mean elapsed s, MB) at r_cut 8. Table II: r_cut -> MB at cut 2; its last row is table I's "No Cut": rank 16 everywhere.
PUBLISHED_CUTS = {2: (810.4, 3475.4), 4: (863.2, 3534.4), 6: (934.2, 3593.4), 8: (1113.4, 3652.4), 10: (1104.7, 3711.4)}
PUBLISHED_RANKS = {1: 3462.5, 2: 3464.3, 4: 3468.0, 8: 3475.4, 16: 3490.1}
# The message format written out once more, not imported: if the format changes, the closed form shall disagree.
PACKET_HEADER_BYTES, FRAME_HEADER_BYTES, STEP_FIELDS_BYTES = 32, 20, 40
# The opening message has more than 15 possible fields, so its map has the long head even where defaults are left out.
LONG_MAP_BYTES = 2


@dataclass(frozen=True)
class Setting:
    """What bytes depend on, apart from cut, ranks and codec. `block_parameters`: LoRA parameters of a block per rank."""

    batch_size: int
    sequence_tokens: int
    hidden_size: int
    vocabulary: int
    blocks: int
    modules: int
    block_parameters: int
    rank: int

    def adapter_bytes(self, cut: int, cut_rank: int) -> int:
        """float32 values of the client's adapters: `cut_rank` in its last block, `rank` in the others."""
        return 4 * self.block_parameters * (self.rank * (cut - 1) + cut_rank)


@dataclass(frozen=True)
class Turn:
    """One client's round. `client` and the numbers that a message carries count, for msgpack packs small ones tighter."""

    cut: int
    cut_rank: int
    steps: int
    client: int = 0
    round: int = 1
    first_step: int = 0


def packed_bytes(value: object) -> int:
    """Length of a value in msgpack, for what round messages hold: maps, short names, lists, flags, floats, numbers from 0 to 2^32 - 1."""
    if isinstance(value, bool):
        return 1
    if isinstance(value, int):
        return next(size for size, end in ((1, 1 << 7), (2, 1 << 8), (3, 1 << 16), (5, 1 << 32)) if value < end)
    if isinstance(value, float):
        return 9
    if isinstance(value, str):
        return len(value) + (1 if len(value) < 32 else 2)
    if isinstance(value, list):
        return (1 if len(value) < 16 else 3) + sum(map(packed_bytes, value))
    assert isinstance(value, Mapping)
    return (1 if len(value) < 16 else 3) + sum(packed_bytes(name) + packed_bytes(item) for name, item in value.items())


def _counts(up: Mapping[str, int], down: Mapping[str, int]) -> Counts:
    found = empty_counts()
    found["up"].update(up)
    found["down"].update(down)
    return found


def step_counts(setting: Setting, value_bytes: float = 4.0, token_bytes: float = 0.0) -> Counts:
    """One exchange: activations [b*t d] and labels [b*t] up, gradients [b*t d] down, with packet headers and frames.

    `value_bytes` a value at the cut, and `token_bytes` a token beside (a quantiser's scale).
    """
    tokens = setting.batch_size * setting.sequence_tokens
    tensor_bytes = PACKET_HEADER_BYTES + int(tokens * (setting.hidden_size * value_bytes + token_bytes))
    label_bytes = PACKET_HEADER_BYTES + tokens * (2 if setting.vocabulary < 65_535 else 4)
    frame_bytes = FRAME_HEADER_BYTES + STEP_FIELDS_BYTES
    return _counts(
        {"activations": tensor_bytes, "labels": label_bytes, "control": frame_bytes + 4 * setting.batch_size},
        {"gradients": tensor_bytes, "control": frame_bytes},
    )


def opening_counts(setting: Setting, turn: Turn) -> Counts:
    """What opens a turn: the plan and the adapters, down."""
    ranks = [turn.cut_rank if block == turn.cut - 1 else setting.rank for block in range(setting.blocks) for _ in range(setting.modules)]
    fields = {
        "round": turn.round,
        "client": turn.client,
        "cut": turn.cut,
        "tail_blocks": 0,
        "exit_on_client": False,
        "local_steps": turn.steps,
        "gradient_accumulation": 1,
        "batch_size": setting.batch_size,
        "rank": setting.rank,
        "clip_norm": 1.0,
        "first_step": turn.first_step,
        "rates": [0.0] * turn.steps,
        "ranks": ranks,
    }
    adapters = PACKET_HEADER_BYTES + setting.adapter_bytes(turn.cut, turn.cut_rank)
    control = FRAME_HEADER_BYTES + packed_bytes(fields) + LONG_MAP_BYTES
    return _counts({}, {"control": control, "adapters": adapters})


def closing_counts(setting: Setting, turn: Turn) -> Counts:
    """What closes a turn: the report and the adapters up, the acceptance down."""
    names = {"round": turn.round, "client": turn.client}
    report = {**names, "tokens": turn.steps * setting.batch_size * (setting.sequence_tokens - 1), "squared_norm": 0.0, "loss_sum": 0.0}
    adapters = PACKET_HEADER_BYTES + setting.adapter_bytes(turn.cut, turn.cut_rank)
    return _counts(
        {"control": FRAME_HEADER_BYTES + packed_bytes(report), "adapters": adapters},
        {"control": FRAME_HEADER_BYTES + packed_bytes(names)},
    )


def turn_counts(setting: Setting, turn: Turn, value_bytes: float = 4.0) -> Counts:
    """The closed form of a whole turn."""
    return merge_counts([opening_counts(setting, turn), *[step_counts(setting, value_bytes)] * turn.steps, closing_counts(setting, turn)])


def schedule_turns(cut: int, cut_rank: int, turn_steps: int = TURN_STEPS, total_steps: int = TOTAL_STEPS) -> list[Turn]:
    """One client at a time, `turn_steps` each, until all steps are done; the last turn has what is left."""
    starts = range(0, total_steps, turn_steps)
    return [
        Turn(cut, cut_rank, min(turn_steps, total_steps - start), number % CLIENTS, number + 1, start)
        for number, start in enumerate(starts)
    ]


def split_run(setting: Setting, turns: list[Turn], step: Counts) -> tuple[Counts, Counts]:
    """A whole run in two parts: what the paper's figures count (steps and uploads), and what they leave out (openings, acceptances).

    As in those figures, a last turn shorter than the others never uploads.
    """
    closings = [closing_counts(setting, turn) for turn in turns if turn.steps == turns[0].steps]
    steps = [step] * sum(turn.steps for turn in turns)
    uploads = [_counts(one["up"], {}) for one in closings]
    others = [opening_counts(setting, turn) for turn in turns] + [_counts({}, one["down"]) for one in closings]
    return merge_counts([*steps, *uploads]), merge_counts(others)


def total_bytes(counts: Counts) -> int:
    """All kinds, both directions."""
    return sum(sum(kinds.values()) for kinds in counts.values())


def published_mib(cut: int, cut_rank: int) -> float:
    """The published "MB" as a formula: 1143 steps of float32 activations up and gradients down, 57 uploads of float32 adapters.

    Two constants are fitted: 1900 bytes a step (labels and serialisation) and 2000 a block and upload (serialisation).
    """
    step_bytes = 2 * 4 * 128 * 768 * 4 + 1900
    upload_bytes = 8448 * 4 * (16 * (cut - 1) + cut_rank) + 2000 * cut
    return (TOTAL_STEPS * step_bytes + UPLOADS * upload_bytes) / MIB
