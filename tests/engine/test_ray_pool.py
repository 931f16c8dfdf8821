"""A pool of actors: every job once, lost ones again, errors as they are. With toy actors that die when told to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray", reason="Ray is not installed: pip install 'splitft[ray]'")

import ray

from splitft.engine.ray_pool import ATTEMPTS, Finished, Job, Pool
from splitft.errors import DataError, ResourceError

pytestmark = pytest.mark.usefixtures("local_ray")


def toy() -> Any:
    """Made inside a function, so that it travels as a value: the actors' processes do not know these tests."""

    class Toy:
        def ready(self, fault: str) -> int:
            import os

            if fault == "die":
                os._exit(1)
            if fault == "raise":
                raise DataError("the data are bad.", "mend them.")
            return os.getpid()

        def double(self, number: int) -> tuple[int, int]:
            return number, 2 * number

        def fall(self, mark: str, times: int) -> tuple[str, int]:
            """Die as often as `times` says, counted in a file; then answer."""
            import os
            from pathlib import Path

            fallen = len(Path(mark).read_text()) if Path(mark).exists() else 0
            if fallen < times:
                Path(mark).write_text("x" * (fallen + 1))
                os._exit(1)
            return "stood", fallen

        def fail(self, kind: str) -> tuple[None, None]:
            raise DataError("the data are bad.", "mend them.") if kind == "ours" else KeyError("odd")

        def hang(self) -> tuple[None, None]:
            import threading

            threading.Event().wait()
            return None, None

    return ray.remote(Toy)


def make(size: int = 2, fault: str = "") -> Pool:
    kind = toy()
    return Pool(lambda: kind.options(num_cpus=0.5).remote(), lambda actor: actor.ready.remote(fault), size)


@pytest.fixture
def pool() -> Iterator[Pool]:
    made = make()
    yield made
    made.close()


def job(method: str, *values: Any) -> Job:
    return Job(method, lambda actor: getattr(actor, method).options(num_returns=2).remote(*values))


def facts(finished: list[Finished]) -> list[Any]:
    return [one.facts for one in finished]


def nothing() -> None:
    return


def test_jobs_come_back_in_their_order_and_each_is_done_once(pool: Pool) -> None:
    seen: list[Any] = []
    found = pool.run([job("double", number) for number in range(7)], nothing, lambda one: seen.append(one.facts))
    assert facts(found) == list(range(7))
    assert sorted(seen) == list(range(7))
    assert ray.get([one.array for one in found]) == [2 * number for number in range(7)]
    assert len(pool.idle) + len(pool.starting) == 2
    assert pool.run([], nothing) == []


def test_a_lost_job_is_done_by_another_actor(pool: Pool, tmp_path: Path) -> None:
    jobs = [job("double", 1), job("fall", str(tmp_path / "mark"), 2), job("double", 3)]
    assert facts(pool.run(jobs, nothing)) == [1, "stood", 3]
    notices = pool.take_notices()
    assert len(notices) == 2
    assert all("fall met the end of its Ray actor and was done again by another" in text for text in notices)
    assert pool.take_notices() == []
    assert facts(pool.run([job("double", 5)] * 3, nothing)) == [5, 5, 5]


def test_a_job_that_ends_every_actor_is_given_up(pool: Pool, tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match=f"met the end of its Ray actor {ATTEMPTS} times") as caught:
        pool.run([job("fall", str(tmp_path / "mark"), 99)], nothing)
    assert "engine.actors" in caught.value.remedy
    assert facts(pool.run([job("double", 5)], nothing)) == [5]


def test_an_error_of_ours_comes_as_it_is_and_leaves_the_pool_usable(pool: Pool) -> None:
    with pytest.raises(DataError, match="the data are bad") as caught:
        pool.run([job("fail", "ours")], nothing)
    assert caught.value.remedy == "mend them."
    with pytest.raises(KeyError):
        pool.run([job("fail", "other")], nothing)
    assert facts(pool.run([job("double", 5)], nothing)) == [5]


def test_a_wait_can_be_broken_off_and_what_hangs_is_ended(pool: Pool) -> None:
    pool.run([job("double", number) for number in range(4)], nothing)

    def stop() -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        pool.run([job("hang"), job("hang")], stop)
    assert facts(pool.run([job("double", number) for number in range(3)], nothing)) == [0, 1, 2]


@pytest.mark.parametrize(("fault", "error"), [("die", ResourceError), ("raise", DataError)])
def test_actors_that_never_stand_up_are_reported(fault: str, error: type[Exception]) -> None:
    made = make(1, fault)
    with pytest.raises(error):
        made.run([job("double", 1)], nothing)
    made.close()


def test_a_job_goes_to_the_actor_that_has_its_data(pool: Pool) -> None:
    pool.run([job("double", number) for number in range(4)], nothing)
    while len(pool.idle) < 2:  # the second may have begun later
        pool.run([job("double", 0), job("double", 1)], nothing)
    wanted = pool.idle[1]
    submit: Callable[[Any], Any] = partial(lambda number, actor: actor.double.options(num_returns=2).remote(number), 3)
    (found,) = pool.run([Job("near", submit, wanted)], nothing)
    assert found.actor == wanted
