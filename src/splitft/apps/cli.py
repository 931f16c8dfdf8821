"""The command line. Each command imports what it needs when it runs, so `splitft --help` answers at once.

run   demo   plan   compare   report   export   server   client   enroll   audit   doctor   cite
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from splitft import __version__
from splitft.apps import console
from splitft.apps.audit_command import audit
from splitft.apps.enroll_command import enroll_app
from splitft.errors import CheckpointError, ConfigError
from splitft.toml import format_value

if TYPE_CHECKING:
    from splitft.config import RunConfig

app = typer.Typer(
    name="splitft",
    help="Federated split fine-tuning of language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.add_typer(enroll_app)
app.command()(audit)

ConfigAndOverrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[CONFIG] [FIELD=VALUE]...",
        help="A TOML file (the defaults if none), then overrides such as train.learning_rate=1e-4 or policy.cuts=[2,3].",
        show_default=False,
    ),
]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[FIELD=VALUE]...", help="Overrides such as rounds=2.", show_default=False)]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN_DIR", help="A run folder, such as runs/demo.", show_default=False)]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing but errors.")]


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"splitft {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error (anywhere on the line).")] = False,
) -> None:
    """`main` takes --debug off the line before it gets here; the option is declared for --help."""


@app.command()
def run(
    arguments: ConfigAndOverrides = None,
    resume: Annotated[
        Path | None, typer.Option("--resume", metavar="RUN_DIR", help="Continue this run where it stopped.", show_default=False)
    ] = None,
    name: Annotated[str | None, typer.Option("--name", help="Name of the run and of its folder.", show_default=False)] = None,
    device: Annotated[str | None, typer.Option("--device", help="auto, cpu, cuda or mps.", show_default=False)] = None,
    engine: Annotated[str | None, typer.Option("--engine", help="cohort, ray or workers.", show_default=False)] = None,
    address: Annotated[
        str | None,
        typer.Option("--address", metavar="ADDRESS", help="Ray to run on: auto, host:port or ray://host:port.", show_default=False),
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Train: plan, train, aggregate, evaluate, round after round; then write adapter and report."""
    path, overrides = split_arguments(arguments)
    if resume is not None and name is not None:
        raise ConfigError(f"--name {name} was given with --resume {resume}.", "A run keeps its name: leave --name out.")
    options = {"name": name, "engine.device": device, "engine.name": engine, "engine.address": address}
    overrides += [f"{field}={format_value(value)}" for field, value in options.items() if value is not None]
    config = load(path, overrides) if resume is None else load_resumed(resume, path, overrides)
    _execute(config, resume, quiet)


@app.command()
def demo(overrides: Overrides = None, quiet: Quiet = False) -> None:
    """Train the embedded model over a few simulated clients, in a minute or two and without any download."""
    from splitft.apps.demo import demo_config
    from splitft.config import override

    config = override(demo_config(), overrides or ())
    free = free_name(Path(config.run.folder), config.name)
    _execute(config.model_copy(update={"name": free}), None, quiet)


@app.command()
def plan(arguments: ConfigAndOverrides = None) -> None:
    """Predict bytes, memory and seconds of every cut on the configured devices, without training."""
    config = load(*split_arguments(arguments))
    console.prepare_process(config.engine.threads)
    with console.starting():
        from splitft.apps.plan_command import show_plan

        show_plan(config)


