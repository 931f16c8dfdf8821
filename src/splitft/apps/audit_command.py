"""`splitft audit`: how much of a client's text a server can read from what this run sends, attacked with the run's own codecs and cut.

The text attacked is the client's own and stays here: nothing of it is written, and only `--show-text` prints it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from splitft.apps import console
from splitft.errors import ConfigError, DataError

if TYPE_CHECKING:
    from torch import Tensor

    from splitft.apps.assemble import Assembly
    from splitft.audit.base import Audit, Case, Options
    from splitft.config import RunConfig
    from splitft.data.base import Document, TokenRows
    from splitft.engine.checkpoint import RunState
    from splitft.types import Plan

Arguments = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[RUN_DIR | CONFIG] [FIELD=VALUE]...",
        help="A run folder (its newest adapter is attacked) or a TOML file (the adapter it starts from), then overrides.",
        show_default=False,
    ),
]


@dataclass(frozen=True)
class Request:
    """What to audit. `client` -1 is the one with the shallowest cut; `steps` local steps it takes before; `public` a text file or folder in
    place of the bundled text; `data` one in place of the client's own. `cut` 0 is where the run has the client's."""

    config: RunConfig
    run_dir: Path | None
    client: int
    steps: int
    sweep: bool
    public: Path | None
    data: Path | None = None
    cut: int = 0


@dataclass(frozen=True)
class Prepared:
    """A case ready to be attacked, and what the record says it is. The run sends each text of the client about `times_sent` times, and of
    no client oftener than `most_sent`."""

    case: Case
    cuts: tuple[int, ...]
    facts: dict[str, Any]
    tokenizer: Any
    times_sent: int = 1
    most_sent: int = 1


def audit(
    arguments: Arguments = None,
    sweep: Annotated[bool, typer.Option("--sweep", help="Attack every cut, not only the client's.")] = False,
    show_text: Annotated[bool, typer.Option("--show-text", help="Print a line of the text and what was recovered of it.")] = False,
    seconds: Annotated[float, typer.Option("--seconds", metavar="S", help="Time for each cut.")] = 60.0,
    sequences: Annotated[int, typer.Option("--sequences", metavar="N", help="Rows of the client that are attacked.")] = 4,
    tokens: Annotated[int, typer.Option("--tokens", metavar="N", help="Tokens of each.")] = 64,
    client: Annotated[int, typer.Option("--client", metavar="N", help="Whose text; -1: who has the shallowest cut.")] = -1,
    steps: Annotated[int, typer.Option("--steps", metavar="N", help="Local steps the client takes from the joined adapter before.")] = 0,
    public: Annotated[
        Path | None, typer.Option("--public", metavar="FILE", help="Text the attacker learns from.", show_default=False)
    ] = None,
    data: Annotated[
        Path | None, typer.Option("--data", metavar="FILE", help="Text to attack in place of the client's own.", show_default=False)
    ] = None,
    visits: Annotated[
        int, typer.Option("--visits", metavar="N", help="How often a text came by, where noise is fresh; 0: as in the run.")
    ] = 0,
    to: Annotated[
        Path | None, typer.Option("--to", metavar="DIR", help="Where audit.json and audit.svg are written.", show_default=False)
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing but errors.")] = False,
) -> None:
    """Measure what a server can read from what a run sends: recovered tokens by attackers that know the adapter, or only the base model."""
    request = request_of(arguments, client, steps, sweep, public, data)
    console.prepare_process(request.config.engine.threads)
    with console.starting():
        from splitft.audit.base import Options
        from splitft.audit.run import audit as attack

        if visits < 0:
            raise ConfigError(f"--visits is {visits}.", "give 1 or more, or 0 for as many as in the run.")
        options = Options(sequences, tokens, seconds, seed=request.config.seed)
        prepared = prepare(request, options)
        options = replace(options, visits=visits or prepared.times_sent)
    made = attack(prepared.case, options, prepared.cuts)
    folder = to if to is not None else folder_of(request)
    from splitft.apps.audit_page import write_record

    path = write_record(folder, made, prepared.facts)
    if request.run_dir is not None and folder == request.run_dir:
        from splitft.apps.report import write_report

        write_report(folder)
    if not quiet:
        show(made, prepared, show_text)
        typer.echo(path)


def request_of(arguments: list[str] | None, client: int, steps: int, sweep: bool, public: Path | None, data: Path | None = None) -> Request:
    """What the command line asks for. A run folder's own configuration counts, with overrides."""
    from splitft.apps.cli import split_arguments
    from splitft.config import load_config

    path, overrides = split_arguments(arguments)
    run_dir = path if path is not None and path.is_dir() else None
    if run_dir is not None and not (run_dir / "config.toml").is_file():
        raise ConfigError(f"{run_dir} is not a run folder: it has no config.toml.", "name a folder such as runs/demo, or a TOML file.")
    if path is not None and not path.exists() and path.suffix != ".toml":
        raise ConfigError(f"{path} is not there.", "name a run's folder (splitft run makes it), such as runs/demo, or a TOML file.")
    if steps < 0:
        raise ConfigError(f"--steps is {steps}.", "give 0 or more.")
    return Request(load_config(run_dir / "config.toml" if run_dir else path, overrides), run_dir, client, steps, sweep, public, data)


