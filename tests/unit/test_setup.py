"""make setup: installs once, repairs what was cut short, does nothing when all is well. Python and pip are played by a script."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(shutil.which("make") is None or shutil.which("sh") is None, reason="make and sh are needed")

# Plays python: `-m venv DIR` makes a copy of itself there, pip calls are written to a log and fail where the test says so.
FAKE_PYTHON = r"""#!/bin/sh
case "$1" in
    -V) echo "Python $FAKE_VERSION"; exit ;;
    -c) exit "${FAKE_UNSUPPORTED:-0}" ;;
esac
shift
case "$1" in
    venv)
        [ -z "$FAKE_NO_ENSUREPIP" ] || [ "$2" = --without-pip ] || exit 1
        for folder in "$@"; do :; done
        mkdir -p "$folder/bin" && cp "$0" "$folder/bin/python"
        [ "$2" = --without-pip ] || : >"$folder/has-pip"
        echo "venv" >>"$FAKE_LOG" ;;
    pip)
        case "$*" in
            *--version*) [ -e "$(dirname "$0")/../has-pip" ]; exit ;;
            "pip --python"*) : >"$(dirname "$3")/../has-pip"; echo "bootstrap" >>"$FAKE_LOG"; exit ;;
        esac
        for last in "$@"; do :; done
        echo "pip $last" >>"$FAKE_LOG"
        [ "$last" != "$FAKE_BROKEN" ] ;;
esac
"""


class Tree:
    """A copy of the files the set-up reads, and what the fake interpreter was asked to do."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log = folder, folder / "log"
        self.environment = {"PATH": os.environ["PATH"], "FAKE_LOG": str(self.log), "FAKE_VERSION": "3.12.1"}
        for name in ("Makefile", "pyproject.toml", "constraints.txt", "tools/setup.sh"):
            (folder / name).parent.mkdir(exist_ok=True, parents=True)
            shutil.copy(ROOT / name, folder / name)
        self.python = folder / "fakepython"
        self.python.write_text(FAKE_PYTHON)
        self.python.chmod(0o755)

    def make(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["make", *(arguments or ("setup",)), f"PYTHON={self.python}"],
            cwd=self.folder,
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            check=False,
        )

    def calls(self) -> list[str]:
        """What was done since the last call."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return lines

    def ready(self) -> bool:
        return any((self.folder / ".venv").glob("ready-*"))


TORCH = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch=="))
EVERYTHING = ["venv", f"pip {TORCH}", "pip .[test]"]


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path / "repo")


def test_first_call_installs_torch_first_and_the_second_does_nothing(tree: Tree) -> None:
    first = tree.make()
    assert first.returncode == 0, first.stderr
    assert tree.calls() == EVERYTHING
    started = time.monotonic()
    assert tree.make().returncode == 0
    assert time.monotonic() - started < 2.0
    assert tree.calls() == []


@pytest.mark.parametrize(("broken", "done"), [(TORCH, EVERYTHING[:2]), (".[test]", EVERYTHING)])
def test_what_was_cut_short_is_finished_by_the_next_call(tree: Tree, broken: str, done: list[str]) -> None:
    failed = tree.make(FAKE_BROKEN=broken)
    assert failed.returncode != 0
    assert "call make again" in failed.stderr
    assert not tree.ready()
    assert tree.calls() == done
    assert tree.make().returncode == 0
    assert tree.calls() == EVERYTHING[1:]
    assert tree.ready()


def test_environment_without_pip_is_made_again(tree: Tree) -> None:
    (tree.folder / ".venv" / "bin").mkdir(parents=True)
    assert tree.make().returncode == 0
    assert tree.calls() == EVERYTHING


def test_environment_whose_python_is_gone_is_made_again(tree: Tree) -> None:
    tree.make()
    tree.calls()
    (tree.folder / ".venv" / "bin" / "python").unlink()
    assert tree.make().returncode == 0
    assert tree.calls() == EVERYTHING
    assert tree.make().returncode == 0
    assert tree.calls() == []


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_changed_requirements_are_installed(tree: Tree, name: str) -> None:
    tree.make()
    tree.calls()
    with (tree.folder / name).open("a") as file:
        file.write("# another\n")
    assert tree.make().returncode == 0
    assert tree.calls() == EVERYTHING[1:]
    assert len(list((tree.folder / ".venv").glob("ready-*"))) == 1


def test_moved_folder_gets_a_new_environment(tree: Tree, tmp_path: Path) -> None:
    tree.make()
    tree.calls()
    tree.folder.rename(tmp_path / "moved")
    tree.folder, tree.log, tree.python = tmp_path / "moved", tmp_path / "moved" / "log", tmp_path / "moved" / "fakepython"
    assert tree.make(FAKE_LOG=str(tree.log)).returncode == 0
    assert tree.calls() == EVERYTHING


def test_system_without_the_bundled_pip(tree: Tree) -> None:
    assert tree.make(FAKE_NO_ENSUREPIP="1").returncode == 0
    assert tree.calls() == ["venv", "bootstrap", *EVERYTHING[1:]]


def test_unsupported_python_is_refused_by_name(tree: Tree) -> None:
    refused = tree.make(FAKE_UNSUPPORTED="1", FAKE_VERSION="3.9.2")
    assert refused.returncode != 0
    assert "needs Python 3.11, 3.12 or 3.13" in refused.stderr
    assert "Python 3.9.2" in refused.stderr
    assert "PYTHON=python3.12" in refused.stderr
    assert not (tree.folder / ".venv").exists()


def test_missing_python_is_refused(tree: Tree) -> None:
    tree.python = tree.folder / "nowhere"
    refused = tree.make()
    assert refused.returncode != 0
    assert "Install Python" in refused.stderr


def test_demo_and_test_run_offline_in_the_environment(tree: Tree) -> None:
    tree.make()
    bin_folder = tree.folder / ".venv" / "bin"
    for name in ("splitft", "python"):
        (bin_folder / name).write_text('#!/bin/sh\necho "$(basename "$0") $* offline=$HF_HUB_OFFLINE threads=$OMP_NUM_THREADS"\n')
        (bin_folder / name).chmod(0o755)
    assert tree.make("-s", "demo").stdout == "splitft demo offline=1 threads=\n"
    tested = tree.make("-s", "test", "ARGS=-x").stdout.splitlines()[-1]
    assert tested.startswith("python -m pytest -n 3")
    assert tested.endswith("-x offline=1 threads=1")


def test_help_lists_every_target(tree: Tree) -> None:
    listed = {line.split()[1] for line in tree.make("help").stdout.splitlines()}
    assert {"help", "setup", "demo", "test", "check", "format", "docs", "bench", "clean"} <= listed


def test_clean_keeps_environment_and_runs(tree: Tree) -> None:
    tree.make()
    for folder in ("runs/demo", "build", "src", "tests", ".pytest_cache"):
        (tree.folder / folder).mkdir(parents=True)
    assert tree.make("clean").returncode == 0
    assert (tree.folder / "runs" / "demo").is_dir()
    assert tree.ready()
    assert not (tree.folder / "build").exists()
    assert not (tree.folder / ".pytest_cache").exists()


def test_real_interpreter_passes_the_version_check() -> None:
    script = (ROOT / "tools" / "setup.sh").read_text()
    check = script.split("supported='")[1].split("'")[0]
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0
    assert subprocess.run([sys.executable, "-c", check.replace("sys.version_info[:2]", "(3, 10)")], check=False).returncode == 1
