"""`engine.name = "ray"`: a Ray to run on, started here or found at an address, and the executor on it.

Ray is imported only when this engine is chosen. A Ray started here listens on this machine's loopback address alone and is stopped with the
run; it asks for no dashboard and reports to nobody.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib.util
import math
import os
import shutil
import signal
import socket
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PretrainedConfig

from splitft import __version__
from splitft.apps.console import usable_cores
from splitft.config import RunConfig
from splitft.engine.settings import Federation
from splitft.errors import ConfigError, MissingExtraError, ResourceError
from splitft.models.attention import NAME as FLOAT32_ATTENTION
from splitft.models.attention import build_with
from splitft.models.attention import register as register_attention
from splitft.models.base import Anatomy
from splitft.models.load import causal_class
from splitft.split import SplitModel

if TYPE_CHECKING:
    from splitft.engine.ray_executor import RayExecutor

LOOPBACK = ("127.0.0.1", "::1")
REMOVALS = 200
CONNECT_S = 10.0
# Of a processor; Ray counts in ten-thousandths.
SMALLEST_SHARE = 0.0001
# What Ray and the processes it starts read.
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DISABLE_IMPORT_WARNING": "1",
}


@dataclass(frozen=True)
class Skeleton:
    """The split model of a run without its tensors: structure, slots and adapted projections as `assemble` makes them."""

    config: RunConfig
    model: PretrainedConfig
    anatomy: Anatomy
    dtype: torch.dtype
    attention: str
    slots: Callable[[RunConfig, Anatomy, Any], SplitModel]
    keys: tuple[Any, ...]
    versions: tuple[str, str]

    def __call__(self) -> SplitModel:
        """Called in an actor. ConfigError where other versions are installed than with the driver."""
        if self.versions != versions():
            ours, theirs = (" and torch ".join(one) for one in (versions(), self.versions))
            raise ConfigError(
                f"a machine of the cluster has splitft {ours}; the run was started with {theirs}.", "install the same versions everywhere."
            )
        if self.attention == FLOAT32_ATTENTION:
            register_attention()
        cls: Any = causal_class(self.model)
        with torch.device("meta"):
            model = build_with(lambda name: cls._from_config(self.model, attn_implementation=name, dtype=self.dtype), self.attention)
        split = self.slots(self.config, self.anatomy, model.eval())
        if tuple(split.keys) != self.keys:
            split.adapt(list(self.keys))
        return split


def versions() -> tuple[str, str]:
    """Of splitft and torch: what must be equal on all machines for equal numbers."""
    return __version__, torch.__version__


def require_ray() -> None:
    """MissingExtraError when Ray is not installed."""
    if importlib.util.find_spec("ray") is None:
        raise MissingExtraError(
            'engine.name = "ray" needs Ray, which is not installed.', 'pip install "splitft[ray]", or engine.name = "cohort".'
        )


@dataclass(frozen=True)
class Connection:
    """A Ray in use: the processors of each of its machines, and what ends the use."""

    cores: tuple[float, ...]
    local: bool
    close: Callable[[], None]


def connect(address: str, wanted_cores: int) -> Connection:
    """Use the Ray at `address` ("auto", "host:port", "ray://host:port"), the one this process is connected to already, or start one.

    `wanted_cores`: how many a Ray started here offers. Raises ResourceError when there is none at the address.
    """
    require_ray()
    with _environment(QUIET), _same_handlers():
        import ray

        if not address and ray.is_initialized():
            return Connection(_cores(ray.nodes()), False, lambda: None)
        return _join_cluster(address) if address else _start(wanted_cores)


def _join_cluster(address: str) -> Connection:
    import ray

    try:
        _require_listener(address)
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except (OSError, ValueError, RuntimeError, ImportError) as problem:
        hint = 'pip install "ray[client]" for ray:// addresses; ' if isinstance(problem, ImportError) else ""
        raise ResourceError(
            f"there is no Ray to be had at engine.address = {address!r}: {_first_line(problem)}.",
            f"{hint}start one with `ray start --head`, or leave the address empty to have one started here.",
        ) from problem
    return Connection(_cores(ray.nodes()), False, ray.shutdown)


def _require_listener(address: str) -> None:
    """OSError when nobody answers at a host and port: Ray itself would wait long and then end the process."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S).close()


def _start(cores: int) -> Connection:
    """A Ray of our own. Its first process sometimes does not come up on a busy machine, so it is tried twice. Raises ResourceError."""
    try:
        return _start_once(cores)
    except RuntimeError:
        pass
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()  # Ray forgets the process that it gave up
    try:
        return _start_once(cores)
    except RuntimeError as problem:
        raise ResourceError(
            f"Ray does not start on this machine: {_first_line(problem)}.",
            'try again when it is less busy, start Ray yourself and give engine.address, or take engine = "cohort".',
        ) from problem


