"""A run from start to finish: its folder, its lock, its progress, what it leaves behind. Used by the command line and from Python."""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch

from splitft import __version__
from splitft.apps.assemble import Assembly, OnStage, assemble
from splitft.apps.bottleneck_check import measured_through
from splitft.apps.bottleneck_setup import write_bottleneck
from splitft.apps.leak_limit import SECONDS, bounded
from splitft.apps.privacy_setup import cautions, private_in, told_before
from splitft.apps.report_files import write_atomically
from splitft.apps.secrecy import secrecy_of
from splitft.apps.signals import asked_to_stop
from splitft.clock import utc_now
from splitft.config import RunConfig, load_config
from splitft.engine import checkpoint
from splitft.engine.closing import restore_weights
from splitft.engine.journal import Journal
from splitft.engine.merging import unfolded
from splitft.engine.rounds import RoundRecord, Run, run_rounds
from splitft.engine.shelf import FOLDER as SHELF_FOLDER
from splitft.errors import CheckpointError, ConfigError, Interrupted
from splitft.models.load import resolve
from splitft.peft_format import write_adapter
from splitft.types import Key, ModelShape

if TYPE_CHECKING:
    pass

# What the state in a checkpoint was made for: it would contradict another value.
STATEFUL = ("policy", "ranks", "aggregator", "synchronisation", "controller", "split", "network")
STATEFUL_FIELDS = ("clients.buffer", "clients.fleet", "clients.profiles", "clients.profiles_file", "clients.server_profile")

Listener = Callable[[str, dict[str, Any]], None]


