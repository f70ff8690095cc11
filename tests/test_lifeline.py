"""Who ends and who speaks when a rank fails: processes at the ends of real connections."""

import multiprocessing
import os
import signal
from collections.abc import Callable
from typing import Any

import pytest

from moeq.lifeline import Failure, Lifeline, Place, open_lifeline

# Two machines with two ranks each.
PLACES = [Place(0, 0, 0), Place(1, 0, 1), Place(2, 1, 0), Place(3, 1, 1)]
FORK = multiprocessing.get_context("forkserver")


@pytest.mark.parametrize("failed", PLACES, ids=lambda place: f"rank {place.rank}")
def test_a_failure_is_told_once_on_each_machine_and_an_error_not_where_it_is_raised(failed: Place) -> None:
    others = [place for place in PLACES if place != failed]
    for error, nodes in (("ValueError: no", {0, 1} - {failed.node}), (None, {0, 1})):
        speakers = [place for place in others if Failure(failed, error).message(place)]
        assert sorted(place.node for place in speakers) == sorted(nodes)


Work = Callable[[Lifeline], None]


def finish(line: Lifeline) -> None:
    line.close()


def wait(line: Lifeline) -> None:
    signal.pause()


def fail(line: Lifeline) -> None:
    line.fail("ValueError: no")
    os._exit(3)


def vanish(line: Lifeline) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def exit_codes(works: list[Work]) -> list[int | None]:
    """Exit codes of ranks that are connected and then do this."""
    told = FORK.SimpleQueue()
    processes = [FORK.Process(target=_rank, args=(rank, works, told)) for rank in range(len(works))]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return codes


def _rank(rank: int, works: list[Work], told: Any) -> None:
    def broadcast(value: Any) -> Any:
        if rank == 0:
            for _ in works[1:]:
                told.put(value)
            return value
        return told.get()

    works[rank](open_lifeline(Place(rank, 0, rank), len(works), "127.0.0.1", broadcast))


def test_ranks_that_finish_end_in_good_order() -> None:
    assert exit_codes([finish, finish, finish]) == [0, 0, 0]


@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize(("work", "code"), [(fail, 3), (vanish, -signal.SIGKILL)])
def test_the_end_of_one_rank_is_the_end_of_all(work: Work, code: int, failing: int) -> None:
    works: list[Work] = [wait, wait, wait]
    works[failing] = work
    assert exit_codes(works) == [code if rank == failing else 1 for rank in range(3)]


def test_of_two_ranks_that_fail_one_is_the_first() -> None:
    assert sorted(exit_codes([wait, fail, fail])) == [1, 1, 3]


def test_a_rank_that_has_finished_ends_nobody() -> None:
    assert exit_codes([finish, finish, fail])[:2] == [0, 0]
