"""Runs from Python: `splitft.open_run` to look at every round, `splitft.run` for all of it at once. Paths may be texts here."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from splitft import config as configuration
from splitft.apps.console import prepare_process, starting
from splitft.config import RunConfig, override
from splitft.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from splitft.apps.session import FederatedRun

Source: TypeAlias = RunConfig | Path | str | None


def load_config(path: Path | str | None = None, overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration in a TOML file (None: the defaults) with `overrides` such as `train.learning_rate=1e-4` applied.

    Paths in the file are seen from its folder, paths in overrides from the working folder. Raises ConfigError with every fault at once.
    """
    return configuration.load_config(None if path is None else Path(path), _listed(overrides))


def write_report(run_dir: Path | str) -> Path:
    """Write `report.html` into a run folder, also of a run that is still going, and return its path. Raises CheckpointError."""
    from splitft.apps import report

    return report.write_report(Path(run_dir))


def open_run(config: Source = None, overrides: Sequence[str] = (), *, resume: bool | Path | str = False) -> FederatedRun:
    """A run ready to train: iterate over its `rounds()`, then `finish()` and `close()` it (or use `contextlib.closing`).

    `config` is a configuration or the path of its TOML file; None means the defaults, or with a `resume` folder the configuration
    saved there. `overrides` read as on the command line. `resume` continues a run after its last committed round: True the one in
    the folder that `config` names, a path the one in that folder. Raises ConfigError with every fault of the configuration and for
    a new run whose folder is taken, CheckpointError for a folder that holds no run, and the errors of model and data.

    Where torch is not imported yet, the environment variables that set its threads are set as on the command line, so that a run from
    Python has the same speed and the same numbers.
    """
    settled = _settle(config, overrides, resume)
    folder = _folder(settled, resume)
    if "torch" not in sys.modules:
        prepare_process(settled.engine.threads)
    with starting():
        from splitft.apps.session import FederatedRun

        return FederatedRun(settled, folder)


def run(config: Source = None, overrides: Sequence[str] = (), *, resume: bool | Path | str = False) -> FederatedRun:
    """Train to the last round and write adapter and report; arguments and errors as in `open_run`.

    Returns the finished run: `folder` says where everything is, `metrics()` gives one row per round.
    """
    opened = open_run(config, overrides, resume=resume)
    try:
        for _ in opened.rounds():
            pass
        opened.finish()
    finally:
        opened.close()
    return opened


def _settle(config: Source, overrides: Sequence[str], resume: bool | Path | str) -> RunConfig:
    """The configuration of the run, overrides applied."""
    if isinstance(config, RunConfig):
        return override(config, _listed(overrides)) if overrides else config
    if config is None and not isinstance(resume, bool):
        config = _run_folder(Path(resume)) / "config.toml"
    return load_config(config, overrides)


def _listed(overrides: Sequence[str]) -> Sequence[str]:
    """A text is a sequence of texts too, and a common slip."""
    if isinstance(overrides, str):
        raise ConfigError(f"overrides is the text {overrides!r}.", f"Give a list of texts: overrides=[{overrides!r}].")
    return overrides


def _folder(config: RunConfig, resume: bool | Path | str) -> Path | None:
    """The folder of the run to continue; None for a new run."""
    if resume is False:
        return None
    return _run_folder(Path(config.run.folder) / config.name if resume is True else Path(resume))


def _run_folder(folder: Path) -> Path:
    if not (folder / "config.toml").is_file():
        raise CheckpointError(f"{folder} is not a run folder: it has no config.toml.", "Name a folder such as runs/demo.")
    return folder
