"""What was finished comes back exactly, and nothing else does."""

import json
import os
import random
import signal
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from moeq.evaluation import records as module
from moeq.evaluation.records import Records, reuse
from moeq.evaluation.result_digest import result_digest
from moeq.tasks.documents import Document, Result
from tests.processes import call


def settings(**changed: Any) -> str:
    values = {"num_shots": 0, **changed}
    return result_digest(model="sha256:aa", dtype="float32", reference=None, settings=values, versions={"torch": "2"})


def result(index: int, **changed: Any) -> Result:
    values = {"acc": (float(index % 2), 1.0), "kl": (0.1 * index, 7.0)}
    given = {"index": index, "key": f"key{index}", "groups": ("all", "stem"), "values": values, "details": {}}
    return Result(**{**given, **changed})


def by_key(*indices: int) -> dict[str, Result]:
    return {f"key{index}": result(index) for index in indices}


def records(folder: Path, rank: int = 0, task: str = "piqa", **changed: Any) -> Records:
    return Records(folder, task, settings(**changed), rank)


def random_text(draw: random.Random) -> str:
    return "".join(chr(draw.choice([draw.randrange(0x20), draw.randrange(0x110000)])) for _ in range(draw.randrange(9)))


def random_float(draw: random.Random) -> float:
    # Every exponent, subnormal numbers too.
    return draw.choice([-1, 1]) * draw.random() * 2.0 ** draw.randrange(-1080, 1000)


def random_result(draw: random.Random, index: int) -> Result:
    values = {random_text(draw): (random_float(draw), random_float(draw)) for _ in range(draw.randrange(5))}
    details = {"text": random_text(draw), "likelihoods": [random_float(draw), None, True, draw.randrange(2**60)]}
    groups = tuple(random_text(draw) for _ in range(draw.randrange(3)))
    return Result(index, f"{index} {random_text(draw)}", groups, values, details)


@pytest.mark.parametrize("seed", range(5))
def test_any_results_come_back_exactly(seed: int, tmp_path: Path) -> None:
    draw = random.Random(seed)
    written = [random_result(draw, index) for index in range(40)]
    log = records(tmp_path)
    for start in range(0, 40, 7):
        log.add(written[start : start + 7])
    read = records(tmp_path).finished()
    assert list(read.values()) == written
    assert [repr(r.values) for r in read.values()] == [repr(r.values) for r in written]  # -0.0 too


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused_and_leave_the_file_whole(value: float, tmp_path: Path) -> None:
    log = records(tmp_path)
    log.add([result(0)])
    with pytest.raises(ValueError, match="task piqa, document 1, cannot be kept"):
        log.add([result(2), result(1, values={"acc": (value, 1.0)})])
    log.add([result(3)])
    assert records(tmp_path).finished() == by_key(0, 3)


def test_nothing_finished_is_no_file(tmp_path: Path) -> None:
    log = records(tmp_path)
    log.add([])
    assert log.finished() == {}
    assert not list(tmp_path.iterdir())


LINE = len(json.dumps(asdict(result(3)))) + 1


def be_killed(folder: Path, num_bytes: int) -> None:
    """Write three documents and of the next two only some bytes."""
    log = records(folder)
    log.add([result(0), result(1)])
    log.add([result(2)])
    write = module._append

    def killed(path: Path, text: str) -> None:
        write(path, text[:num_bytes])
        os.kill(os.getpid(), signal.SIGKILL)

    module._append = killed
    log.add([result(3), result(4)])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_bytes", "num_finished", "is_torn"),
    [(0, 3, False), (LINE - 1, 3, True), (LINE, 4, False), (LINE + 1, 4, True)],
)
def test_a_killed_process_leaves_exactly_its_finished_documents(
    num_bytes: int, num_finished: int, is_torn: bool, tmp_path: Path
) -> None:
    done = call(be_killed, tmp_path, num_bytes)
    assert done.returncode == -signal.SIGKILL, done.stderr
    log = records(tmp_path)
    assert log.finished() == by_key(*range(num_finished))
    assert len(log.notes) == is_torn
    log.add([result(index) for index in range(num_finished, 6)])
    again = records(tmp_path)
    assert again.finished() == by_key(*range(6))
    assert not again.notes


@pytest.mark.parametrize("tail", [b'{"index": 7', b"\0" * 600, b"\0" * 30 + b"\n", b'{"index": 7}\n{"index"', b"[]\n"])
def test_a_torn_end_is_dropped_counted_and_written_over(tail: bytes, tmp_path: Path) -> None:
    records(tmp_path).add([result(0), result(1)])
    with (tmp_path / "documents/piqa.rank0.jsonl").open("ab") as file:
        file.write(tail)
    log = records(tmp_path)
    assert log.finished() == by_key(0, 1)
    number = len([part for part in tail.split(b"\n") if part])
    assert f"{number} unreadable lines at its end" in log.notes[0]
    log.add([result(2)])
    assert records(tmp_path).finished() == by_key(0, 1, 2)
    assert records(tmp_path).notes == []


