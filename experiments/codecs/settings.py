"""What is trained: a model, a text, a side that holds the exit; and the configuration of a run of it.

A setting has 160 documents, one row each: 60 held out from everyone, 20 for each of five clients. So 5 steps of 4 rows are exactly one
epoch of every client.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
CLIENTS, ROWS, HELD_OUT_ROWS = 5, 20, 60
DOCUMENTS = CLIENTS * ROWS + HELD_OUT_ROWS
BATCH_ROWS = 4
LINK = "laptop-10"
SETTING_TITLES = {"server": "exit on the server", "client": "U-shape"}


@dataclass(frozen=True)
class Length:
    """A run: so many rounds of so many local steps. The learning rate falls to zero over the run, so each length is a run of its own."""

    rounds: int
    local_steps: int

    @property
    def epochs_a_round(self) -> int:
        return self.local_steps * BATCH_ROWS // ROWS

    @property
    def epochs(self) -> int:
        return self.rounds * self.epochs_a_round


LENGTHS: Mapping[int, Length] = {one.epochs: one for one in (Length(1, 5), Length(3, 5), Length(5, 10), Length(25, 10))}


@dataclass(frozen=True)
class Text:
    """Documents of a file of JSON lines: which fields make a record, and the fewest characters it must have together."""

    path: str
    fields: tuple[str, ...]
    least_characters: int = 1

    def records(self, source: Path) -> list[dict[str, str]]:
        """DOCUMENTS different records, evenly spaced over the file; ValueError when it has fewer."""
        found: dict[str, dict[str, str]] = {}
        for record in _lines(source):
            kept = {name: str(record[name]) for name in self.fields}
            text = "\n".join(kept.values())
            if len(text) >= self.least_characters:
                found.setdefault(text, kept)
        listed = list(found.values())
        if len(listed) < DOCUMENTS:
            raise ValueError(f"{source}: {len(listed)} different records of {self.least_characters} characters, {DOCUMENTS} are needed.")
        return [listed[index * len(listed) // DOCUMENTS] for index in range(DOCUMENTS)]


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


@dataclass(frozen=True)
class Setting:
    """A model on a text. `model`: "embedded", or a folder below the folder of models. `text` None: the standard library's docstrings."""

    name: str
    title: str
    model: str
    text: Text | None
    form: Mapping[str, Any]
    learning_rate: float
    exit: str = "server"

    @property
    def heading(self) -> str:
        return f"{self.title}, {SETTING_TITLES[self.exit]}"

    @property
    def plain(self) -> str:
        """The name without the side of the exit."""
        return self.name.removesuffix("-u")

    def data(self, texts: Path, work: Path) -> dict[str, Any]:
        """The source's section. Writes the chosen records below `work` the first time."""
        if self.text is None:
            return dict(self.form)
        path = work / "data" / f"{self.plain}.jsonl"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = "".join(json.dumps(record) + "\n" for record in self.text.records(texts / self.text.path))
            part = path.with_suffix(".part")
            part.write_text(lines, encoding="utf-8")
            part.replace(path)
        return {**self.form, "path": str(path.resolve())}

    def values(self, seed: int, epochs: int) -> dict[str, Any]:
        """The run's configuration but for names of places and the codecs."""
        return {
            "seed": seed,
            "rounds": LENGTHS[epochs].rounds,
            "model": {"path": self.model, "self_check": False},
            "tokens": {"packing": "documents", "block_tokens": 128, "held_out": 0.0, "common_held_out": HELD_OUT_ROWS / DOCUMENTS},
            "partition": {"name": "iid"},
            "clients": {"count": CLIENTS, "profiles": [LINK], "server_profile": "workstation-gpu"},
            "policy": {"name": "fixed", "cuts": [2]},
            "split": {"labels": self.exit},
            "train": {
                "local_steps": LENGTHS[epochs].local_steps,
                "batch_size": BATCH_ROWS,
                "learning_rate": self.learning_rate,
            },
            "engine": {"threads": 1},
            "run": {"keep_checkpoints": 1},
        }


# Docstrings and speeches long enough to fill a row of 128 tokens; restaurant descriptions as long as they are.
DOCSTRINGS = {"name": "python_docs", "max_documents": DOCUMENTS, "min_characters": 700}
PAIRS = {"name": "jsonl", "prompt": "mr", "completion": "ref", "joint": "||"}
LINES = {"name": "jsonl"}
SPEECHES = Text("tinyshakespeare/speeches.jsonl.gz", ("text",), 160)
RESTAURANTS = Text("e2e/train.jsonl.gz", ("mr", "ref"))
_DOCS = Setting("python_docs", "embedded model, Python docstrings", "embedded", None, DOCSTRINGS, 5e-4)
_PLAYS = Setting("shakespeare", "babyllama105, tinyshakespeare", "babyllama105", SPEECHES, LINES, 5e-4)
_MEALS = Setting("e2e", "embedded model, E2E", "embedded", RESTAURANTS, PAIRS, 5e-4)
SETTINGS: Mapping[str, Setting] = {
    one.name: one for plain in (_PLAYS, _DOCS) for one in (plain, replace(plain, name=f"{plain.name}-u", exit="client"))
} | {_MEALS.name: _MEALS}
