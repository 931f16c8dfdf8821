"""Hostile and careless peers: what is refused by name, takes no memory and leaves nothing half-applied."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from splitft.compress.base import HEADER, Packet
from splitft.compress.cast import Cast
from splitft.compress.identity import Identity
from splitft.engine.client import Client
from splitft.engine.exchange import packet_bytes, round_end_frame
from splitft.engine.server import Server
from splitft.engine.settings import ClientState, same_start
from splitft.errors import AdapterError, CodecError, ProtocolError, SplitftError
from splitft.messages import Frame, RoundEnd, Type, decode

from .drive import Drive, federation_of, refields, reframe, repacket
from .test_client import opening
from .test_server import BAD_CLIENT, ENDS, early_end, outside


@pytest.fixture(scope="module")
def fed() -> Any:
    return federation_of()


# ---- messages.py: Frame.read lets UnicodeDecodeError out (invalid UTF-8 in a field name or text)
def test_fields_with_invalid_utf8_are_refused() -> None:
    fields = msgspec.msgpack.encode({"round": 1, "client": 0, "tokens": 1, "squared_norm": 0.5, "loss_sum": 1.0})
    bad = bytearray(fields)
    bad[bad.index(b"round")] ^= 0x80
    with pytest.raises(ProtocolError):
        Frame(Type.ROUND_END, bytes(bad), (), ()).read(RoundEnd)


# ---- compress/base.py: a zero axis beside huge ones passes the size check, torch raises RuntimeError
@pytest.mark.parametrize("codec", [Identity(), Cast()], ids=["identity", "cast"])
def test_a_zero_axis_beside_huge_ones_is_refused(codec: Any) -> None:
    data = HEADER.pack(1, codec.number, 0, 4, 0, 0, 2**32 - 1, 2**32 - 1, 2**32 - 1, 0)
    with pytest.raises(CodecError):
        codec.decode(Packet.parse(memoryview(data))[0], None)


# ---- compress/cast.py: bf16 of a float16 near its maximum is beyond float16; it comes back as the largest number there is
def test_a_cast_never_decodes_to_infinity() -> None:
    largest = torch.tensor([65504.0], dtype=torch.float16)
    decoded, _ = Cast().decode(Cast().encode(largest, None)[0], None)
    assert torch.equal(decoded, largest)


def test_a_header_that_lies_about_the_type_gives_no_infinity() -> None:
    packet, _ = Cast().encode(torch.tensor([1e30]), None)
    decoded, _ = Cast().decode(Packet(packet.codec, torch.float16, packet.shape, packet.payload), None)
    assert bool(torch.isfinite(decoded).all())


# ---- engine/server.py _arrive/_gradient: decoded tensors of another width or without axes
@pytest.mark.parametrize("width", [16, 64, 1])
def test_a_hidden_state_of_another_width_is_refused(fed: Any, width: int) -> None:
    drive = Drive(fed)
    tokens = sum(decode(drive.waiting[0]).lengths)
    bad = repacket(drive.waiting[0], 0, lambda packet: Packet(1, packet.dtype, (tokens, width), bytes(4 * tokens * width)))
    with pytest.raises(ProtocolError):
        drive.server.handle([(0, bad)])


@pytest.mark.parametrize("u_shape", [False, True])
def test_a_tensor_without_axes_is_refused(fed: Any, u_shape: bool) -> None:
    drive = Drive(fed, u_shape=u_shape)
    if u_shape:
        drive.deliver(0)
    bad = repacket(drive.waiting[0], 0, lambda packet: Packet(1, packet.dtype, (), bytes(4)))
    with pytest.raises(ProtocolError):
        drive.server.handle([(0, bad)])


def test_a_gradient_of_another_width_is_refused_and_the_pass_stays_open(fed: Any) -> None:
    drive = Drive(fed, u_shape=True)
    drive.deliver(0)
    bad = repacket(drive.waiting[0], 0, lambda packet: Packet(1, packet.dtype, (packet.shape[0], 16), bytes(64 * packet.shape[0])))
    with pytest.raises(ProtocolError):
        drive.server.handle([(0, bad)])
    drive.deliver(0)


# ---- engine/server.py _finish, engine/client.py _prepare/_receive: frame.packets[0] without a check (IndexError)
def test_an_end_without_adapters_is_refused(fed: Any) -> None:
    drive = Drive(fed)
    while decode(drive.waiting[0]).kind != Type.ROUND_END:
        drive.deliver(0)
    with pytest.raises(ProtocolError):
        drive.server.handle([(0, reframe(drive.waiting[0], packets=()))])


def test_replies_and_openings_without_packets_are_refused(fed: Any) -> None:
    drive = Drive(fed)
    with pytest.raises(ProtocolError):
        next(Client(fed, 0, ClientState()).round(reframe(opening(drive), packets=())))
    ((_, reply),) = drive.server.handle([(0, drive.waiting[0])])
    with pytest.raises(ProtocolError):
        drive.talks[0].send(reframe(reply, packets=()))


# ---- engine/server.py _forward: normaliser 0 divides by zero; a norm that is NaN or negative poisons the session
def test_a_step_that_says_no_targets_is_refused(fed: Any) -> None:
    drive = Drive(fed)
    with pytest.raises(ProtocolError):
        drive.server.handle([(0, refields(drive.waiting[0], normaliser=0))])


@pytest.mark.parametrize("norm", [float("nan"), float("inf"), -1.0])
def test_a_norm_that_is_none_is_refused(fed: Any, norm: float) -> None:
    drive = Drive(fed)
    drive.deliver(0)
    with pytest.raises(ProtocolError):
        drive.server.handle([(0, refields(drive.waiting[0], squared_norm=norm))])
    drive.deliver(0)
    assert bool(torch.isfinite(drive.server.bank.values).all())


# ---- engine/server.py _arrive: micro is not checked, so a step can be repeated, skipped or grown without limit
@pytest.mark.parametrize("micro", [1, 7])
def test_a_micro_batch_beyond_the_accumulation_is_refused(fed: Any, micro: int) -> None:
    drive = Drive(fed)
    first = drive.waiting[0]
    with pytest.raises(ProtocolError):
        drive.server.handle([(0, refields(first, micro=micro))])
    drive.deliver(0)
    with pytest.raises(ProtocolError):
        drive.server.handle([(0, refields(first, micro=micro))])


def test_the_same_micro_batch_twice_is_refused() -> None:
    drive = Drive(federation_of(gradient_accumulation=2))
    drive.deliver(0)
    second = drive.waiting[0]
    drive.deliver(0)
    with pytest.raises(ProtocolError):
        drive.server.handle([(0, second)])


def test_an_end_after_half_a_step_is_refused() -> None:
    drive = Drive(federation_of(gradient_accumulation=2), steps=1)
    drive.deliver(0)
    columns = drive.federation.layout.columns(0, 1)
    end = round_end_frame(drive.plan.plans[0], 4, 10, 0.0, 0.0, torch.zeros(columns.stop - columns.start), Identity()).encode()
    with pytest.raises(ProtocolError, match="closed the round"):
        drive.server.handle([(0, end)])


def test_a_step_beyond_the_plan_is_refused(fed: Any) -> None:
    drive = Drive(fed, steps=1)
    first = drive.waiting[0]
    drive.deliver(0)
    with pytest.raises(ProtocolError):
        drive.server.handle([(0, refields(first, step=1))])


# ---- engine/server.py: a U-shaped client may open passes without end
def test_a_second_step_before_the_gradient_is_refused(fed: Any) -> None:
    drive = Drive(fed, u_shape=True)
    message = drive.waiting[0]
    drive.deliver(0)
    with pytest.raises(ProtocolError):
        drive.server.handle([(0, message)])
    assert len(drive.server.open) == 1


# ---- engine/server.py _finish: adapters of a wrong length are found after the last step was closed: half-applied
@pytest.mark.parametrize("name", ["one parameter less", "one parameter more", "a matrix"])
def test_a_refused_end_may_be_sent_right_the_second_time(fed: Any, name: str) -> None:
    def disturb(drive: Drive, turn: int, client: int, message: bytes) -> None:
        if client == BAD_CLIENT and decode(message).kind == Type.ROUND_END:
            with pytest.raises(ProtocolError):
                drive.server.handle([(client, ENDS[name][0](message))])

    Drive(fed).play(disturb)


# ---- engine/server.py handle: one bad message among several loses the others' replies, and their steps are half-applied
@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("name", ["early end", "labels"])
def test_one_bad_message_among_several_does_not_cost_the_others_their_round(fed: Any, name: str, deterministic: bool) -> None:
    def bad(drive: Drive, message: bytes) -> bytes:
        return early_end(drive, message) if name == "early end" else repacket(message, 1, outside)

    calm, found = Drive(fed), Drive(fed)
    for drive in (calm, found):
        drive.server = Server(fed, drive.plan, 0, same_start(fed.layout.initial_row(1)), {}, deterministic)
    turn = [(client, found.waiting[client]) for client in range(3)]
    with pytest.raises(ProtocolError):
        found.server.handle([(client, bad(found, message) if client == BAD_CLIENT else message) for client, message in turn])
    again = found.server.handle(turn)
    assert again == calm.server.handle(turn)


# ---- engine/batches.py read_labels: a payload that is no multiple of the item raises ValueError
def test_labels_with_half_a_number_are_refused(fed: Any) -> None:
    drive = Drive(fed)
    bad = repacket(drive.waiting[0], 1, lambda packet: Packet(0, packet.dtype, packet.shape, packet.payload[:-1]))
    with pytest.raises(SplitftError):
        drive.server.handle([(0, bad)])


# ---- engine/server.py _arrive: lengths (u32) are believed before the packet is looked at: gigabytes on one small message
def test_lengths_that_claim_gigabytes_take_none() -> None:
    code = """