def folder_of(request: Request) -> Path:
    """The run folder where the audit is of the run as it is; a folder beside the runs for anything else."""
    from splitft.apps.audit_page import config_digest
    from splitft.config import load_config

    own, config = request.run_dir, request.config
    if (
        own is not None
        and not request.steps
        and request.data is None
        and config_digest(config) == config_digest(load_config(own / "config.toml"))
    ):
        return own
    return Path(config.run.folder) / f"{config.name}-audit"


def prepare(request: Request, options: Options) -> Prepared:
    """Model, codecs, adapter, the client's rows and public text, all as the run has them."""
    from splitft.audit.base import Case
    from splitft.audit.public import notable_tokens, public_text
    from splitft.data.text import TextFiles

    state = _state(request)
    built = _assembled(request, state)
    federation, vocabulary, tokenizer = built.federation, built.shape.vocabulary, built.base.tokenizer
    plan = _plan(request, built, state)
    now, earlier = _adapters(request, built, state, plan)
    rows, documents = _own_text(request, built, plan)
    ids, trained = private_rows(rows, options)
    source = None if request.public is None else TextFiles(path=str(request.public))
    case = Case(
        federation.split,
        federation.layout,
        federation.settings,
        plan,
        now,
        earlier,
        ids,
        trained,
        public_text(tokenizer, documents, ids.shape[1], vocabulary, source),
        notable_tokens(tokenizer, vocabulary),
        vocabulary,
        federation.start if federation.layout.matrices else None,
    )
    deepest = federation.split.blocks - (plan.tail_blocks if plan.exit_on_client else 0)
    cuts = tuple(sorted({*range(1, deepest), plan.cut})) if request.sweep else (plan.cut,)
    if federation.layout.matrices:  # nothing would cross at the other cuts
        pairs = {one.boundary for one in federation.layout.matrices if one.place == "cut"}
        cuts = tuple(cut for cut in cuts if cut in pairs)
    times = times_sent(request.config, None if state is None else state.round, len(rows))
    fewest = min((len(one.train) for one in federation.clients), default=len(rows))
    most = max(times, times_sent(request.config, None if state is None else state.round, fewest))
    return Prepared(case, cuts, _facts(request, built, state, plan, times), tokenizer, times, most)


