"""A secret in a simulated run's text is in nothing that run, report and audit leave behind, with one exception that is documented."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from transformers import AutoTokenizer
from typer.testing import CliRunner

from splitft.apps.api import run
from splitft.apps.audit_command import audit

from ..tiny_run import text_file, tiny_config

CANARY = "zebrafinch quintessence 7194 obsidian"
CACHES: dict[str, Any] = {"uplink": {"name": "residual"}, "downlink": {"name": "residual"}}
# Rows come again, so that caches know them; the audit after it is of a later visit too.
COMMON: dict[str, Any] = {"rounds": 2, "clients": {"count": 2}, "policy": {"name": "fixed", "cuts": [2, 1]}, "train": {"local_steps": 12}}


def patterns(model: Path) -> dict[str, bytes]:
    """The canary as text in several codings, its words, and any eight of its tokens in a row as numbers of any width."""
    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    ids = np.array(tokenizer.encode(CANARY, add_special_tokens=False))
    found = {code: CANARY.encode(code) for code in ("utf-8", "utf-16-le", "utf-32-le")}
    found |= {f"base64 {k}": base64.b64encode(CANARY.encode()[k : k + 24])[4:-4] for k in range(3)}
    for start in range(len(ids) - 8):
        window = ids[start : start + 8]
        found |= {f"tokens {start} {kind}": window.astype(kind).tobytes() for kind in ("uint8", "<u2", "<i4", "<i8", ">i4", "<f4")}
        found |= {f"tokens {start} with {comma!r}": comma.join(map(str, window)).encode() for comma in (", ", ",", "\n", ",\n    ")}
    return found | {word: word.encode() for word in CANARY.split() if not word.isdigit()}


def seen_in(blob: bytes, known: dict[str, bytes]) -> list[str]:
    return [name for name, pattern in known.items() if pattern in blob]


def left_behind(folder: Path, **changes: Any) -> tuple[dict[str, list[str]], str]:
    """What of the canary is in every file of a run and its audit, by name; and what was printed."""
    config = tiny_config(folder, **{**COMMON, **changes})
    secret = "\n\n".join(f"{CANARY} and more of it {CANARY} number {n} round client server" for n in range(30)) + "\n"
    (folder / "text.txt").write_text(secret)
    known = patterns(folder / "model")
    assert {"utf-8", "zebrafinch"} <= set(seen_in(secret.encode(), known)), "the search finds what is there"
    done = run(config).folder
    app = typer.Typer()
    app.command()(audit)
    public = text_file(folder / "public.txt", documents=300, seed=5)
    options = ["--sequences", "2", "--tokens", "12", "--public", str(public)]
    said = CliRunner().invoke(app, [str(done), *options], env={"COLUMNS": "120"}, catch_exceptions=False)
    files = [path for path in (folder / "runs").rglob("*") if path.is_file()]
    assert {"audit.json", "audit.svg", "report.html", "journal.jsonl", "config.toml"} <= {path.name for path in files}
    assert any("checkpoints" in path.parts for path in files)
    return {str(path.relative_to(done)): seen for path in files if (seen := seen_in(path.read_bytes(), known))}, said.output


@pytest.mark.timeout(120)
@pytest.mark.parametrize("changes", [{}, {**CACHES, "split": {"labels": "client"}, "engine": {"name": "workers"}}], ids=["plain", "caches"])
def test_the_canary_is_in_no_file_and_on_no_screen(tmp_path: Path, changes: dict[str, Any]) -> None:
    found, said = left_behind(tmp_path, **changes)
    assert found == {}
    assert "Tokens recovered" in said
    assert not seen_in(said.encode(), patterns(tmp_path / "model"))


@pytest.mark.timeout(120)
def test_a_server_that_remembers_labels_by_sample_keeps_them_in_its_checkpoints(tmp_path: Path) -> None:
    """The exception, as docs/privacy.md has it: with caches and labels on the server they are sent once, and so it has to keep them. They
    are the text, and the search finds them where they are, and nowhere else."""
    found, _ = left_behind(tmp_path, **CACHES, engine={"name": "workers"})
    assert found
    assert all(name.startswith("checkpoints") for name in found), found
