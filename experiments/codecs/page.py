"""docs/codecs_results.md: the reading, with each `{{table ...}}` line replaced by its table."""

from __future__ import annotations

from pathlib import Path

from experiments.codecs.runs import ROOT
from experiments.codecs.tables import MAKERS

PAGE = ROOT / "docs" / "codecs_results.md"
PROSE = Path(__file__).resolve().parent / "reading.md"
HEAD = "<!-- Written by `python -m experiments.codecs page`; change reading.md or the figures in experiments/. -->\n"


def page() -> str:
    """The page from the kept figures. Raises KeyError for a table that does not exist."""
    lines = []
    for line in PROSE.read_text(encoding="utf-8").splitlines():
        if line.startswith("{{") and line.endswith("}}"):
            kind, *arguments = line[2:-2].split()
            lines.append(MAKERS[kind](*arguments).rstrip("\n"))
        else:
            lines.append(line)
    return HEAD + "\n".join(lines) + "\n"


def write() -> list[Path]:
    """The page and its images."""
    from experiments.codecs import plots

    PAGE.write_text(page(), encoding="utf-8")
    return [PAGE, *plots.write()]
