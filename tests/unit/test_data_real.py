"""The data layer on real data sets and tokenizers; skipped where these are not at hand beside the repository."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from splitft.data.federate import federate
from splitft.data.jsonl import JsonLines
from splitft.data.partitions.by_column import ByColumn
from splitft.data.partitions.length_dirichlet import LengthDirichlet

SHARED = Path(__file__).parents[3] / "shared"


def at_hand(name: str) -> str:
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"../shared/{name} is not here")
    return str(path)


def tokenizer(name: str) -> Any:
    return AutoTokenizer.from_pretrained(at_hand(name), local_files_only=True)


@pytest.mark.parametrize("name", ["tokenizers/gpt2", "models/babyllama105"])
@pytest.mark.parametrize("packing", ["blocks", "documents"])
def test_e2e_trains_the_references(name: str, packing: Any) -> None:
    source = JsonLines(at_hand("data/e2e/test.jsonl.gz"), prompt="mr", completion="ref")
    tokens = tokenizer(name)
    data = federate(source.documents(), tokens, LengthDirichlet(alpha=0.3), 5, 0, packing, block_tokens=256)
    assert sum(client.documents for client in data.clients) + len(data.manifest["common_held_out"]["documents"]) == 4693
    assert data.skew_index > 0.2
    train = data.clients[0].train
    assert 0.2 * train.tokens < train.target_tokens < 0.6 * train.tokens
    ids, _, trained = train.batch([0])
    assert "name :" not in tokens.decode(ids[trained])
    assert "name :" in tokens.decode(ids[0])


def test_shakespeare_by_speaker() -> None:
    source = JsonLines(at_hand("data/tinyshakespeare/speeches.jsonl.gz"))
    data = federate(source.documents(), tokenizer("tokenizers/gpt2"), ByColumn("speaker"), 8, 0)
    assert data.clients[0].name.startswith("GLOUCESTER and ")
    sizes = [client.train.tokens for client in data.clients]
    assert max(sizes) < 1.1 * min(sizes)
    assert data.skew_index < 0.15
