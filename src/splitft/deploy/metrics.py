"""Figures for Prometheus. Labels are bounded: seats by number, never a name; kinds and codes from lists, anything else is "other"."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from splitft.deploy.process import process_facts
from splitft.deploy.status import ServerStatus

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
DIRECTIONS = ("up", "down")
KINDS = ("activations", "gradients", "labels", "adapters", "weights", "control")
DOOR_CODES = ("roster", "version", "policy", "identity", "excluded", "busy", "full", "draining", "protocol")
MESSAGE_CODES = ("codec", "shape", "finite", "norm", "late", "oversize")
REFUSALS = (*DOOR_CODES, *MESSAGE_CODES)
STEP_EDGES_S = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
LONG_EDGES_S = (0.1, 0.5, 1.0, 5.0, 10.0, 30.0, 60.0, 300.0, 900.0, 3600.0, 14_400.0)
PASS_EDGES = (1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 32.0, 64.0)


class Metrics:
    """The figures of one server, in a registry of its own. What `status` knows is read from it at every scrape."""

    def __init__(self, status: ServerStatus, version: str = "", protocol: str = "") -> None:
        registry = self.registry = CollectorRegistry(auto_describe=False)
        self._bytes = Counter("splitft_bytes", "Bytes that crossed, headers included.", ("direction", "kind"), registry=registry)
        self._refusals = Counter("splitft_refusals", "Clients and messages refused.", ("code",), registry=registry)
        self._reconnects = Counter("splitft_reconnects", "Sessions that came back after their connection broke.", registry=registry)
        self._tokens = Counter("splitft_tokens", "Tokens trained on.", registry=registry)
        self._step_s = Histogram("splitft_step_seconds", "From a client's step to the answer.", buckets=STEP_EDGES_S, registry=registry)
        self._pass = Histogram("splitft_pass_clients", "Clients whose work one server pass joined.", buckets=PASS_EDGES, registry=registry)
        self._round_s = Histogram("splitft_round_seconds", "Seconds a round took.", buckets=LONG_EDGES_S, registry=registry)
        self._checkpoint_s = Histogram(
            "splitft_checkpoint_seconds", "Seconds to put a round on the disk.", buckets=LONG_EDGES_S, registry=registry
        )
        self._queue = Gauge("splitft_queue_length", "Clients whose work waits for a server pass.", registry=registry)
        for direction in DIRECTIONS:
            for kind in (*KINDS, "other"):
                self._bytes.labels(direction, kind)
        registry.register(_FromStatus(status, version, protocol))

    def traffic(self, direction: str, kind: str, count_bytes: int) -> None:
        """Bytes that crossed `up` or `down`."""
        known = kind if kind in KINDS else "other"
        self._bytes.labels(direction if direction in DIRECTIONS else "up", known).inc(count_bytes)

    def refused(self, code: str) -> None:
        """A client at the door, or a message, was refused."""
        self._refusals.labels(code if code in REFUSALS else "other").inc()

    def reconnected(self) -> None:
        """A session came back."""
        self._reconnects.inc()

    def tokens(self, count: int) -> None:
        """Tokens were trained on."""
        self._tokens.inc(count)

    def step(self, seconds: float) -> None:
        """A client's step was answered."""
        self._step_s.observe(seconds)

    def server_pass(self, clients: int) -> None:
        """The server ran one pass for so many clients."""
        self._pass.observe(clients)

    def round_took(self, seconds: float) -> None:
        """A round ended."""
        self._round_s.observe(seconds)

    def checkpoint_took(self, seconds: float) -> None:
        """A round was committed."""
        self._checkpoint_s.observe(seconds)

    def queue(self, length: int) -> None:
        """So many clients' work waits now."""
        self._queue.set(length)

    def text(self) -> bytes:
        """Everything in Prometheus's text format 0.0.4."""
        return generate_latest(_WithoutBirthdays(self.registry))


class _WithoutBirthdays(CollectorRegistry):
    """A view of a registry without the `_created` samples, which double what is stored and say nothing here."""

    def __init__(self, inner: CollectorRegistry) -> None:
        super().__init__(auto_describe=False)
        self._inner = inner

    def collect(self) -> Iterator[Metric]:
        for metric in self._inner.collect():
            metric.samples = [sample for sample in metric.samples if not sample.name.endswith("_created")]
            yield metric


class _FromStatus(Collector):
    """What the status holds anyway, read when somebody asks."""

    def __init__(self, status: ServerStatus, version: str, protocol: str) -> None:
        self._status, self._version, self._protocol = status, version, protocol

    def collect(self) -> Iterable[Metric]:
        status, (now, planned) = self._status, self._status.rounds()
        yield GaugeMetricFamily("splitft_round", "The round under way.", value=now)
        yield GaugeMetricFamily("splitft_rounds", "Rounds the run is to have.", value=planned)
        yield GaugeMetricFamily("splitft_ready", "1 while clients are served.", value=float(status.ready))
        clients = GaugeMetricFamily("splitft_clients", "Clients by state.", labels=("state",))
        for state, count in status.states().items():
            clients.add_metric((state,), count)
        yield clients
        present = GaugeMetricFamily("splitft_seat_present", "1 while the client of this seat is there.", labels=("seat",))
        for seat, there in status.present().items():
            present.add_metric((str(seat),), float(there))
        yield present
        facts = process_facts()
        for name, text in (("rss_bytes", "Resident memory."), ("descriptors", "Open descriptors."), ("threads", "Python threads.")):
            if (value := facts[name]) is not None:
                yield GaugeMetricFamily(f"splitft_process_{name}", text, value=value)
        build = GaugeMetricFamily("splitft_build_info", "Always 1.", labels=("version", "protocol"))
        build.add_metric((self._version, self._protocol), 1.0)
        yield build