class FederatedRun:
    """One run in its folder. `rounds()` trains and yields a record per round; `finish()` writes the adapter and the report.

    Use `splitft.open_run(config)` and iterate, or `splitft.run(config)` for all at once. Leaving it early is safe: every round is
    committed when it is yielded, and `resume=True` goes on from there.
    """

    def __init__(
        self,
        config: RunConfig,
        resume: Path | None = None,
        listen: Listener = lambda event, facts: None,
        build: Callable[[RunConfig, OnStage, Path | None], Assembly] = assemble,
    ) -> None:
        self.listen = listen
        self.folder = resume if resume is not None else Path(config.run.folder) / config.name
        self._claim(resume is None)
        try:
            told = ""
            if resume is None:  # afterwards the saved configuration has what was found
                if config.split.max_leak < 1.0 and config.split.labels == "client":
                    listen("told", {"text": f"Measuring what the cuts leak (split.max_leak): {SECONDS:g} s at most for each."})
                    listen("stage", {"name": "measure what the cuts leak"})
                config, told = bounded(config)
            self.config, self._told = config, told
            torch.set_num_threads(config.engine.threads or torch.get_num_threads())
            self.assembly = build(config, lambda name: listen("stage", {"name": name}), self.folder)
            if config.engine.deterministic and self.assembly.base.device.type == "cuda":
                torch.use_deterministic_algorithms(True, warn_only=True)
            self._originals = frozen_weights(self.assembly)
            self._run = self._resume() if resume is not None else self._start()
            self._tell()
        except BaseException:
            self.close()
            self._leave_nothing_empty()
            raise

    def _tell(self) -> None:
        """What the user is to know of leaks and noise before anything is sent."""
        if self._told:
            self.listen("told", {"text": self._told})
        built = self.assembly
        clients, layout = len(built.federation.clients), built.federation.layout
        for text in told_before(self.config, built.components, layout, clients, built.shape.hidden_size):
            self.listen("told", {"text": text})

    def _claim(self, fresh: bool) -> None:
        """Take the folder for this process. Raises ConfigError for one that is taken by an earlier run, CheckpointError for one in use."""
        if fresh and checkpoint.exists(self.folder):
            raise ConfigError(
                f"the run folder {self.folder} exists already.",
                f"continue it with: splitft run --resume {self.folder}; or choose another --name.",
            )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock: IO[str] = (self.folder / ".lock").open("w")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if (self.folder / SHELF_FOLDER).is_dir():
                shutil.rmtree(self.folder / SHELF_FOLDER, ignore_errors=True)  # left by a process that died, whatever this one's store is
        except BlockingIOError as problem:
            self.close()
            raise CheckpointError(
                f"{self.folder} is in use by another process.", "wait for it or stop it; a run has one writer."
            ) from problem
        except OSError as problem:
            raise CheckpointError(f"cannot write to {self.folder}: {problem.strerror}.", "choose another run.folder.") from problem

    def _leave_nothing_empty(self) -> None:
        """After a start that failed: a folder with nothing but the lock would look like a run."""
        shutil.rmtree(self.folder / SHELF_FOLDER, ignore_errors=True)
        if self.folder.is_dir() and {path.name for path in self.folder.iterdir()} == {".lock"}:
            (self.folder / ".lock").unlink()
            self.folder.rmdir()

    def _start(self) -> Run:
        built = self.assembly
        write_atomically(self.folder / "config.toml", self.config.to_toml().encode())
        write_atomically(self.folder / "manifest.json", (json.dumps(built.data.manifest) + "\n").encode())
        profiles, layout = [device.profile for device in built.devices], built.federation.layout
        policy_state = built.components.policy.init(built.shape, profiles, built.costs)
        state = checkpoint.RunState(
            round=0,
            adapters=built.start,
            clients={},
            policy=dict(policy_state),
            aggregator=dict(built.components.aggregator.init(layout)),
            ranks=dict(built.components.ranks.init(layout, profiles, built.costs)),
            synchronisation=dict(built.components.synchronisation.init()),
            observations=[],
            virtual_s=0.0,
            wall_s=0.0,
            journal_bytes=0,
            identity=dict(built.identity),
            # What `recover` puts back when round 1 fails after its merge.
            folded={str(key): weight for key, weight in self._originals.items()},
        )
        same_cohorts(built, state)
        journal = Journal(self.folder)
        journal.append(started_event(built, state))
        for text in cautions(self.config, built.components.aggregator):
            journal.append({"event": "warning", "round": 0, "text": text})
        if self._told:
            journal.append({"event": "warning", "round": 0, "text": self._told})
        state.journal_bytes = journal.bytes
        checkpoint.save(self.folder, state, self.config.run.keep_checkpoints)
        return self._make(state, journal)

    def _resume(self) -> Run:
        state = checkpoint.load(checkpoint.newest(self.folder), self.assembly.federation.shelf, self.assembly.identity)
        changed = changed_fields(load_config(self.folder / "config.toml"), self.config)
        if refused := [name for name in changed if name.split(".")[0] in STATEFUL or name in STATEFUL_FIELDS]:
            raise ConfigError(
                f"{refused[0]} cannot change when a run is resumed: its state in the checkpoint belongs to the old value.",
                "leave it out, or start a new run.",
            )
        write_atomically(self.folder / "config.toml", self.config.to_toml().encode())
        journal = Journal(self.folder, state.journal_bytes)
        restore_weights(self.assembly.federation, state.folded)
        journal.append({"event": "resumed", "round": state.round, "utc": utc_now(), "changed": changed})
        return self._make(state, journal)

    def _make(self, state: checkpoint.RunState, journal: Journal) -> Run:
        built = self.assembly
        run = Run(
            built.federation,
            built.executor,
            built.components.policy,
            built.components.ranks,
            built.components.work,
            built.components.aggregator,
            built.components.synchronisation,
            built.components.controller,
            built.costs,
            built.devices,
            built.data.common_held_out,
            built.rules,
            self.folder,
            journal,
            state,
        )
        same_cohorts(built, state)
        run.secrecy = secrecy_of(built.config.secure_aggregation)
        run.on_step = lambda count: self.listen("step", {"count": count})
        run.on_stage = lambda name: self.listen("stage", {"name": name})
        return run

    @property
    def engine(self) -> Run:
        """The federation that is run, for whoever conducts it."""
        return self._run

    @property
    def state(self) -> checkpoint.RunState:
        """The state after the last committed round."""
        return self._run.state

    def rounds(self) -> Iterator[RoundRecord]:
        """Train the rounds that are left; each is committed to the disk before it is yielded."""
        for record in run_rounds(self._run):
            self.listen("round", {"record": record})
            yield record

    def metrics(self) -> list[dict[str, Any]]:
        """One row per round so far: losses, perplexities, bytes, seconds. Ready for a data frame."""
        from splitft.apps.report import metrics_table
        from splitft.apps.report_record import load_record

        return metrics_table(load_record(self.folder / "journal.jsonl"))

    def finish(self) -> Path:
        """Write `adapter/` (stock PEFT) and `report.html`, close the journal; returns the run folder."""
        from splitft.apps.report import write_report

        built, run = self.assembly, self._run
        write_run_adapter(self.folder / "adapter", built, run, self._originals)
        write_bottleneck(self.folder, built.federation.layout, run.state.adapters)
        run.journal.append(*measured_through(run))
        run.journal.append(
            {"event": "run_finished", "rounds": run.state.round, "wall_s": run.state.wall_s, "virtual_s": run.state.virtual_s}
        )
        if private_in(built.components.aggregator) is not None:
            from splitft.apps.private_check import verify_after

            run.journal.append(verify_after(self))
        write_report(self.folder)
        if self.config.run.tensorboard:
            from splitft.apps.tensorboard import export_tensorboard

            export_tensorboard(self.folder)
        return self.folder

    def note_interruption(self) -> None:
        """Say in the journal that the run was stopped; resuming drops the note."""
        if hasattr(self, "_run"):
            self._run.journal.append({"event": "interrupted", "round": self._run.state.round, "utc": utc_now()})

    def close(self) -> None:
        """Let go of the run folder, and of what the engine holds."""
        if hasattr(self, "assembly"):
            self.assembly.close()
            if self.assembly.federation.shelf is not None:
                self.assembly.federation.shelf.close()
        self._lock.close()


