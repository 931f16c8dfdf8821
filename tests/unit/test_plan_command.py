"""apps/plan_command.py: from a configuration to the tables of `splitft plan`, with the rule a run would use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from splitft.apps.plan_command import planned_layout, show_plan, widths_of
from splitft.errors import AdapterError
from splitft.lora import Layout
from splitft.models.anatomy import describe
from splitft.peft_format import write_adapter

from ..tiny_run import tiny_config

PATH = "transformer.h"


def printed(capsys: pytest.CaptureFixture[str], folder: Path, **changes: Any) -> str:
    show_plan(tiny_config(folder, **changes))
    return " ".join(capsys.readouterr().out.split())


def test_one_table_per_profile_and_a_note_on_the_row_length(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    devices = {"count": 3, "profiles": ["phone", "laptop", "phone"]}
    text = printed(capsys, tmp_path, clients=devices, policy={"name": "fixed"})
    assert text.count("server workstation-gpu") == 2
    assert text.count("deepest within") == 2
    assert "every row counts as full (16 tokens)" in text


def test_where_the_data_decide_the_clients_every_named_profile_is_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for profiles in (["phone", "laptop"], ["desktop"]):
        changes: dict[str, Any] = {"clients": {"count": 0, "profiles": profiles}, "partition": {"name": "files"}}
        text = printed(capsys, tmp_path, **changes)
        assert all(f"on {name}, server" in text for name in profiles)


def test_the_ranks_of_an_adapter_to_start_from_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = tiny_config(tmp_path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(plain.model.path))
    shape = describe(model, "tiny")
    fresh = planned_layout(plain, shape, PATH)
    assert {entry.rank for entry in fresh.entries} == {2}
    stored = Layout.of(widths_of(shape, ["mlp.c_fc"]), 7, 2.0)
    write_adapter(tmp_path / "adapter", stored, stored.initial_row(1), PATH, "tiny", transposed=True)
    config = tiny_config(tmp_path, lora={"adapter": str(tmp_path / "adapter")})
    assert planned_layout(config, shape, PATH) == stored
    assert printed(capsys, tmp_path) != printed(capsys, tmp_path, lora={"adapter": str(tmp_path / "adapter")})
    with pytest.raises(AdapterError, match="cannot read"):
        planned_layout(tiny_config(tmp_path, lora={"adapter": str(tmp_path / "none")}), shape, PATH)
