"""Numbers and names as people read them: units, rounding, shortening, HTML escaping. For `apps/report*` and `apps/plot*` only."""

from __future__ import annotations

import html
import math
import unicodedata

BYTE_UNITS: tuple[tuple[float, str], ...] = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B"))
TIME_UNITS: tuple[tuple[float, str], ...] = ((3600.0, "h"), (60.0, "min"), (1.0, "s"), (1e-3, "ms"))
COUNT_UNITS: tuple[tuple[float, str], ...] = ((1e12, "T"), (1e9, "G"), (1e6, "M"))
MISSING = "\N{EM DASH}"


def clean(value: object) -> str:
    """`value` as text on one line; control and direction-override characters, which could forge what is shown, become U+FFFD."""
    return "".join("\N{REPLACEMENT CHARACTER}" if unicodedata.category(char) in ("Cc", "Cf", "Cs") else char for char in str(value))


def escape(value: object) -> str:
    """`clean(value)`, safe as HTML text and inside a quoted attribute."""
    return html.escape(clean(value), quote=True)


def shorten(value: object, limit: int) -> str:
    """At most `limit` characters, an ellipsis in the middle so that numbered names stay distinct."""
    text = clean(value)
    if len(text) <= limit:
        return text
    tail = (limit - 1) // 2
    return text[: limit - 1 - tail] + "\N{HORIZONTAL ELLIPSIS}" + text[len(text) - tail :]


def is_number(value: float | None) -> bool:
    """Present and finite."""
    return value is not None and math.isfinite(value)


def number_text(value: float | None, digits: int = 3) -> str:
    """`digits` significant figures, thousands grouped, no exponent below 1e15; a dash for what is missing or not finite."""
    if value is None or not math.isfinite(value):
        return MISSING
    if value == 0:
        return "0"
    magnitude = math.floor(math.log10(abs(value)))
    if magnitude >= 15 or magnitude < -6:
        return f"{value:.{digits - 1}e}"
    return f"{value:,.{max(0, digits - 1 - magnitude)}f}"


def count_text(value: float) -> str:
    """12,345 in full; from a million on 1.23 M."""
    for size, unit in COUNT_UNITS:
        if abs(value) >= size:
            return f"{number_text(value / size)} {unit}"
    return f"{value:,.0f}"


def pick_unit(largest: float, units: tuple[tuple[float, str], ...]) -> tuple[float, str]:
    """The largest unit not above `largest` (the smallest one for zero): one unit for a whole axis."""
    for size, unit in units:
        if largest >= size:
            return size, unit
    return units[-1]


def bytes_text(value: float | None) -> str:
    """Decimal units (1 kB = 1000 B), three figures."""
    if value is None or not math.isfinite(value):
        return MISSING
    if abs(value) < 1000:
        return f"{value:.0f} B" if value == int(value) else f"{number_text(value)} B"
    size, unit = pick_unit(abs(value), BYTE_UNITS)
    return f"{number_text(value / size)} {unit}"


def seconds_text(value: float | None) -> str:
    """830 ms, 12.3 s, 4 min 05 s, 1 h 12 min, 3 d 4 h."""
    if value is None or not math.isfinite(value):
        return MISSING
    if value < 0.9995:
        return f"{number_text(value * 1000)} ms" if value else "0 s"
    if value < 59.95:
        return f"{number_text(value)} s"
    whole = round(value)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(value / 60)
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    hours = round(value / 3600)
    return f"{hours // 24} d {hours % 24} h"


def percent_text(fraction: float | None) -> str:
    """A whole percentage; one decimal below ten."""
    if fraction is None or not math.isfinite(fraction):
        return MISSING
    percent = 100 * fraction
    return f"{percent:.0f} %" if abs(percent) >= 9.95 or percent == 0 else f"{percent:.1f} %"


def change_text(before: float | None, after: float | None) -> str:
    """Relative change with its sign, a real minus included."""
    if before is None or after is None or not (math.isfinite(before) and math.isfinite(after)) or before == 0:
        return MISSING
    change = after / before - 1
    sign = "\N{MINUS SIGN}" if change < 0 else "+"
    return f"{sign}{percent_text(abs(change))}"


def plural(count: int, word: str) -> str:
    """1 round, 2 rounds."""
    return f"{count:,} {word}" if count == 1 else f"{count:,} {word}s"


def utc_text(stamp: str) -> str:
    """An ISO 8601 moment for reading: 2026-04-01 09:30:00 UTC."""
    return clean(stamp).replace("T", " ", 1).replace("+00:00", " UTC").replace("Z", " UTC")
