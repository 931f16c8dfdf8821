"""The targets of a step weigh its client's update: what a client names must be what it sends, or it could take over the average."""

from __future__ import annotations

import pytest

from splitft.errors import ProtocolError
from splitft.messages import Type, decode

from .drive import Drive, federation_of, refields


@pytest.mark.parametrize("u_shape", [False, True])
@pytest.mark.parametrize("factor", [2, 4_000_000_000 // 20])
def test_more_targets_than_the_batch_has_are_refused(u_shape: bool, factor: int) -> None:
    drive = Drive(federation_of(), u_shape)
    honest = decode(drive.waiting[1]).step()
    drive.waiting[1] = refields(drive.waiting[1], normaliser=min(honest.normaliser * factor, 2**32 - 1))
    with pytest.raises(ProtocolError, match="targets"):
        drive.deliver(1)
    assert drive.server.sessions[1].targets == 0


def test_micro_batches_must_add_up_to_what_the_step_named() -> None:
    fed = federation_of(gradient_accumulation=2)
    drive = Drive(fed)
    first = decode(drive.waiting[0]).step()
    assert first.normaliser > first.targets
    drive.waiting[0] = refields(drive.waiting[0], normaliser=first.normaliser + 5)
    drive.deliver(0)  # nobody can tell yet
    drive.waiting[0] = refields(drive.waiting[0], normaliser=first.normaliser + 5)
    with pytest.raises(ProtocolError, match="so far in the step"):
        drive.deliver(0)


def test_a_normaliser_that_changes_within_a_step_is_refused() -> None:
    drive = Drive(federation_of(gradient_accumulation=2))
    drive.deliver(0)
    drive.waiting[0] = refields(drive.waiting[0], normaliser=decode(drive.waiting[0]).step().normaliser + 1)
    with pytest.raises(ProtocolError, match="targets"):
        drive.deliver(0)


def test_honest_steps_pass() -> None:
    played = Drive(federation_of(gradient_accumulation=3)).play()
    assert all(session.finished and session.targets for session in played.server.sessions.values())


@pytest.mark.parametrize("field", ["round", "step", "micro", "client"])
def test_a_client_takes_no_answer_to_another_batch(field: str) -> None:
    drive = Drive(federation_of())
    ((_, reply),) = drive.server.handle([(0, drive.waiting.pop(0))])
    assert decode(reply).kind == Type.STEP_DOWN
    with pytest.raises(ProtocolError, match="asked was"):
        drive.talks[0].send(refields(reply, **{field: getattr(decode(reply).step(), field) + 1}))
