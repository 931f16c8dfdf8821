"""What the codecs did, from the journal's sums: shares, rates, errors, bytes by stage; and one table row per place on the wire.

A codec's facts are sums over samples and values, so those of clients, rounds and places add up; every figure here is a ratio of two.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from splitft.apps.report_record import Round, RunRecord
from splitft.apps.report_tables import table_html
from splitft.apps.report_text import MISSING, bytes_text, number_text, percent_text
from splitft.compress.base import HEADER_BYTES

PLACES = ("up activations", "down gradients", "down activations", "up gradients", "up adapters", "down adapters")
SIMILARITY_BINS = 20
HEADERS, VALUES = "headers", "values"  # what is left of a packet beside the stages told of
_STAGE, _BYTES, _SAVED = "stage_", "_bytes", "_saved_bytes"
MEANINGS = (
    "Share: of what the same packets would take as 16-bit values. Skipped: samples of which nothing new was sent. Residual: energy of the "
    "change since a sample was last sent, as a share of the sample's own. Error: root mean square at the cut, as a share of the values'."
)


def ratio_text(value: float | None) -> str:
    """A percentage; below one per cent with two significant figures, since codecs' errors may be small."""
    return f"{number_text(100 * value, 2)} %" if value is not None and 0 < abs(value) < 0.01 else percent_text(value)


class Stages(NamedTuple):
    """Bytes by the stage that made them, and what of all of them travelled: less, where a lossless stage packed them further."""

    made: dict[str, float]
    sent: float


@dataclass(frozen=True)
class CodecSums:
    """The facts of any number of clients, rounds and places, one mapping each."""

    parts: tuple[Mapping[str, float | None], ...]

    def total(self, name: str) -> float:
        """The sum of one fact over all that know it."""
        return math.fsum(value for part in self.parts if (value := part.get(name)) is not None and math.isfinite(value))

    def ratio(self, over: str, under: str) -> float | None:
        """One fact by another, over the parts that know both; None where that is nothing."""
        both = CodecSums(tuple(part for part in self.parts if part.get(over) is not None and part.get(under) is not None))
        below = both.total(under)
        return both.total(over) / below if below > 0 else None

    @property
    def share(self) -> float | None:
        """Bytes sent by those of the same packets as 16-bit values."""
        return self.ratio("bytes", "plain_bytes")

    @property
    def skip_rate(self) -> float | None:
        return self.ratio("skipped", "samples")

    @property
    def residual_share(self) -> float | None:
        """Energy of the change against the caches by that of the samples they know."""
        return self.ratio("residual_squared", "known_squared")

    @property
    def error(self) -> float | None:
        """Root mean square error by the root mean square of the values."""
        squared = self.ratio("squared_error", "squared")
        return None if squared is None else math.sqrt(max(squared, 0.0))

    @property
    def rank(self) -> float | None:
        return self.ratio("rank_sum", "rank_samples")

    def similarity(self) -> tuple[float, ...]:
        """Samples by similarity to what the caches hold, in equal bins over [0, 1]; empty where nothing was compared."""
        counts = tuple(self.total(f"similarity_{index:02d}") for index in range(SIMILARITY_BINS))
        return counts if sum(counts) > 0 else ()

    def stages(self) -> Stages | None:
        """Bytes by stage; None where no codec told of stages.

        A lossless stage (it tells what it saved) counts as a stage of its own where nothing inside it told of stages; else those inside
        are shown as they were before it. What no stage claims is the packets' headers, and values of a codec without stages.
        """
        made, sent = dict[str, float](), self.total("bytes")
        names = {name for part in self.parts for name in part if name.startswith(_STAGE) and name.endswith(_BYTES)}
        saved = {name.removeprefix(_STAGE).removesuffix(_SAVED): self.total(name) for name in names if name.endswith(_SAVED)}
        for name in sorted(names):
            if not name.endswith(_SAVED):
                made[name.removeprefix(_STAGE).removesuffix(_BYTES)] = self.total(name)
        if not made:
            return None
        before = sent
        for name, less in saved.items():
            packed = made.pop(name, 0.0)
            if before + less - sum(made.values()) >= packed + less:
                made[name] = packed
            else:
                before += less
        rest = max(0.0, before - sum(made.values()))
        made[HEADERS] = min(rest, HEADER_BYTES * self.total("packets"))
        made[VALUES] = made.get(VALUES, 0.0) + rest - made[HEADERS]
        return Stages({name: value for name, value in made.items() if value > 0}, sent)


