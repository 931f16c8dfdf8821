"""apps/cli.py: help without torch, exit codes, errors as people read them, what each command hands on."""

from __future__ import annotations

import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from unit.launcher import LAUNCHER_VARIABLES

import splitft
from splitft import errors
from splitft.apps import cli
from splitft.config import RunConfig, load_config

SOURCE = Path(splitft.__file__).resolve().parents[1]


def exit_code(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    return caught.value.code if isinstance(caught.value.code, int) else 0


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """Stands for the modules that train; the calls they get are in `calls`, what `execute` raises in `fault`."""
    double = types.SimpleNamespace(calls=[], fault=None)

    def execute(config: RunConfig, *, resume: Path | None, quiet: bool) -> Path:
        if double.fault is not None:
            raise double.fault
        double.calls.append((config, resume, quiet))
        return Path(config.run.folder) / config.name

    double.execute = execute
    double.demo_config = lambda: load_config(None, ["name=demo", "rounds=2"])
    double.export = lambda run_dir, to, merged: double.calls.append((run_dir, to, merged)) or to
    double.show_plan = double.calls.append
    for name in ("execute", "demo", "export", "plan_command"):
        monkeypatch.setitem(sys.modules, f"splitft.apps.{name}", double)  # type: ignore[arg-type]
    for name in LAUNCHER_VARIABLES:
        monkeypatch.setenv(name, "1")  # so that what the launcher sets is taken back after the test
    return double


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["--version"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom splitft.apps.cli import main\n"
        f"try:\n    main({arguments!r})\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "heavy = {'torch', 'transformers', 'peft', 'numpy', 'splitft.config'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": str(SOURCE)}, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("--version") == 0
    assert capsys.readouterr().out == f"splitft {splitft.__version__}\n"


def test_every_command_is_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    exit_code("--help")
    shown = capsys.readouterr().out
    for command in ("run", "demo", "plan", "report", "export", "doctor", "cite"):
        assert f" {command} " in shown


@pytest.mark.parametrize("arguments", [["fly"], ["run", "--fast"], ["export", "runs/demo"], ["report"]])
def test_what_cannot_be_understood_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(*arguments) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_run_hands_on_file_overrides_and_options(
    training: types.SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "first.toml"
    file.write_text("rounds = 3\n")
    assert exit_code("run", str(file), "train.batch_size=2", "--name", "123", "--device", "cpu", "clients.count=2") == 0
    config, resume, quiet = training.calls[0]
    assert (config.rounds, config.train.batch_size, config.name, config.engine.device, config.clients.count) == (3, 2, "123", "cpu", 2)
    assert (resume, quiet) == (None, False)
    assert "1 thread (by OMP_NUM_THREADS)" in capsys.readouterr().err


def test_run_without_a_file_takes_the_defaults(training: types.SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("run", "rounds=1", "--quiet") == 0
    assert training.calls[0][0] == load_config(None, ["rounds=1"])
    output = capsys.readouterr()
    assert (output.out, output.err) == ("", "")


def test_a_file_may_have_an_equals_sign(tmp_path: Path) -> None:
    file = tmp_path / "a=b.toml"
    file.write_text("")
    assert cli.split_arguments([str(file), "seed=1"]) == (file, ["seed=1"])
    assert cli.split_arguments(["seed=1"]) == (None, ["seed=1"])
    assert cli.split_arguments(None) == (None, [])


def test_resume_takes_the_saved_configuration(training: types.SimpleNamespace, tmp_path: Path) -> None:
    saved = load_config(None, ["name=first", "rounds=4"])
    (tmp_path / "config.toml").write_text(saved.to_toml())
    assert exit_code("run", "--resume", str(tmp_path), "rounds=6") == 0
    config, resume, _ = training.calls[0]
    assert (config.name, config.rounds, resume) == ("first", 6, tmp_path)


def test_resume_refuses_what_leaves_a_choice(training: types.SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("run", "--resume", str(tmp_path)) == errors.CheckpointError.exit_code
    (tmp_path / "config.toml").write_text("")
    assert exit_code("run", str(tmp_path / "config.toml"), "--resume", str(tmp_path)) == errors.ConfigError.exit_code
    assert exit_code("run", "--name", "x", "--resume", str(tmp_path)) == errors.ConfigError.exit_code
    assert "keeps its name" in capsys.readouterr().err
    assert training.calls == []


def test_demo_takes_the_next_free_name(training: types.SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for expected in ("demo", "demo-2", "demo-3"):
        assert exit_code("demo", "rounds=1") == 0
        assert (training.calls[-1][0].name, training.calls[-1][0].rounds) == (expected, 1)
        (tmp_path / "runs" / expected).mkdir(parents=True)


def test_plan_and_export_hand_on(training: types.SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("plan", "clients.count=2") == 0
    assert exit_code("export", "runs/demo", "--to", "out", "--merged") == 0
    assert training.calls == [load_config(None, ["clients.count=2"]), (Path("runs/demo"), Path("out"), True)]
    assert capsys.readouterr().out == "out\n"


def test_report_prints_where_the_page_is(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    double = types.SimpleNamespace(write_report=lambda run_dir: run_dir / "report.html")
    monkeypatch.setitem(sys.modules, "splitft.apps.report", double)  # type: ignore[arg-type]
    assert exit_code("report", "runs/demo") == 0
    assert capsys.readouterr().out == "runs/demo/report.html\n"


@pytest.mark.parametrize(
    "kind",
    [errors.DataError, errors.ModelError, errors.CodecError, errors.MissingExtraError, errors.Interrupted],
    ids=lambda kind: kind.__name__,
)
def test_own_error_is_a_message_and_its_exit_code(
    kind: type[errors.SplitftError], training: types.SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    training.fault = kind("The file [bold]x[/bold] has 3 columns; 2 are allowed.", "Name the column.")
    assert exit_code("run", "-q") == kind.exit_code
    shown = capsys.readouterr().err
    assert shown.splitlines() == [
        f"{kind.__name__}, exit code {kind.exit_code}: The file [bold]x[/bold] has 3 columns; 2 are allowed.",
        "→ Name the column.",
    ]


def test_every_problem_of_a_configuration_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("run", "rounds=0", "train.beta1=2", "lora.rnk=4") == 2
    shown = capsys.readouterr().err
    for part in ("3 problems", "• rounds = 0: must be at least 1.", "• train.beta1 = 2: must be less than 1.0.", "did you mean rank"):
        assert part in shown


@pytest.mark.parametrize(
    ("fault", "code", "part"),
    [
        (lambda: KeyError("wte"), 70, "Unexpected KeyError: 'wte'"),
        (lambda: MemoryError(), 9, "train.batch_size"),
        (lambda: OSError(28, "No space left on device", "runs/x"), 9, "disk is full at runs/x"),
        (lambda: type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory. Tried 2 GiB"), 9, "Tried 2 GiB"),
    ],
)
def test_foreign_errors(
    fault: Callable[[], Exception], code: int, part: str, training: types.SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    training.fault = fault()
    assert exit_code("run", "-q", "rounds=1") == code
    shown = capsys.readouterr().err
    assert part in shown
    assert "Traceback" not in shown
    assert ("splitft --debug run -q rounds=1" in shown) == (code == 70)


@pytest.mark.parametrize("arguments", [["--debug", "run", "-q"], ["run", "-q", "--debug"]])
def test_debug_shows_the_traceback(arguments: list[str], training: types.SimpleNamespace) -> None:
    training.fault = KeyError("wte")
    with pytest.raises(KeyError, match="wte"):
        cli.main(arguments)


def test_cite_prints_what_the_configuration_uses(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("cite", 'split.labels="client"') == 0
    with_labels = capsys.readouterr().out
    assert exit_code("cite") == 0
    without_labels = capsys.readouterr().out
    assert "eprint = {1812.00564}" in with_labels
    assert "eprint = {1812.00564}" not in without_labels
    assert "eprint = {2106.09685}" in without_labels


def test_doctor_exit_code_says_whether_something_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from splitft.apps import doctor

    checks: list[Any] = [doctor.Check("disk", "warn", "little", "Free some.")]
    monkeypatch.setattr(doctor, "examine", lambda threads: checks)
    monkeypatch.setattr(cli.console, "prepare_process", lambda: cli.console.Threads(1, "cores"))
    assert exit_code("doctor") == 0
    checks.append(doctor.Check("memory", "fail", "none"))
    assert exit_code("doctor") == 1
    assert "2 checks: 1 failed, 1 with a warning." in capsys.readouterr().out