def _facts(request: Request, built: Assembly, state: RunState | None, plan: Plan, times: int) -> dict[str, Any]:
    """What the record says was audited."""
    from splitft.apps.audit_page import config_digest
    from splitft.clock import utc_now

    config = request.config
    return {
        "config": config_digest(config),
        "round": 0 if state is None else state.round,
        "utc": utc_now(),
        "client": plan.client,
        "cut": plan.cut,
        "local_steps": request.steps,
        "model": config.model.path,
        "dtype": str(built.base.dtype).removeprefix("torch."),
        "uplink": config.uplink.model_dump(),
        **({"bottleneck": config.bottleneck.model_dump(mode="json")} if built.federation.layout.matrices else {}),
        **({} if request.data is None else {"data": request.data.name}),
        "labels": config.split.labels,
        "tail_blocks": plan.tail_blocks,
        "seed": config.seed,
        "adapter": _adapter_words(state, request.steps),
        "times_sent": times,
    }


def times_sent(config: RunConfig, rounds: int | None, rows: int) -> int:
    """How often a client with so many rows has sent a text after so many rounds (None: all that are planned), one at least; rounded up,
    since of some texts it is one more than of others."""
    steps = (config.rounds if rounds is None else rounds) * config.train.local_steps
    return max(1, math.ceil(steps * config.train.batch_size * config.train.gradient_accumulation / max(1, rows)))


def _assembled(request: Request, state: RunState | None) -> Assembly:
    """The run's parts; of a federation's run what its server has, which is no text. Raises ConfigError where that is not enough."""
    from splitft.apps.assemble import assemble
    from splitft.apps.server_setup import ENGINE, assemble_server
    from splitft.config import override
    from splitft.engine.closing import restore_weights

    if state is not None and state.identity.get("engine") == ENGINE:
        if request.data is None:
            raise ConfigError(
                f"{request.run_dir} is the run of a federation's server: it has no client's text to attack.",
                "name a text to attack with --data FILE; or audit the same configuration as a simulation where the text is.",
            )
        if request.steps:
            raise ConfigError("--steps needs the clients' own text, which a federation's server does not have.", "leave out --steps.")
        built = assemble_server(override(request.config, ["tokens.bucket_tokens=0"]))
    else:
        # Nothing here trains in several processes, and the numbers are the same. What rows are lengthened by is no text to be recovered.
        built = assemble(override(request.config, ["engine.name=cohort", "engine.store=memory", "tokens.bucket_tokens=0"]))
    if state is not None:
        if state.adapters.shape[0] != built.federation.layout.parameters:
            raise ConfigError(
                f"{request.run_dir} has {state.adapters.shape[0]} adapter parameters, not {built.federation.layout.parameters}.",
                "leave out overrides of model and lora.",
            )
        restore_weights(built.federation, state.folded)
    return built


def _own_text(request: Request, built: Assembly, plan: Plan) -> tuple[TokenRows, list[Document]]:
    """The rows to attack and the documents that are not public: the client's, or of the file named in its place."""
    from splitft.apps.server_setup import source_of
    from splitft.data.federate import public_rows

    if request.data is None:
        return built.federation.clients[plan.client].train, list(built.components.source.documents())
    documents = list(source_of(request.data, {}).documents())
    if not documents:
        raise DataError(f"{request.data} has no text.", "name another file.")
    return public_rows(documents, built.base.tokenizer, "blocks", request.config.tokens.block_tokens), documents


def _adapter_words(state: RunState | None, steps: int) -> str:
    """What is attacked: of a run, or what one would begin with."""
    which = "the adapter that training begins with" if state is None else f"the joined adapter of round {state.round}"
    return f"{which}, after {steps} local steps" if steps else which


def _state(request: Request) -> RunState | None:
    """The run's newest checkpoint."""
    from splitft.engine import checkpoint

    return None if request.run_dir is None else checkpoint.load(checkpoint.newest(request.run_dir))