def same_cohorts(built: Assembly, state: checkpoint.RunState) -> None:
    """Go on with cohorts of the size the run began with, whatever memory is free today: it shows in the last bits of the numbers."""
    executor: Any = built.executor  # the workers' has no cohorts; Ray's is not imported for a look at its class
    if built.config.engine.name in ("cohort", "ray") and not built.config.engine.cohort_size:
        executor.size = int(state.notes.setdefault("cohort_size", executor.size))


def changed_fields(before: RunConfig, now: RunConfig) -> dict[str, Any]:
    """Dotted names and new values of the fields in which two configurations differ; where and how long a run is kept does not count."""

    def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in values.items():
            found.update(flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value})
        return found

    old, new = flat(before.model_dump(mode="json")), flat(now.model_dump(mode="json"))
    return {
        name: new.get(name) for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name) and not name.startswith("run.")
    }


def frozen_weights(built: Assembly) -> dict[Key, torch.Tensor]:
    """Copies of the adapted weights before training, where the aggregation rule will change them."""
    if not built.components.aggregator.folds:
        return {}
    return {key: built.federation.split.weight(key).detach().clone() for key in built.federation.layout.by_key}


def write_run_adapter(folder: Path, built: Assembly, run: Run, originals: Mapping[Key, torch.Tensor]) -> Path:
    """The global adapters after the last round as a PEFT folder; where clients' own parts are never averaged, theirs beside it.

    What a rule folded into the frozen weights (`originals` are those before training) comes back out: the folder then holds the whole
    change as one adapter of the rank that takes.
    """
    from transformers.pytorch_utils import Conv1D

    layout, anatomy, model = built.federation.layout, built.base.anatomy, built.config.model
    transposed = any(isinstance(module, Conv1D) for module in built.federation.split.model.modules())
    row = run.state.adapters
    if originals:
        weights = {key: built.federation.split.weight(key) for key in originals}
        layout, row = unfolded(layout, row, weights, originals, transposed)
    for client, state in run.state.clients.items():
        if state.adapter is not None and built.config.split.server == "unaveraged":
            own = folder.with_name(f"{folder.name}-client-{client}")
            write_adapter(own, layout, state.adapter, anatomy.blocks_path, resolve(model.path), transposed, model.revision)
    return write_adapter(folder, layout, row, anatomy.blocks_path, resolve(model.path), transposed, model.revision)


def started_event(built: Assembly, state: checkpoint.RunState) -> dict[str, Any]:
    """Event `run_started`: what runs, on which data, with whom."""
    cuts, measured = state.policy.get("cuts", []), built.identity.get("engine") == "federation"
    return {
        "event": "run_started",
        "version": __version__,
        "utc": utc_now(),
        "name": built.config.name,
        "config": built.config.model_dump(mode="json"),
        "model": {
            "name": built.config.model.path,
            "architecture": type(built.federation.split.model).__name__,
            "parameters": parameters_of(built.shape),
            "blocks": len(built.shape.blocks),
            "hidden_size": built.shape.hidden_size,
            "vocabulary": built.shape.vocabulary,
            "dtype": str(built.base.dtype).removeprefix("torch."),
            "device": built.base.device.type,
            "adapter_parameters": built.federation.layout.parameters,
        },
        "clients": [
            {
                "client": one.client,
                "name": one.name,
                "documents": one.documents,
                "train_rows": len(one.train),
                "train_tokens": one.train.tokens,
                "held_out_tokens": one.held_out.tokens,
                "profile": built.devices[one.client].profile.name,
                "cut": cuts[one.client] if one.client < len(cuts) else None,
                "length_histogram": built.data.length_histograms[one.client],
            }
            for one in built.data.clients
        ],
        "length_edges": built.data.length_edges,
        "skew_index": built.data.skew_index,
        "partition": "clients' own" if measured else built.config.partition.name,
        "clock": "measured" if measured else "virtual",
        "references": references(built.config),
    }


def references(config: RunConfig) -> list[str]:
    from splitft.apps.cite import catalogue, references_of

    return references_of(config, catalogue())


def parameters_of(shape: ModelShape) -> int:
    """Parameters of the whole model, tied tensors once."""
    head = 0 if shape.tied else shape.head_parameters
    return sum(block.parameters for block in shape.blocks) + shape.embedding_parameters + shape.exit_parameters + head


@contextmanager
def stoppable(folder: Path, say: Callable[[str], None] = lambda text: None) -> Iterator[Callable[[], None]]:
    """Turn Ctrl-C and SIGTERM into a stop after the current step. Yields a check to call after every step; it raises Interrupted.

    The first signal is acknowledged through `say`, a second one stops at once. The remedy names what can be done: resume, or start again.
    """

    def remedy() -> str:
        begun = checkpoint.exists(folder)
        return f"go on with: splitft run --resume {folder}" if begun else "nothing was trained yet: start it again when you like."

    try:
        with asked_to_stop(lambda: say("stopping after this step; once more to stop at once")) as asked:

            def check() -> None:
                if asked():
                    raise Interrupted("Stopped; everything up to the last finished round is on disk.", remedy())

            yield check
    except KeyboardInterrupt as problem:
        raise Interrupted("Stopped at once; everything up to the last finished round is on disk.", remedy()) from problem