@app.command()
def compare(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[CONFIG]... [FIELD=VALUE]...", help="TOML files (the defaults if none), then overrides.", show_default=False
        ),
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            "--method",
            "-m",
            metavar="NAME",
            help="Lay this method over each configuration (its name, a file, or base).",
            show_default=False,
        ),
    ] = None,
    sweep: Annotated[
        list[str] | None,
        typer.Option("--sweep", metavar="[METHOD:]FIELD=V1,V2", help="Give a field these values in turn.", show_default=False),
    ] = None,
    seeds: Annotated[str, typer.Option("--seeds", metavar="N | S1,S2", help="How many seeds, or which.", show_default=False)] = "",
    target: Annotated[
        float | None,
        typer.Option("--target-perplexity", metavar="X", help="Perplexity to reach; derived if not given.", show_default=False),
    ] = None,
    baseline: Annotated[
        str, typer.Option("--baseline", metavar="NAME", help="Variant that ratios refer to; the first.", show_default=False)
    ] = "",
    jobs: Annotated[int, typer.Option("--jobs", "-j", metavar="N", help="Runs side by side; 0: as many as pay.")] = 0,
    folder: Annotated[Path, typer.Option("--folder", metavar="DIR", help="Folder of the comparison's folder.")] = Path("runs"),
    name: Annotated[str, typer.Option("--name", help="Name of the comparison and of its folder.")] = "comparison",
    retry: Annotated[bool, typer.Option("--retry", help="Try runs again that failed before.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be run, and stop.")] = False,
    quiet: Quiet = False,
) -> None:
    """Run several configurations, methods, sweeps and seeds, and compare them on one page. Again: does what is missing."""
    from splitft.apps.compare import Options, compare
    from splitft.apps.compare_plan import request_of

    request = request_of(arguments or (), method or (), sweep or (), seeds, folder, name)
    code = compare(request, Options(target, baseline, jobs, retry, quiet, dry_run))
    if code:
        raise typer.Exit(code)


@app.command()
def report(run_dir: RunFolder) -> None:
    """Write report.html from a run's journal: one page, no network needed to read it."""
    from splitft.apps.report import write_report

    typer.echo(write_report(run_dir))


@app.command()
def export(
    run_dir: RunFolder,
    to: Annotated[Path, typer.Option("--to", metavar="DIR", help="Folder to write.", show_default=False)],
    merged: Annotated[bool, typer.Option("--merged", help="Whole checkpoint with the adapter merged in.")] = False,
) -> None:
    """Write a run's adapter as stock PEFT reads it, or the merged checkpoint."""
    console.prepare_process()
    with console.starting():
        from splitft.apps.export import export as write_export

        typer.echo(write_export(run_dir, to, merged))


@app.command()
def server(
    arguments: ConfigAndOverrides = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Without TLS; only on a loopback address.")] = False,
    logs: Annotated[str, typer.Option("--logs", metavar="FORM", help="Lines of server.log: json or plain.")] = "json",
    quiet: Quiet = False,
) -> None:
    """Serve a federation: clients on other machines train, this one runs the blocks behind their cuts. Goes on where it stopped."""
    config = load(*split_arguments(arguments))
    threads = console.prepare_process(config.engine.threads)
    if not quiet:
        console.error_console().print(threads.describe(), style="dim")
    with console.starting():
        from splitft.apps.server_command import serve
    serve(config, insecure, quiet, logs)


@app.command()
def client(
    data: Annotated[
        Path, typer.Option("--data", metavar="FILE", help="Your text: .txt, .jsonl or a folder; it stays here.", show_default=False)
    ],
    identity: Annotated[
        Path, typer.Option("--identity", metavar="DIR", help="Key, certificate and memory of this client.", show_default=False)
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[data.FIELD=VALUE]...", help="How the data is read, such as data.text=note.", show_default=False),
    ] = None,
    address: Annotated[str, typer.Option("--server", metavar="HOST:PORT", help="The server, if the identity does not know it.")] = "",
    policy: Annotated[Path | None, typer.Option("--policy", metavar="FILE", help="What this client allows.", show_default=False)] = None,
    model: Annotated[
        Path | None, typer.Option("--model", metavar="DIR", help="The base model's checkpoint, if it is here.", show_default=False)
    ] = None,
    cache: Annotated[Path | None, typer.Option("--cache", metavar="DIR", help="Where fetched models are kept.", show_default=False)] = None,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda or mps.")] = "auto",
    memory_mb: Annotated[int, typer.Option("--memory-mb", help="Memory offered to the server; 0: half of what is free.")] = 0,
    threads: Annotated[int, typer.Option("--threads", help="Threads to compute with; 0: all cores.")] = 0,
    window: Annotated[int, typer.Option("--window", help="Micro-batches of a step on their way at a time.")] = 2,
    name: Annotated[str, typer.Option("--name", help="Name, without TLS.")] = "",
    insecure: Annotated[bool, typer.Option("--insecure", help="Without TLS; only to a loopback address.")] = False,
    takeover: Annotated[bool, typer.Option("--takeover", help="Take the place of another process of this identity.")] = False,
    wait_s: Annotated[float, typer.Option("--wait", metavar="SECONDS", help="How long to try an unreachable server; 0: for ever.")] = 0.0,
    quiet: Quiet = False,
) -> None:
    """Take part in a federation with the text of this machine, which never leaves it."""
    console.prepare_process(threads)
    with console.starting():
        from splitft.apps.client_command import ClientOptions, join
    join(
        ClientOptions(
            data,
            identity,
            address,
            policy,
            model,
            cache,
            device,
            memory_mb,
            window,
            insecure,
            name,
            takeover,
            wait_s,
            quiet,
            overrides or (),
        )
    )


