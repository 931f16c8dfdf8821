"""apps/console.py: threads and environment before torch, errors on a terminal."""

from __future__ import annotations

import gc
import io
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console
from unit.launcher import LAUNCHER_VARIABLES

from splitft.apps import console
from splitft.errors import ConfigError, Interrupted, SplitftError


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LAUNCHER_VARIABLES:
        monkeypatch.setenv(name, "")  # remembered, so that the test's end takes back what the code sets
        monkeypatch.delenv(name)


@pytest.fixture
def collector() -> Iterator[None]:
    """The garbage collector on, and afterwards as it was."""
    was = gc.isenabled()
    gc.enable()
    yield
    gc.unfreeze()
    (gc.enable if was else gc.disable)()


@pytest.mark.usefixtures("collector")
def test_nothing_is_collected_while_starting_and_everything_afterwards() -> None:
    with console.starting():
        assert not gc.isenabled()
        with console.starting():
            pass
        assert not gc.isenabled(), "the inner one must leave the outer one's wish alone"
    assert gc.isenabled()
    with pytest.raises(ConfigError), console.starting():
        raise ConfigError("Wrong.", "Mend it.")
    assert gc.isenabled()
    gc.disable()
    with console.starting():
        pass
    assert not gc.isenabled(), "who had switched it off keeps it off"


@pytest.mark.usefixtures("collector")
def test_what_a_start_made_can_be_left_out_of_later_collections() -> None:
    gc.unfreeze()
    with console.starting():
        kept = [[] for _ in range(1000)]  # type: ignore[var-annotated]
    assert gc.get_freeze_count() == 0
    with console.starting(freeze=True):
        pass
    assert gc.get_freeze_count() >= len(kept)


def on_terminal(error: SplitftError) -> str:
    screen = io.StringIO()
    console.show_fault(error, Console(file=screen, force_terminal=True, width=60, color_system=None))
    return screen.getvalue()


def test_threads_follow_configuration_then_user_then_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    assert console.choose_threads() == (console.usable_cores(), "cores")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert console.choose_threads() == (3, "OMP_NUM_THREADS")
    assert console.choose_threads(2) == (2, "configuration")
    for nonsense in ("0", "many", ""):
        monkeypatch.setenv("OMP_NUM_THREADS", nonsense)
        assert console.choose_threads().source == "cores"


def test_environment_is_set_but_the_users_wishes_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    assert console.prepare_process(5).number == 5
    assert [os.environ.get(name) for name in LAUNCHER_VARIABLES] == ["5", "ACTIVE", None, "1", "error", "1"]


def test_waiting_threads_spin_briefly_unless_the_user_says_how_they_wait() -> None:
    console.prepare_process(2)
    assert (os.environ["OMP_WAIT_POLICY"], os.environ["GOMP_SPINCOUNT"]) == ("PASSIVE", "2000")


@pytest.mark.parametrize(("quota", "cores"), [("150000 100000\n", 2), ("10000 100000\n", 1), ("max 100000\n", 64), ("broken", 64)])
def test_a_containers_quota_limits_the_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quota: str, cores: int) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(64)), raising=False)
    file = tmp_path / "cpu.max"
    file.write_text(quota)
    assert console.usable_cores(file) == cores
    assert console.usable_cores(tmp_path / "absent") == 64


def test_terminal_shows_one_block_with_problems_and_remedy() -> None:
    shown = on_terminal(ConfigError("Two faults.", "Mend them.", ("seed = -1: must be at least 0.", "[model] is wrong.")))
    lines = [line.strip("│ ") for line in shown.splitlines()]
    assert "ConfigError, exit code 2" in lines[0]
    assert lines[1:5] == ["Two faults.", "• seed = -1: must be at least 0.", "• [model] is wrong.", "→ Mend them."]
    assert lines[5].startswith("╰")


def test_a_stopped_run_is_not_red() -> None:
    def colour(error: SplitftError) -> str:
        screen = io.StringIO()
        console.show_fault(error, Console(file=screen, force_terminal=True, width=60, color_system="standard"))
        return screen.getvalue()[:5]

    assert colour(Interrupted("Stopped.")) == "\x1b[33m"
    assert colour(SplitftError("Broken.")) == "\x1b[31m"


def test_known_faults() -> None:
    own = SplitftError("x")
    assert console.known_fault(own) is own
    assert console.known_fault(ValueError("x")) is None
    assert console.known_fault(OSError(2, "No such file")) is None


def test_unexpected_error_says_how_to_get_the_traceback() -> None:
    screen = io.StringIO()
    code = console.show_unexpected(ValueError("[red]x"), ["run", "a.toml"], Console(file=screen))
    assert code == 70
    assert "Unexpected ValueError: [red]x" in screen.getvalue()
    assert "splitft --debug run a.toml" in screen.getvalue()
