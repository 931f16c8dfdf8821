"""The attention a run takes on a CPU: checked before it is used, and a plainer one for families that do not know it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers as tf

from splitft.apps.assemble import load_base, load_split
from splitft.apps.session import FederatedRun
from splitft.models.attention import build_with, register

from ..data_tokenizer import byte_tokenizer
from ..tiny_run import model_folder, text_file, tiny_config

BFLOAT16 = {"model": {"dtype": "bfloat16"}, "engine": {"device": "cpu"}}


def falcon_folder(folder: Path) -> None:
    """Falcon looks its attention up in a table of its own."""
    tokenizer = byte_tokenizer()
    config = tf.FalconConfig(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=4, num_attention_heads=4)
    with torch.random.fork_rng(devices=[]):
        tf.AutoModelForCausalLM.from_config(config).float().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def test_falcon_trains_in_bfloat16(tmp_path: Path) -> None:
    falcon_folder(tmp_path / "model")
    text_file(tmp_path / "text.txt")
    run = FederatedRun(tiny_config(tmp_path, rounds=2, **BFLOAT16))
    assert run.assembly.base.dtype == torch.bfloat16
    assert run.assembly.federation.split.model.config._attn_implementation == "sdpa"
    rounds = [record.round for record in run.rounds()]
    run.close()
    events = [json.loads(line) for line in (run.folder / "journal.jsonl").read_text().splitlines()]
    losses = [event["global"]["loss"] for event in events if event["event"] == "evaluation"]
    assert rounds == [0, 1, 2]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(("family", "wanted"), [("llama", "splitft_causal"), ("gpt2", "splitft_causal"), ("gptj", "eager")])
def test_the_self_check_runs_what_the_run_uses(family: str, wanted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from splitft import selfcheck

    used: list[str] = []
    kept = selfcheck.loud

    def note(model: tf.PreTrainedModel) -> tf.PreTrainedModel:
        used.append(model.config._attn_implementation)
        return kept(model)

    monkeypatch.setattr(selfcheck, "loud", note)
    model_folder(tmp_path / "model", family)
    text_file(tmp_path / "text.txt")
    config = tiny_config(tmp_path, **BFLOAT16)
    _, _, model = load_split(config, load_base(config))
    assert used == [model.config._attn_implementation] == [wanted]


def test_only_a_refusal_of_the_attention_leads_to_a_plainer_one() -> None:
    asked: list[str] = []

    def build(name: str, problem: Exception, last: str) -> str:
        asked.append(name)
        if name != last:
            raise problem
        return name

    name = register()
    assert build_with(lambda one: build(one, KeyError(one), "sdpa"), name) == "sdpa"
    assert build_with(lambda one: build(one, ValueError("no attn_implementation"), "eager"), name) == "eager"
    assert asked == [name, "sdpa", name, "sdpa", "eager"]
    for problem in (KeyError("weight"), ValueError("bad shape")):
        with pytest.raises(type(problem)):
            build_with(lambda one, problem=problem: build(one, problem, "eager"), "sdpa")  # type: ignore[misc]
    with pytest.raises(KeyError):
        build_with(lambda one: build(one, KeyError(one), "nothing"), "eager")