def _plan(request: Request, built: Assembly, state: RunState | None) -> Plan:
    """The client's plan: its cut as the run left it, or as the policy begins. ConfigError where nothing crosses a cut."""
    from splitft.types import Plan

    rules, clients = built.rules, len(built.federation.clients)
    if request.client >= clients:
        raise ConfigError(f"--client is {request.client}, the run has {clients} clients.", f"give 0 to {clients - 1}.")
    begun = built.components.policy.init(built.shape, [one.profile for one in built.devices], built.costs)
    policy = begun if state is None else state.policy
    cuts: Any = policy["cuts"]
    client = request.client if request.client >= 0 else min(range(clients), key=lambda one: cuts[one])
    plan = Plan(client, request.cut or int(cuts[client]), max(1, request.steps), rules.rank, rules.exit_on_client, rules.tail_blocks)
    if plan.is_whole(built.federation.split.blocks):
        raise ConfigError(f"client {client} holds the whole model: nothing crosses a cut.", "there is nothing to audit.")
    return plan


def _adapters(request: Request, built: Assembly, state: RunState | None, plan: Plan) -> tuple[Tensor, Tensor]:
    """The client's adapter [p] now, and as it was when it may have sent the same text before: at the run's start, or before its steps."""
    from splitft.engine.cohort import CohortExecutor
    from splitft.engine.exchange import Ownership, put, take
    from splitft.engine.settings import same_start
    from splitft.types import RoundPlan

    federation = built.federation
    joined = federation.start if state is None else state.adapters.clone()
    own = None if state is None or plan.client not in state.clients else state.clients[plan.client].adapter
    if own is not None:  # parts that are never averaged are the client's own
        columns = Ownership(plan, federation.split.blocks).client_columns(federation.layout)
        joined = joined.clone()
        put(joined, columns, take(own, columns))
    if not request.steps:
        return joined, federation.start
    result = CohortExecutor(federation, 1).train(RoundPlan(1, (plan,)), 0, same_start(joined), {}, lambda count: None)
    return result.values[0].detach().cpu().clone(), joined


def private_rows(rows: TokenRows, options: Options) -> tuple[Tensor, Tensor]:
    """Tokens and targets [s t] of some of a client's training rows: of those long enough, else of the longest and as many tokens as the
    shortest of them has."""
    import numpy as np
    import torch

    from splitft.rng import numpy_stream

    count = min(options.sequences, len(rows))
    enough = np.flatnonzero(rows.lengths >= options.tokens)
    if len(enough) >= count:
        chosen = np.sort(numpy_stream(options.seed, "audit private").permutation(enough)[:count])
    else:
        chosen = np.sort(np.argsort(-rows.lengths, kind="stable")[:count])
    tokens = int(min(options.tokens, rows.lengths[chosen].min()))
    if tokens < 4:
        raise DataError(f"The client's rows have {tokens} tokens.", "audit a client with longer texts.")
    ids, _, trained = rows.batch(chosen)
    return torch.from_numpy(ids[:, :tokens]), torch.from_numpy(trained[:, :tokens])


def show(made: Audit, prepared: Prepared, show_text: bool) -> None:
    """Print the table, the verdict, and with `show_text` a line of the text beside what was recovered of it."""
    from rich.console import Console
    from rich.text import Text

    from splitft.apps.audit_page import audit_table, summary_lines
    from splitft.apps.report_text import clean

    screen = Console(highlight=False)
    screen.print(audit_table(made))
    facts = prepared.facts
    whose = f"The text of {clean(facts['data'])} as that of client" if "data" in facts else "Client"
    sent = "" if made.visits == prepared.times_sent else f" The run sends a text of the client up to {prepared.times_sent} times."
    what = f"{whose} {facts['client']}, cut {facts['cut']}, {facts['adapter']}; model {facts['model']}, {facts['dtype']}.{sent}"
    for line in (what, *summary_lines(made)):
        screen.print(Text(line))
    if not show_text:
        return
    for cut in made.cuts:
        for attacker, found in cut.found.items():
            ids = found[0].clamp_min(0).tolist()
            screen.print(Text(f"cut {cut.cut}, {attacker}: {clean(prepared.tokenizer.decode(ids))}"))
    screen.print(Text(f"the text: {clean(prepared.tokenizer.decode(prepared.case.private[0].tolist()))}"))