def _start_once(cores: int) -> Connection:
    """A Ray of our own on the loopback address, its files in a folder that goes with it."""
    import ray

    # Not TMPDIR: the names of Ray's sockets would grow longer than a system allows.
    folder = Path(tempfile.mkdtemp(prefix="splitft-ray-", dir="/tmp"))

    def stop() -> None:
        atexit.unregister(stop)
        ray.shutdown()
        for _ in range(REMOVALS):  # its processes end one by one, and write as long as they live
            shutil.rmtree(folder, ignore_errors=True)
            if not folder.exists():
                break

    atexit.register(stop)  # for a program that ends without closing its run
    try:
        with _on_loopback():
            ray.init(
                address="local",
                num_cpus=cores,
                include_dashboard=False,
                log_to_driver=False,
                logging_level="ERROR",
                _node_ip_address=LOOPBACK[0],
                _temp_dir=str(folder),
            )
        if (found := ray.util.get_node_ip_address()) not in LOOPBACK:
            raise ResourceError(
                f"Ray {ray.__version__} cannot be kept on this machine: it listens on {found}.",
                "start Ray yourself as you see fit, and give engine.address.",
            )
    except BaseException:
        stop()
        raise
    return Connection((float(cores),), True, stop)


def _cores(nodes: Sequence[Mapping[str, Any]]) -> tuple[float, ...]:
    """Processors of each living machine that has any."""
    found = [float(node.get("Resources", {}).get("CPU", 0.0)) for node in nodes if node.get("Alive", True)]
    return tuple(sorted((cores for cores in found if cores > 0), reverse=True))


def crew_of(cores: Sequence[float], cohorts: int, actors: int = 0, threads: int = 0) -> tuple[int, int, float]:
    """Actors, threads of each, and processors each asks for, on machines with these cores, for so many cohorts a round.

    0 actors: as many as the machines have room for, at most one per cohort. 0 threads: as many as leave room for all actors. More
    actors than cores share them.
    """

    def room(each: int) -> int:
        return sum(int(one) // each for one in cores)

    count = actors or max(1, min(cohorts, room(max(1, threads))))
    if not threads:
        threads = max((each for each in range(1, int(max(cores, default=1)) + 1) if room(each) >= count), default=1)
    share = float(threads)
    while sum(int(one / share) for one in cores) < count and share > SMALLEST_SHARE:
        # Else one would wait for a processor that others hold for good. Ray takes whole numbers above one.
        share = share - 1 if share > 1 else max(SMALLEST_SHARE, int(9000 * share) / 10_000)
    return count, threads, share


def ray_executor(
    config: RunConfig, federation: Federation, skeleton: Skeleton, size: int, in_place: bool, folds: bool
) -> tuple[RayExecutor, Callable[[], None]]:
    """The executor, for cohorts of `size` clients, on a Ray that is found or started; and what ends both. Raises MissingExtraError,
    ResourceError."""
    from splitft.engine.ray_worker import Blueprint

    engine = config.engine
    cohorts = -(-len(federation.clients) // size)
    alone = crew_of((float(usable_cores()),), cohorts, engine.actors, engine.threads)
    connection = connect(engine.address, math.ceil(alone[0] * alone[2]))
    try:
        from splitft.engine.ray_executor import Crew, RayExecutor

        actors, threads, cpus = alone if connection.local else crew_of(connection.cores, cohorts, engine.actors, engine.threads)
        environment = () if connection.local else (("OMP_NUM_THREADS", str(threads)), ("OMP_WAIT_POLICY", "PASSIVE"))
        crew = Crew(actors, threads, cpus, 1 if federation.device.type == "cuda" else 0, environment)
        executor = RayExecutor(federation, Blueprint.of(federation, skeleton, size, folds), crew, in_place, engine.deterministic)
    except BaseException:
        connection.close()
        raise

    def close() -> None:
        with contextlib.suppress(Exception):  # a Ray that is gone has no actors left to end
            executor.close()
        connection.close()

    return executor, close


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """These environment variables inside, and what was there before afterwards."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


@contextlib.contextmanager
def _on_loopback() -> Iterator[None]:
    """Ray takes a loopback address for a slip and listens on the machine's own, except where it knows no clusters: as on macOS, where that
    would ask the user's firewall. So it is told to know none; whether that worked is looked at afterwards."""
    from ray._private import ray_constants

    before = getattr(ray_constants, "ENABLE_RAY_CLUSTER", None)
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


@contextlib.contextmanager
def _same_handlers() -> Iterator[None]:
    """The signal handlers as they were: Ray puts its own in their place, and Ctrl-C is ours to answer."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            with contextlib.suppress(ValueError):  # not in the main thread: then Ray has set none either
                signal.signal(number, handler)


def _first_line(problem: BaseException) -> str:
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
    return (lines[0] if lines else type(problem).__name__).rstrip(".")
