"""Adapters as changes: what arrives after many rounds is what was sent, at any length, and nothing adds up."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from splitft.apps.session import FederatedRun
from splitft.compress.base import Codec
from splitft.compress.cast import Cast
from splitft.compress.error_bounded import ErrorBounded
from splitft.compress.feedback import Feedback
from splitft.compress.residual import Residual
from splitft.compress.topk import TopK
from splitft.engine.adapters import ROW, AdapterStreams, adapter_packet_bytes, carry_changes, facts_together, receive_change, send_change
from splitft.engine.streams import StreamStates
from splitft.errors import CodecError, ProtocolError
from splitft.rng import torch_stream
from splitft.types import Plan
from splitft.wire import Stream, StreamName

from ..support import settings
from ..tiny_run import tiny_config

CODECS: dict[str, Codec] = {
    "cast": Cast(),
    "bounded": ErrorBounded(0.1),
    "residual": Residual(),
    "feedback": Feedback(inner=TopK(share=0.3)),
}
every_codec = pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS.keys())
PLAN = Plan(client=1, cut=2, local_steps=1, rank=2)


def change(size: int, turn: int) -> torch.Tensor:
    return torch.randn(size, generator=torch_stream(turn, "adapters-test", size))


def stream(codec: Codec, client: int = 1) -> Stream:
    return Stream.open(codec, StreamName(3, client, 1, "up adapters"))


@every_codec
@pytest.mark.parametrize("size", [0, 1, ROW - 1, ROW, ROW + 1, 1000])
def test_two_ends_and_one_engine_with_both_decode_the_same(codec: Codec, size: int) -> None:
    ends, both = (stream(codec), stream(codec)), stream(codec)
    for turn in range(3):
        data = send_change(ends[0], change(size, turn), segment=turn % 2)
        apart = receive_change(ends[1], data, size, segment=turn % 2)
        [together], [packet] = carry_changes([both], [change(size, turn)], [turn % 2])
        assert apart.shape == (size,)
        assert torch.equal(apart, together)
        assert bytes(packet) == bytes(data)


@every_codec
def test_clients_together_are_clients_one_by_one(codec: Codec) -> None:
    sizes = [300, 1, 0, 129]
    cohort, alone = [stream(codec, k) for k in range(4)], [stream(codec, k) for k in range(4)]
    for turn in range(2):
        changes = [change(size, turn) for size in sizes]
        found, packets = carry_changes(cohort, changes, [0] * 4)
        for k, one in enumerate(changes):
            [single], [packet] = carry_changes([alone[k]], [one], [0])
            assert torch.equal(single, found[k])
            assert bytes(packet) == bytes(packets[k])


def test_down_the_change_is_taken_against_what_the_client_has_so_errors_do_not_add_up() -> None:
    """A hundred rounds of slowly moving adapters over a coarse codec: the last is as near as the first."""
    config = settings(adapter_downlink=ErrorBounded(0.5), adapter_uplink=Cast())
    states, start, known, target = StreamStates(), torch.zeros(500), torch.zeros(500), torch.zeros(500)
    for index in range(100):
        target = target + 0.01 * change(500, index)
        streams = AdapterStreams.open(config, PLAN, index, states, start)
        assert streams.known is not None
        assert streams.down is not None
        assert torch.equal(streams.known, known)
        [moved], _ = carry_changes([streams.down], [target - streams.known], [0])
        known = streams.known = streams.known + moved
        step = 0.5 * float((target - known + moved).square().mean().sqrt())
        assert float((target - known).abs().amax()) <= max(step, 0.02)
        states = streams.remembered(config, StreamStates())


def test_a_lossless_codec_has_no_streams() -> None:
    streams = AdapterStreams.open(settings(), PLAN, 1, None, torch.zeros(4))
    assert (streams.up, streams.down, streams.known) == (None, None, None)
    assert adapter_packet_bytes(settings(), 100, True) - adapter_packet_bytes(settings(), 0, True) == 400


def test_a_change_of_another_size_or_damaged_is_refused() -> None:
    data = send_change(stream(Cast()), change(300, 1), 0)
    with pytest.raises(ProtocolError, match="due are 100 parameters"):
        receive_change(stream(Cast()), data, 100, 0)
    for end in range(0, len(data), 7):
        with pytest.raises((ProtocolError, CodecError)):
            receive_change(stream(Cast()), data[:end], 300, 0)


def test_what_is_expected_on_the_wire_is_what_a_cast_takes() -> None:
    config = settings(adapter_uplink=Cast(), adapter_downlink=ErrorBounded(0.1))
    assert adapter_packet_bytes(config, 300, True) == len(send_change(stream(Cast()), change(300, 1), 0))
    sent = len(send_change(stream(ErrorBounded(0.1)), change(30000, 1), 0))
    assert 0.5 * sent < adapter_packet_bytes(config, 30000, False) < 2 * sent


def test_facts_of_both_ends_stand_in_one_order() -> None:
    assert list(facts_together({"up adapters": {}, "up activations": {}}, {"down adapters": {}})) == [
        "up activations",
        "up adapters",
        "down adapters",
    ]


def test_what_is_lost_on_the_way_down_is_not_lost_to_the_federation(tmp_path: Path) -> None:
    """With nothing coming through down, clients train from the start again and again, and the server adds up what they learned."""
    nothing = {"name": "error_bounded", "bound": 1e3, "of": "absolute"}
    rows = {}
    for engine in ("cohort", "workers"):
        config = tiny_config(tmp_path, rounds=2, adapter_downlink=nothing, engine={"name": engine}, run={"folder": str(tmp_path / engine)})
        run = FederatedRun(config)
        states = [run.state.adapters.clone()]
        for _ in run.rounds():
            states.append(run.state.adapters.clone())
        run.close()
        first, both = states[2] - states[0], states[3] - states[0]
        held = run.assembly.federation.layout.columns(0, 1)  # blocks that every client holds
        moved = torch.linalg.vector_norm(both[held]) / torch.linalg.vector_norm(first[held])
        assert float(moved) > 1.2, "the second round stands on the first"
        rows[engine] = states[3]
    torch.testing.assert_close(rows["cohort"], rows["workers"], rtol=1e-3, atol=1e-4)