@pytest.mark.parametrize("keep", [0, 1, 20])
def test_a_torn_header_is_an_empty_file(keep: int, tmp_path: Path) -> None:
    records(tmp_path).add([result(0)])
    path = tmp_path / "documents/piqa.rank0.jsonl"
    path.write_bytes(path.read_bytes()[:keep])
    assert records(tmp_path).finished() == {}
    records(tmp_path).add([result(1)])
    assert records(tmp_path).finished() == by_key(1)


def test_the_files_of_all_ranks_count_whatever_the_number_of_ranks(tmp_path: Path) -> None:
    for rank in range(3):
        records(tmp_path, rank).add([result(rank), result(rank + 3)])
    for rank in (0, 1):
        assert records(tmp_path, rank).finished() == by_key(*range(6))
    one = records(tmp_path)
    one.add([result(6)])
    records(tmp_path, 11).add([result(7)])
    assert one.finished() == by_key(*range(8))
    names = sorted(path.name for path in (tmp_path / "documents").iterdir())
    assert names == [f"piqa.rank{rank}.jsonl" for rank in (0, 1, 11, 2)]


def test_other_tasks_are_other_files_whatever_their_names(tmp_path: Path) -> None:
    for number, task in enumerate(("a", "a.rank0", "my.tasks:NEW", "x/../y", "a*", "[a]")):
        records(tmp_path, task=task).add([result(number)])
        assert records(tmp_path, task=task).finished() == by_key(number)
    assert {path.parent for path in tmp_path.rglob("*.jsonl")} == {tmp_path / "documents"}


def test_results_of_another_evaluation_are_set_aside_named_and_found_again(tmp_path: Path) -> None:
    for rank in (0, 1):
        records(tmp_path, rank).add([result(rank)])
    other = records(tmp_path, num_shots=5)
    assert other.finished() == {}
    assert len(other.notes) == 2
    assert "1 documents of another evaluation are not used (settings.num_shots: 0 -> 5)" in other.notes[0]
    other.add([result(0, details={"shots": 5})])
    assert "is kept as piqa.rank0." in other.notes[-1]
    assert records(tmp_path, num_shots=5).finished() == {"key0": result(0, details={"shots": 5})}
    back = records(tmp_path)
    assert back.finished() == by_key(0, 1)
    back.add([result(2)])
    assert records(tmp_path).finished() == by_key(0, 1, 2)
    records(tmp_path, num_shots=5).add([result(4)])
    assert records(tmp_path, num_shots=5).finished().keys() == {"key0", "key4"}
    assert records(tmp_path).finished() == by_key(0, 1, 2)


def test_what_is_started_over_is_passed_over_at_once_and_deleted_when_the_run_begins(tmp_path: Path) -> None:
    records(tmp_path).add([result(1)])
    records(tmp_path, num_shots=5).add([result(2)])
    again = Records(tmp_path, "piqa", settings(), 0, restart=True)
    assert again.finished() == {}
    assert records(tmp_path).finished() == by_key(1)
    again.begin()
    assert records(tmp_path).finished() == {}
    assert records(tmp_path, num_shots=5).finished() == by_key(2)
    log = records(tmp_path)
    log.add([result(3)])
    log.begin()  # of a run that goes on
    assert records(tmp_path).finished() == by_key(3)


def test_clearing_forgets_all_ranks_of_this_evaluation_alone(tmp_path: Path) -> None:
    records(tmp_path, num_shots=5).add([result(9)])
    for rank in (0, 1):
        records(tmp_path, rank).add([result(rank)])
    records(tmp_path, task="boolq").add([result(3)])
    log = records(tmp_path)
    log.clear()
    assert log.finished() == {}
    assert records(tmp_path, num_shots=5).finished() == by_key(9)
    assert records(tmp_path, task="boolq").finished() == by_key(3)
    log.add([result(4)])
    log.clear()
    log.add([result(5)])
    assert records(tmp_path).finished() == by_key(5)


def test_a_batch_is_on_disk_before_the_next_one_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    sync: Callable[[int], None] = os.fsync

    def fsync(descriptor: int) -> None:
        sync(descriptor)
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)

    monkeypatch.setattr(os, "fsync", fsync)
    log = records(tmp_path)
    log.add([result(0)])
    assert synced == ["piqa.rank0.jsonl", "documents", "piqa.rank0.jsonl"]  # header, name, batch
    log.add([result(1), result(2)])
    assert synced[3:] == ["piqa.rank0.jsonl"]


def test_equal_rows_share_a_result_under_their_own_index_and_groups() -> None:
    documents = [
        Document(index, key, {}, groups, ()) for index, key, groups in
        [(0, "key5", ("stem",)), (1, "key6", ()), (2, "key5", ("law",))]
    ]  # fmt: skip
    done, left = reuse(by_key(5), documents)
    assert done == [replace(result(5), index=i, groups=groups) for i, groups in ((0, ("stem",)), (2, ("law",)))]
    assert left == [documents[1]]
