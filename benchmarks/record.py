"""What a measurement leaves behind: a JSON file with its machine, versions and timings, and the tables and plots of docs/benchmarks.md."""

from __future__ import annotations

import json
import os
import platform
import re
import sys
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

from splitft.apps.console import usable_cores
from splitft.apps.report_files import write_atomically

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "benchmarks.md"
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
NOTHING_YET = "No measurement is recorded yet: `make bench` writes one here."
PACKAGES = ("splitft", "torch", "transformers", "peft", "numpy")
FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16", "sve")
SCHEMA = 1
TITLES = {
    "throughput": "Speed",
    "flower": "Beside Flower",
    "growth": "Ten to a thousand clients",
    "memory": "Memory of a process",
    "codecs": "Codecs at the cut",
    "floors": "Time over the floor",
    "startup": "Start-up",
    "federation": "The federation on a network",
}
Rows = list[dict[str, Any]]


def machine() -> dict[str, Any]:
    """What the figures depend on. No host name: it says nothing to anybody else."""
    facts = dict(_cpu_facts())
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "processor": facts.get("model name") or platform.processor() or platform.machine(),
        "cores": usable_cores(),
        "features": [name for name in FEATURES if name in (facts.get("flags") or facts.get("Features") or "").split()],
        "memory_bytes": pages,
        "system": f"{platform.system()} {platform.machine()}",
        "load_before": round(os.getloadavg()[0], 2),
    }


def _cpu_facts(source: Path = Path("/proc/cpuinfo")) -> Iterator[tuple[str, str]]:
    """Facts of the first processor, as Linux tells them; nothing elsewhere."""
    if source.exists():
        for line in source.read_text().split("\n\n")[0].splitlines():
            name, _, value = line.partition(":")
            yield name.strip(), value.strip()


def versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def machine_name(facts: dict[str, Any]) -> str:
    """A file name's worth of the machine, such as `amd-epyc-2-cores`."""
    words = re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)|\bcpu\b.*", "", str(facts["processor"]).lower())).strip("-")
    return f"{words or 'unknown'}-{facts['cores']}-cores"


def write_result(folder: Path, date: str, name: str, rows: Rows, facts: dict[str, Any]) -> Path:
    """Write benchmark `name` into <date>-<machine>.json; the others in it, measured earlier that day on that machine, stay.

    Each carries its own machine, versions and settings (`facts`), for they may have changed in between.
    """
    path = folder / f"{date}-{machine_name(facts['machine'])}.json"
    sections: dict[str, Any] = json.loads(path.read_text("utf-8"))["sections"] if path.exists() else {}
    sections[name] = {"date": date, **facts, "rows": rows}
    folder.mkdir(parents=True, exist_ok=True)
    return write_atomically(path, (json.dumps({"schema": SCHEMA, "sections": sections}, indent=1) + "\n").encode())


def newest_sections(folder: Path = RESULTS) -> dict[str, Any]:
    """Each benchmark as last measured: files are read by date, later ones replace earlier ones."""
    found: dict[str, Any] = {}
    for path in sorted(folder.glob("*.json")):
        found.update(json.loads(path.read_text("utf-8"))["sections"])
    return found


def render(sections: dict[str, Any]) -> str:
    """The text between the markers."""
    from benchmarks.plots import PLOTS, file_name

    parts = []
    for name, title in TITLES.items():
        if name in sections:
            parts.append(f"## {title}")
            if name in PLOTS:
                parts.append(f"![{PLOTS[name][1]}](images/{file_name(name)})")
            parts += [import_module(f"benchmarks.{name}").table(sections[name]["rows"]), _conditions(sections[name])]
    return "\n\n".join(parts) or NOTHING_YET


def _conditions(section: dict[str, Any]) -> str:
    """One line: the machine, the versions, the threads, and how busy the machine was."""
    facts, packages = section["machine"], section["versions"]
    named = ", ".join(f"{name} {number.partition('+')[0]}" for name, number in packages.items())
    features = f" ({', '.join(facts['features'])})" if facts["features"] else ""
    return (
        f"<sub>{section['date']}; {facts['processor']}{features}, {facts['cores']} cores, {facts['memory_bytes'] / 2**30:.0f} GiB, "
        f"{facts['system']}; {section['threads']} threads; {named}; load {facts['load_before']} before the start.</sub>"
    )


def write_page(text: str, page: Path = PAGE) -> None:
    """Put `text` between the markers of the page."""
    before, begin, rest = page.read_text("utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise RuntimeError(f"{page} has lost its markers {BEGIN} and {END}.")
    write_atomically(page, f"{before}{BEGIN}\n\n{text}\n\n{END}{after}".encode())


def page_text(page: Path = PAGE) -> str:
    """What stands between the markers of the page."""
    return page.read_text("utf-8").partition(BEGIN)[2].partition(END)[0].strip()


def command_line() -> str:
    """The command that was given, to be given again; where a path on this machine stood, its last part."""
    return " ".join(["python -m benchmarks", *(Path(part).name if Path(part).is_absolute() else part for part in sys.argv[1:])])
