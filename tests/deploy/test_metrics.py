"""Metrics: Prometheus's own parser reads them, they say what happened, and no peer can make them grow."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from splitft.deploy.metrics import KINDS, Metrics
from splitft.deploy.status import STATES, ServerStatus

from . import status_scenes as scenes


def read(metrics: Metrics) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Sample and labels -> value, by the parser of the project that defines the format."""
    families = text_string_to_metric_families(metrics.text().decode("utf-8"))
    return {(sample.name, tuple(sorted(sample.labels.items()))): sample.value for family in families for sample in family.samples}


def value(metrics: Metrics, name: str, **labels: str) -> float:
    return read(metrics)[name, tuple(sorted(labels.items()))]


def test_they_say_what_happened() -> None:
    status, metrics = scenes.running()
    scenes.midway(status, metrics)
    metrics.refused("roster")
    metrics.refused("roster")
    metrics.reconnected()
    metrics.queue(3)
    steps = 4 * 7 * scenes.STEPS + 7 + 5 + 9
    assert value(metrics, "splitft_round") == 8
    assert value(metrics, "splitft_rounds") == 20
    assert value(metrics, "splitft_ready") == 1
    assert value(metrics, "splitft_bytes_total", direction="up", kind="activations") == steps * 511_000
    assert value(metrics, "splitft_bytes_total", direction="down", kind="gradients") == steps * 498_000
    assert value(metrics, "splitft_tokens_total") == steps * 2048
    assert value(metrics, "splitft_step_seconds_count") == value(metrics, "splitft_pass_clients_count") == steps
    assert value(metrics, "splitft_pass_clients_bucket", le="1.0") == 7 * scenes.STEPS + 7
    assert value(metrics, "splitft_refusals_total", code="roster") == 2
    assert value(metrics, "splitft_reconnects_total") == 1
    assert value(metrics, "splitft_queue_length") == 3
    assert value(metrics, "splitft_clients", state="training") == 2
    assert value(metrics, "splitft_clients", state="lost") == 1
    assert value(metrics, "splitft_seat_present", seat="0") == 1
    assert value(metrics, "splitft_seat_present", seat="3") == 0
    assert value(metrics, "splitft_round_seconds_count") == value(metrics, "splitft_checkpoint_seconds_count") == 7
    assert value(metrics, "splitft_build_info", version="0.9.0", protocol="1.0") == 1
    assert value(metrics, "splitft_process_rss_bytes") > 1 << 20


def test_peers_cannot_add_series() -> None:
    status = ServerStatus("run", 1)
    metrics = Metrics(status)
    status.seat(0, name='evil"} 1\nsplitft_forged 1')
    metrics.refused("roster")
    metrics.refused("other")
    before = len(read(metrics))
    for index in range(1000):
        metrics.refused(f"code-{index}\n")
        metrics.traffic("up", f"kind-{index}", 5)
        status.seat(0, name=f"name-{index}")
    assert len(read(metrics)) == before
    assert value(metrics, "splitft_refusals_total", code="other") == 1001
    assert value(metrics, "splitft_bytes_total", direction="up", kind="other") == 5000
    assert b"evil" not in metrics.text()
    assert b"forged" not in metrics.text()


def test_every_kind_and_state_is_there_from_the_start() -> None:
    metrics = Metrics(ServerStatus("run", 1))
    found = read(metrics)
    assert {dict(labels)["kind"] for name, labels in found if name == "splitft_bytes_total"} == {*KINDS, "other"}
    assert {dict(labels)["state"] for name, labels in found if name == "splitft_clients"} == set(STATES)
    assert not any(name.endswith("_created") for name, _ in found)


def test_two_servers_in_one_process_do_not_share_figures() -> None:
    one, other = Metrics(ServerStatus("one", 1)), Metrics(ServerStatus("other", 1))
    one.tokens(5)
    assert value(one, "splitft_tokens_total") == 5
    assert value(other, "splitft_tokens_total") == 0