@app.command()
def doctor() -> None:
    """Check this machine: Python, packages, cores, memory, disk, device, embedded model. Exit code 1 if something fails."""
    threads = console.prepare_process()
    with console.starting():
        from splitft.apps.doctor import examine, show

        checks = examine(threads)
    show(checks)
    if any(check.status == "fail" for check in checks):
        raise typer.Exit(1)


@app.command()
def cite(arguments: ConfigAndOverrides = None) -> None:
    """Print the references of the methods a configuration uses."""
    config = load(*split_arguments(arguments))
    with console.starting():
        from splitft.apps.cite import catalogue, references_of, render

        found = catalogue()
    typer.echo(render(references_of(config, found)))


def split_arguments(arguments: Sequence[str] | None) -> tuple[Path | None, list[str]]:
    """The configuration file, if the first argument is one, and the overrides."""
    first, *rest = arguments or [""]
    if first and ("=" not in first or Path(first).is_file()):
        return Path(first), rest
    return None, list(arguments or ())


def load(path: Path | None, overrides: Sequence[str]) -> RunConfig:
    from splitft.config import load_config

    return load_config(path, overrides)


def load_resumed(run_dir: Path, path: Path | None, overrides: Sequence[str]) -> RunConfig:
    """The configuration saved with a run. A second file beside it would leave open which one counts."""
    if path is not None:
        raise ConfigError(
            f"--resume {run_dir} takes the configuration saved there; {path} was given as well.",
            f"Leave {path} out, or start a new run without --resume. Single fields can be changed by FIELD=VALUE.",
        )
    saved = run_dir / "config.toml"
    if not saved.is_file():
        raise CheckpointError(f"{run_dir} is not a run folder: it has no config.toml.", "Name a folder such as runs/demo.")
    return load(saved, overrides)


def free_name(folder: Path, name: str) -> str:
    """`name`, or `name-2`, `name-3`... when a run of that name is already in `folder`."""
    candidate, number = name, 1
    while (folder / candidate).exists():
        number += 1
        candidate = f"{name}-{number}"
    return candidate


def _execute(config: RunConfig, resume: Path | None, quiet: bool) -> None:
    threads = console.prepare_process(config.engine.threads)
    if not quiet:
        console.error_console().print(threads.describe(), style="dim")
    with console.starting():
        from splitft.apps.execute import execute
    execute(config, resume=resume, quiet=quiet)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its code; no traceback reaches the user unless --debug is given."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    remaining = [argument for argument in given if argument != "--debug"]
    try:
        app(args=remaining, prog_name="splitft")
        code = 0
    except Exception as error:
        if len(remaining) < len(given):
            raise
        fault = console.known_fault(error)
        code = console.show_fault(fault) if fault else console.show_unexpected(error, remaining)
    raise SystemExit(code)
