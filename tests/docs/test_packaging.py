"""Units, containers and the example of a federation say what the command line and the configuration understand."""

from __future__ import annotations

import configparser
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from splitft.apps.assemble import build_components
from splitft.apps.server_setup import unfit
from splitft.config import load_config
from splitft.deploy.policy import ClientPolicy, load_policy
from splitft.errors import FederationError, SplitftError, UnreachableError

from .test_readme import understand

ROOT = Path(__file__).resolve().parents[2]
DEPLOY, EXAMPLE = ROOT / "deploy", ROOT / "examples" / "03_federation"
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))
INSTALLED = "/opt/splitft/bin/splitft"
SERVICES: dict[str, dict[str, Any]] = yaml.safe_load((DEPLOY / "containers" / "compose.yaml").read_text("utf-8"))["services"]


def unit(path: Path) -> configparser.RawConfigParser:
    parser = configparser.RawConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[method-assign,assignment]
    parser.read_string(path.read_text("utf-8"))
    return parser


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.name)
def test_a_unit_starts_a_command_that_exists_and_may_write_its_state_only(path: Path) -> None:
    service = unit(path)["Service"]
    program, *words = shlex.split(service["ExecStart"])
    assert program == INSTALLED
    understand(words)
    assert words[0] in path.name
    assert service["WorkingDirectory"] == f"/var/lib/{service['StateDirectory']}"
    for name, value in {"ProtectSystem": "strict", "NoNewPrivileges": "yes", "CapabilityBoundingSet": "", "User": "splitft"}.items():
        assert service[name] == value


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.name)
def test_a_unit_is_not_started_again_for_what_only_a_person_can_mend(path: Path) -> None:
    final = {int(code) for code in unit(path)["Service"]["RestartPreventExitStatus"].split()}
    codes = {kind.exit_code for kind in FederationError.__subclasses__() if kind.__module__ == "splitft.errors"}
    assert codes - {UnreachableError.exit_code} <= final
    assert final <= {kind.exit_code for kind in SplitftError.__subclasses__()} | codes
    assert unit(path)["Service"]["Restart"] == "on-failure"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd here")
@pytest.mark.timeout(60)
def test_systemd_understands_the_units(tmp_path: Path) -> None:
    for path in UNITS:
        copy = tmp_path / path.name
        copy.write_text(path.read_text("utf-8").replace(INSTALLED, "/bin/true"), "utf-8")
    done = subprocess.run(["systemd-analyze", "verify", *sorted(tmp_path.glob("*"))], capture_output=True, text=True, timeout=50)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_the_containers_start_commands_that_exist() -> None:
    assert set(SERVICES) == {"server", "north", "south", "east"}
    for name, service in SERVICES.items():
        understand(service["command"])
        assert service["command"][0] == ("server" if name == "server" else "client")
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        volumes = [volume.split(":") for volume in service["volumes"]]
        assert [name, "/state"] in volumes
        assert all(mode == ["ro"] for _, where, *mode in volumes if where != "/state")
        for source, *_ in volumes:
            if source.endswith(".toml"):
                assert (DEPLOY / "containers" / source).resolve().is_file()


def test_the_image_is_made_of_files_that_exist_and_runs_as_nobody_special() -> None:
    lines = (DEPLOY / "containers" / "Dockerfile").read_text("utf-8").splitlines()
    for line in lines:
        if line.startswith("COPY ") and "--from" not in line:
            assert all((ROOT / source).exists() for source in line.split()[1:-1]), line
    assert [line for line in lines if line.startswith("USER ")] == ["USER 10001:10001"]
    assert 'ENTRYPOINT ["splitft"]' in lines
    assert {line.split()[1] for line in lines if line.startswith("FROM ")} == {"python:3.12-slim"}


def test_the_page_shows_commands_of_services_that_exist() -> None:
    page = (ROOT / "docs" / "deploy.md").read_text("utf-8")
    found = [line.strip() for line in re.findall(rf"{INSTALLED} ([^|\n]+)", page)]
    found += [words for service, words in re.findall(r"docker compose (?:run --rm(?: -T)?) (\w+) ([^|\n]+)", page) if service in SERVICES]
    found += re.findall(r"exec -T \w+ splitft ([^|\n]+)", page)
    assert len(found) >= 5
    for words in found:
        understand(shlex.split(words))


@pytest.mark.parametrize("folder", [DEPLOY, EXAMPLE], ids=lambda folder: folder.name)
def test_the_files_of_server_and_client_are_understood(folder: Path) -> None:
    config = load_config(folder / "federation.toml")
    assert list(unfit(config, build_components(config))) == []
    assert load_policy(folder / "policy.toml") != ClientPolicy()


@pytest.mark.timeout(280)
def test_the_example_is_a_federation_from_nothing_to_an_adapter(tmp_path: Path) -> None:
    """Authority, server and three clients as processes over TLS; nothing is left running."""
    where = tmp_path / "here"
    small = ["rounds=1", "train.local_steps=1", "train.batch_size=2", "evaluate.max_rows=1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, str(EXAMPLE / "run.py"), str(where), *small]
    done = subprocess.run(command, capture_output=True, text=True, timeout=270, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "server | round   1  cuts 1,2,4" in done.stdout
    run = where / "runs" / "stations"
    assert (run / "report.html").is_file()
    joined = read_adapter_bytes(run / "adapter")
    assert all(read_adapter_bytes(where / name / "adapter") == joined for name in ("harbour", "lighthouse", "observatory"))
    assert "splitft1." not in done.stdout, "tokens are not for the screen"


def read_adapter_bytes(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()
