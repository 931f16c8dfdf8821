"""The public Python interface: its names, that importing it is cheap, and that runs from Python are the runs of the command line."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path

import pytest

import splitft
from splitft.errors import CheckpointError, ConfigError

from ..tiny_run import tiny_config


def in_fresh_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_names_are_sorted_and_there() -> None:
    assert splitft.__all__ == sorted(splitft.__all__)
    assert set(splitft._HOME) | {"__version__"} == set(splitft.__all__)
    assert set(splitft.__all__) <= set(dir(splitft))
    for name in splitft.__all__:
        value = getattr(splitft, name)
        if name != "__version__":
            assert value.__name__ == name
            assert value.__doc__, f"{name} has no reference text"


def test_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(AttributeError, match=r"'runn'.*open_run"):
        _ = splitft.runn


def test_importing_brings_neither_torch_nor_the_hugging_face_libraries() -> None:
    heavy = "{'torch', 'transformers', 'peft', 'tokenizers', 'numpy', 'rich', 'pydantic'}"
    assert in_fresh_python(f"import sys, splitft; print({heavy} & set(sys.modules))") == "set()\n"


def test_configurations_and_reports_need_no_torch() -> None:
    names = "load_config, parse_config, demo_config, RunConfig, SplitftError, open_run, run, write_report"
    code = f"import sys\nfrom splitft import {names}\nload_config(None)\ndemo_config()\nprint('torch' in sys.modules)"
    assert in_fresh_python(code) == "False\n"


def test_a_run_from_python_sets_threads_before_torch_comes() -> None:
    code = """
import os, sys, types
for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY"):
    os.environ.pop(name, None)
import splitft
sys.modules["splitft.apps.session"] = types.SimpleNamespace(FederatedRun=lambda config, folder: None)  # what would import torch
splitft.open_run(overrides=["engine.threads=1"])
print(os.environ["OMP_NUM_THREADS"], os.environ["OMP_WAIT_POLICY"])
sys.modules["torch"] = types.SimpleNamespace()
splitft.open_run(overrides=["engine.threads=2"])
print(os.environ["OMP_NUM_THREADS"])
"""
    assert in_fresh_python(code) == "1 PASSIVE\n1\n"


def test_run_finishes_and_takes_a_path_overrides_or_a_configuration(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    (tmp_path / "tiny.toml").write_text(config.to_toml(), "utf-8")
    run = splitft.run(tmp_path / "tiny.toml", ["rounds=1", "name=short"])
    assert run.folder.name == "short"
    (run.folder / "report.html").unlink()
    assert splitft.write_report(str(run.folder)) == run.folder / "report.html"
    assert splitft.load_config(str(tmp_path / "tiny.toml")) == splitft.load_config(tmp_path / "tiny.toml") == config
    assert (run.folder / "report.html").is_file()
    assert (run.folder / "adapter" / "adapter_config.json").is_file()
    assert [row["round"] for row in run.metrics()] == [0, 1]
    with pytest.raises(ConfigError, match="exists already"):
        splitft.run(config, ["rounds=1", "name=short"])
    run = splitft.run(config, ["rounds=1", "name=other"])
    assert run.folder.name == "other"


def test_leaving_early_and_resuming_in_either_way_gives_the_whole_run(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    whole = splitft.run(config, ["name=whole"]).metrics()
    with contextlib.closing(splitft.open_run(config)) as run:
        for record in run.rounds():
            if record.round == 1:
                break
    with contextlib.closing(splitft.open_run(config, resume=True)) as run:
        assert run.state.round == 1
        assert next(run.rounds()).round == 2
    resumed = splitft.run(resume=run.folder)
    timeless = [[{k: v for k, v in row.items() if k != "wall_s"} for row in rows] for rows in (whole, resumed.metrics())]
    assert timeless[0] == timeless[1]


def test_resuming_what_is_no_run_is_refused_and_leaves_no_folder(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    for resume in (True, tmp_path / "nowhere"):
        with pytest.raises(CheckpointError, match="not a run folder"):
            splitft.open_run(config, resume=resume)
    with pytest.raises(CheckpointError, match="nowhere"):
        splitft.run(resume=str(tmp_path / "nowhere"))
    assert not (tmp_path / "nowhere").exists()
    assert not Path(config.run.folder).exists()


def test_overrides_as_one_text_are_refused(tmp_path: Path) -> None:
    for wrong in (lambda: splitft.open_run(overrides="rounds=1"), lambda: splitft.load_config(None, "rounds=1")):
        with pytest.raises(ConfigError, match="overrides"):
            wrong()
    with pytest.raises(ConfigError, match="overrides"):
        splitft.open_run(tiny_config(tmp_path), "rounds=1")