import resource, sys
sys.path[:0] = ["tests", "src"]
from tests.fault.drive import Drive, federation_of, reframe
from splitft.errors import ProtocolError
drive = Drive(federation_of())
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    drive.server.handle([(0, reframe(drive.waiting[0], lengths=(50_000_000, 1)))])
except ProtocolError:
    pass
sys.exit(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before > 200_000)
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False).returncode == 0


# ---- engine/client.py: a ROUND_START with fields out of range fails by assert, IndexError or ZeroDivisionError
@pytest.mark.parametrize(
    "fields",
    [{"cut": 0}, {"cut": 99}, {"rates": [1e-3]}, {"gradient_accumulation": 0}, {"local_steps": -1}, {"clip_norm": float("nan")}],
    ids=str,
)
def test_a_plan_out_of_range_is_refused(fed: Any, fields: dict[str, Any]) -> None:
    drive = Drive(fed)
    talk = Client(fed, 0, ClientState()).round(opening(drive, **fields))

    def play() -> None:
        message = next(talk)
        for _ in range(3):
            ((_, reply),) = drive.server.handle([(0, message)])
            message = talk.send(reply)

    with pytest.raises(SplitftError):
        play()


# ---- messages.py / ledger.py: packets beyond those a type has are carried and never counted
def test_more_packets_than_the_type_has_are_refused(fed: Any) -> None:
    message = Drive(fed).waiting[0]
    extra = packet_bytes(Packet(1, torch.float32, (1000,), bytes(4000)))
    with pytest.raises(ProtocolError):
        decode(reframe(message, packets=(*decode(message).packets, extra)))


# ---- peft_format.py read_adapter: AttributeError / KeyError / re.error for a damaged adapter_config.json
@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "null",
        '{"peft_type": "LORA"}',
        '{"peft_type": "LORA", "lora_alpha": "x"}',
        '{"peft_type": "LORA", "lora_alpha": 1, "alpha_pattern": {"(": 2}}',
    ],
)
def test_an_adapter_configuration_that_is_none_is_refused(tmp_path: Path, content: str) -> None:
    from splitft.lora import Layout
    from splitft.peft_format import CONFIG, read_adapter, write_adapter
    from splitft.types import Key

    layout = Layout.of({Key(0, "q"): (4, 4)}, 1, 1.0)
    write_adapter(tmp_path / "a", layout, torch.zeros(layout.parameters), "h", "base", False)
    (tmp_path / "a" / CONFIG).write_text(content)
    with pytest.raises(AdapterError, match=str(tmp_path)):
        read_adapter(tmp_path / "a", "h")