def codec_sums(rounds: Iterable[Round], place: str | None = None) -> CodecSums:
    """The facts of these rounds at one place, or at all of them."""
    return CodecSums(
        tuple(
            facts for item in rounds for client in item.clients for at, facts in client.codec.items() if facts and place in (None, at)
        )
    )  # fmt: skip


def codec_places(record: RunRecord) -> tuple[str, ...]:
    """The places codecs tell of, in the fixed order; places a later version may add follow."""
    seen = {place for item in record.rounds for client in item.clients for place, facts in client.codec.items() if facts}
    return tuple(place for place in PLACES if place in seen) + tuple(sorted(seen - set(PLACES)))


def stages_by_place(rounds: Iterable[Round], places: Iterable[str]) -> Stages | None:
    """Bytes by stage over several places: each place has its own codec, so each is read for itself and then added."""
    kept = tuple(rounds)
    found = [one for place in places if (one := codec_sums(kept, place).stages()) is not None]
    if not found:
        return None
    made: dict[str, float] = {}
    for one in found:
        for name, value in one.made.items():
            made[name] = made.get(name, 0.0) + value
    return Stages(made, sum(one.sent for one in found))


def share_of_16_bit(record: RunRecord) -> float | None:
    """All bytes of the run by what they would be with every codec's packets as 16-bit values; None where the journal does not say."""
    sums = codec_sums(record.rounds)
    known = CodecSums(tuple(part for part in sums.parts if part.get("bytes") is not None and part.get("plain_bytes") is not None))
    plain = record.traffic() - known.total("bytes") + known.total("plain_bytes")
    return record.traffic() / plain if known.total("plain_bytes") > 0 and plain > 0 else None


def codec_rows(record: RunRecord) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Columns and one row per place, all together last. Columns of which no codec speaks are left out; no rows without codecs."""
    rows = [(place, codec_sums(record.rounds, place)) for place in codec_places(record)]
    if not rows:
        return (), []
    rows.append(("all", codec_sums(record.rounds)))
    table = [_cells(name, sums) for name, sums in rows]
    used = [column for column in table[0] if any(row[column] != MISSING for row in table)]
    return tuple(used), [tuple(row[column] for column in used) for row in table]


def _cells(name: str, sums: CodecSums) -> dict[str, str]:
    mixed = name == "all"  # errors and energies of different tensors have no common measure
    plain = sums.total("plain_bytes")
    return {
        "tensor": name,
        "packets": f"{sums.total('packets'):,.0f}",
        "bytes": bytes_text(sums.total("bytes")),
        "as 16 bit": bytes_text(plain) if plain else MISSING,
        "share": ratio_text(sums.share),
        "skipped": MISSING if mixed else ratio_text(sums.skip_rate),
        "residual": MISSING if mixed else ratio_text(sums.residual_share),
        "error": MISSING if mixed else ratio_text(sums.error),
        "mean rank": MISSING if mixed else number_text(sums.rank),
    }


def codec_table(record: RunRecord) -> str:
    """The table as a figure of the page; empty without codecs' facts."""
    columns, rows = codec_rows(record)
    if not rows:
        return ""
    caption = f'<figcaption><h3>Codecs in numbers</h3><p class="say">{MEANINGS}</p></figcaption>'
    table = table_html(columns, tuple(rows), sum_row=True)
    return f'<figure class="fig wide below" id="codec-table">{caption}<div class="scroll open">{table}</div></figure>'
