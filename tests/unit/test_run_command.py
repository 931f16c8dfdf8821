"""`splitft run` as a process: stopped by a signal, resumed, reported, exported; errors as a person reads them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from splitft.apps.cli import main

from ..tiny_run import tiny_config

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def splitft(*arguments: str) -> int:
    """The command in this process; its exit code."""
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    return int(stop.value.code or 0)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_by_a_signal_and_resumed(tmp_path: Path, number: signal.Signals, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_config(tmp_path, rounds=400)
    (tmp_path / "run.toml").write_text(config.to_toml())
    command = [sys.executable, "-m", "splitft", "run", str(tmp_path / "run.toml")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    folder = tmp_path / "runs" / "tiny"
    deadline = time.monotonic() + 60
    while not (folder / "checkpoints" / "round-00002").exists() and not (folder / "checkpoints" / "round-00003").exists():
        assert time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert f"splitft run --resume {folder}" in error
    assert "Traceback" not in error
    done = max(int(path.name.split("-")[1]) for path in (folder / "checkpoints").glob("round-*"))
    assert splitft("run", "--resume", str(folder), f"rounds={done + 1}") == 0
    assert "Held-out perplexity" in capsys.readouterr().out
    assert (folder / "report.html").is_file()
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()


def test_errors_name_value_allowed_and_remedy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_config(tmp_path)
    (tmp_path / "run.toml").write_text(config.to_toml())
    path = str(tmp_path / "run.toml")
    cases = {
        ("policy.cuts=[9]",): (2, ["policy.cuts", "9", "1..4"]),
        ("uplink=casst",): (2, ["casst", "identity", "Did you mean 'cast'"]),
        ("uplink.dtyp=float16",): (2, ["dtyp", "Did you mean 'dtype'"]),
        ("tokens.block_tokens=4096",): (2, ["4096", "64 positions"]),
        ("model.path=./nowhere",): (4, ["nowhere", "config.json"]),
        ("data.path=./absent.txt",): (3, ["absent.txt"]),
        ("clients.count=500",): (3, ["500"]),
        ("lora.targets=[\"q_proj\"]",): (5, ["q_proj", "attn.c_attn"]),
    }  # fmt: skip
    for overrides, (code, words) in cases.items():
        found = splitft("run", path, *overrides)
        error = capsys.readouterr().err
        assert found == code, (overrides, error)
        assert "Traceback" not in error
        for word in words:
            assert word in error, (overrides, word, error)
