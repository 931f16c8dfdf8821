"""Runs with `engine.name = "ray"`: the journal of the in-process engine, a Ray that stays on this machine and ends with the run."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from splitft.apps.assemble import assemble, build_components
from splitft.apps.executors import in_slots
from splitft.apps.ray_engine import Skeleton, crew_of, require_ray
from splitft.apps.session import FederatedRun
from splitft.config import RunConfig, parse_config
from splitft.errors import ConfigError, MissingExtraError, ResourceError

from ..tiny_run import tiny_config

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed: pip install 'splitft[ray]'")
SCENE: dict[str, Any] = {"rounds": 2, "clients": {"count": 5}, "policy": {"name": "fixed", "cuts": [1, 2, 3, 1, 2]}}


def config(folder: Path, name: str, engine: str, **changes: Any) -> RunConfig:
    settings = {"name": engine, "cohort_size": 2, "threads": 1, "store": changes.pop("store", "memory")}
    return tiny_config(folder, name=name, engine=settings, **{**SCENE, **changes})


def run(settled: RunConfig) -> tuple[bytes, list[dict[str, Any]]]:
    opened = FederatedRun(settled)
    try:
        list(opened.rounds())
        folder = opened.finish()
    finally:
        opened.close()
    return outcome(folder)


def outcome(folder: Path) -> tuple[bytes, list[dict[str, Any]]]:
    """The adapter file, and the journal without wall time and what names the engine."""
    events = [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]
    kept = [{key: value for key, value in event.items() if key not in ("wall_s", "utc", "config", "name")} for event in events]
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes(), kept


@needs_ray
@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize(
    "changes",
    [
        {"clients": {"count": 5, "buffer": 2}},
        {"aggregator": {"name": "residual"}, "model": {"dtype": "float32"}, "train": {"moments": "reset"}},
        {"synchronisation": {"name": "drift"}, "store": "disk"},
        {"bottleneck": {"channels": 6, "noise": 0.5}},
        {  # two independent things in a run, which starts two processes
            "split": {"server": "unaveraged"},
            "model": {"dtype": "bfloat16"},
            "uplink": {"name": "projection", "inner": {"name": "residual", "ignore": 0.1}},
            "downlink": {"name": "feedback", "inner": {"name": "topk"}},
            "adapter_uplink": {"name": "feedback", "inner": {"name": "quantize", "bits": 4}},
            "controller": {"name": "bang_bang"},
            "train": {"batch_size": 8, "local_steps": 4},
        },
    ],
    ids=["asynchronous", "folding", "drift", "bottleneck", "unaveraged, codecs with memory"],
)
def test_a_run_is_the_run_of_one_process(tmp_path: Path, changes: dict[str, Any]) -> None:
    assert run(config(tmp_path, "spread", "ray", **changes)) == run(config(tmp_path, "here", "cohort", **changes))


@needs_ray
@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="reads Linux's tables of sockets")
@pytest.mark.usefixtures("local_ray")
def test_a_ray_of_ours_listens_on_the_loopback_address_alone() -> None:
    import ray

    marks = [ray._private.worker._global_node.get_session_dir_path(), "ray::"]
    loopback = {"0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"}
    owned: set[str] = {str(os.getpid())}
    for process in Path("/proc").glob("[0-9]*"):
        text = _read(process / "cmdline").replace("\0", " ")
        if any(mark in text for mark in marks):
            owned.add(process.name)
    assert len(owned) > 3
    sockets = {_target(link) for pid in owned for link in Path(f"/proc/{pid}/fd").glob("*")}
    listening = []
    for table in ("tcp", "tcp6"):
        for line in _read(Path("/proc/net") / table).splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in sockets:
                listening.append(fields[1].split(":")[0])
    assert len(listening) > 2
    assert set(listening) <= loopback


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _target(link: Path) -> str:
    try:
        return os.readlink(link)
    except OSError:
        return ""


def command(tmp_path: Path, rounds: int, actors: int = 1) -> tuple[list[str], Path]:
    settled = config(tmp_path, "command", "cohort", rounds=rounds)
    path = tmp_path / "config.toml"
    path.write_text(settled.to_toml())
    return [sys.executable, "-m", "splitft", "run", str(path), "--engine", "ray", f"engine.actors={actors}"], tmp_path / "runs" / "command"


def leftovers(folder: str) -> list[str]:
    """Processes that still mention a folder."""
    return [text for process in Path("/proc").glob("[0-9]*") if folder in (text := _read(process / "cmdline"))]


@needs_ray
@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_a_run_on_a_cluster_that_is_there(tmp_path: Path) -> None:
    """Another process joins by address, gives the run of one process, and leaves the cluster running."""
    import ray

    line, folder = command(tmp_path, 2, actors=2)
    address = ray.get_runtime_context().gcs_address
    loopback = {**os.environ, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}  # else Ray looks for it at this machine's outer address
    done = subprocess.run([*line, "--address", address], capture_output=True, text=True, timeout=120, env=loopback)
    assert done.returncode == 0, done.stderr
    assert outcome(folder) == run(config(tmp_path, "here", "cohort"))
    assert ray.is_initialized()
    assert ray.cluster_resources()["CPU"] == 2.0


@needs_ray
@pytest.mark.slow
def test_no_ray_at_an_address_is_said(tmp_path: Path) -> None:
    line, _ = command(tmp_path, 1)
    done = subprocess.run([*line, "--address", "127.0.0.1:1"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 9, done.stderr
    assert "there is no Ray to be had at engine.address" in done.stderr


@needs_ray
@pytest.mark.slow
def test_ctrl_c_ends_the_run_and_its_ray(tmp_path: Path) -> None:
    """The signal goes to the whole group, as a terminal sends it."""
    line, folder = command(tmp_path, 100_000)
    before = set(Path("/tmp").glob("splitft-ray-*"))
    process = subprocess.Popen(line, stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stderr is not None
    for text in process.stderr:
        if text.startswith("round   2"):
            break
    started = {str(path) for path in set(Path("/tmp").glob("splitft-ray-*")) - before}
    os.killpg(process.pid, signal.SIGINT)
    told = process.stderr.read()
    process.stderr.close()
    assert process.wait(60) == 130, told
    assert "splitft run --resume" in told
    assert json.loads((folder / "journal.jsonl").read_text().splitlines()[-1])["event"] == "interrupted"
    assert not any(leftovers(path) for path in started)
    assert not any(Path(path).exists() for path in started)


@pytest.mark.parametrize(
    ("cores", "cohorts", "actors", "threads", "wanted"),
    [
        ((8,), 100, 0, 0, (8, 1, 1.0)),
        ((8,), 3, 0, 0, (3, 2, 2.0)),
        ((8,), 1, 0, 0, (1, 8, 8.0)),
        ((8,), 100, 0, 4, (2, 4, 4.0)),
        ((8,), 100, 2, 0, (2, 4, 4.0)),
        ((16, 4), 100, 0, 4, (5, 4, 4.0)),
        ((16, 4), 2, 0, 0, (2, 8, 8.0)),
        ((1,), 100, 0, 4, (1, 4, 1.0)),
        ((8,), 100, 3, 4, (3, 4, 2.0)),
    ],
)
def test_a_crew_fits_its_machines(
    cores: tuple[float, ...], cohorts: int, actors: int, threads: int, wanted: tuple[int, int, float]
) -> None:
    count, each, share = crew_of(cores, cohorts, actors, threads)
    assert (count, each) == wanted[:2]
    assert sum(int(one / share) for one in cores) >= count
    assert share <= wanted[2]


def test_more_actors_than_cores_share_them() -> None:
    count, threads, share = crew_of((2.0, 1.0), 100, 7, 0)
    assert (count, threads) == (7, 1)
    assert sum(int(one / share) for one in (2.0, 1.0)) >= 7
    assert 7 * share > 2  # and not far below what is there


@pytest.mark.parametrize("server", ["shared", "alternating", "sequential"])
def test_one_set_of_server_adapters_is_refused(server: str) -> None:
    settled = parse_config({"split": {"server": server}, "engine": {"name": "ray"}})
    with pytest.raises(ConfigError) as caught:
        build_components(settled)
    assert any('engine.name = "ray"' in line for line in caught.value.problems)


def test_a_model_spread_over_gpus_is_refused() -> None:
    settled = parse_config({"model": {"device_map": "auto"}, "engine": {"name": "ray"}})
    with pytest.raises(ConfigError) as caught:
        build_components(settled)
    assert any("model.device_map" in line for line in caught.value.problems)


@pytest.mark.parametrize("field", ["engine.address=auto", "engine.actors=2"])
def test_fields_of_ray_need_its_engine(field: str) -> None:
    with pytest.raises(ConfigError, match=f"{field.split('=')[0]}.*needs engine.name"):
        parse_config({}, [field])
    assert parse_config({}, [field, "engine.name=ray"]).engine.name == "ray"


def test_other_versions_are_refused_on_the_machine_that_has_them(tmp_path: Path) -> None:
    built = assemble(config(tmp_path, "any", "cohort"))
    base = built.base
    made = Skeleton(built.config, base.config, base.anatomy, base.dtype, base.attention, in_slots, (), ("0.0", "1.0"))
    with pytest.raises(ConfigError, match=r"the run was started with 0\.0 and torch 1\.0"):
        made()


def test_a_missing_ray_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError) as caught:
        require_ray()
    assert 'pip install "splitft[ray]"' in caught.value.remedy


@pytest.mark.parametrize("failures", [1, 2])
def test_a_ray_that_does_not_come_up_is_tried_twice(monkeypatch: pytest.MonkeyPatch, failures: int) -> None:
    import splitft.apps.ray_engine as ray_engine

    tried: list[int] = []

    def once(cores: int) -> ray_engine.Connection:
        tried.append(cores)
        if len(tried) <= failures:
            raise RuntimeError("Timed out waiting for file port\nand more")
        return ray_engine.Connection((float(cores),), True, lambda: None)

    monkeypatch.setattr(ray_engine, "_start_once", once)
    if failures == 1:
        assert ray_engine._start(2).cores == (2.0,)
    else:
        with pytest.raises(ResourceError, match=r"Timed out waiting for file port\."):
            ray_engine._start(2)
    assert tried == [2, 2]
