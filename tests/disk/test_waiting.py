"""Tensors that wait come back as they were, wherever they waited, and leave nothing behind."""

import os
import signal
from pathlib import Path

import pytest
import torch

from moeq.disk.waiting import WaitingStates, locked_bytes
from tests.processes import call

TENSORS = {
    "float32": torch.randn(3, 5, generator=torch.Generator().manual_seed(0)),
    "bfloat16": torch.randn(2, 7, 4, generator=torch.Generator().manual_seed(1)).bfloat16(),
    "NaN": torch.tensor([float("nan"), -0.0, float("inf")], dtype=torch.float16),
    "ids": torch.arange(6, dtype=torch.uint8).view(2, 3),
    "bool": torch.tensor([True, False]),
    "transposed": torch.arange(12.0).view(3, 4).T,
    "scalar": torch.tensor(3, dtype=torch.int16),
    "empty": torch.empty(0, 4),
}


@pytest.mark.parametrize("bound", [0, 100, 1 << 20])
def test_what_waits_comes_back_bit_for_bit_with_its_dtype_and_shape(bound: int, tmp_path: Path) -> None:
    with WaitingStates(bound, tmp_path) as waiting:
        for name, tensor in TENSORS.items():
            waiting.put(name, tensor)
        for name, tensor in TENSORS.items():
            for found in (waiting.read(name), waiting.take(name, "cpu")):
                assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
                expected = tensor.contiguous().reshape(-1).view(torch.uint8)
                assert torch.equal(found.contiguous().reshape(-1).view(torch.uint8), expected)
            assert name not in waiting
            with pytest.raises(KeyError):
                waiting.take(name)


def test_memory_is_filled_to_its_bound_and_the_disk_takes_the_rest(tmp_path: Path) -> None:
    with WaitingStates(2 * 400, tmp_path) as waiting:
        for key in range(5):
            waiting.put(key, torch.full((100,), float(key)))
            assert waiting.bytes_in_memory <= 2 * 400
        assert (waiting.bytes_in_memory, waiting.bytes_on_disk) == (800, 1200)
        for step in range(3):  # as between blocks: what is taken comes back changed
            for key in range(5):
                waiting.put(key, waiting.take(key) + 1)
            assert (waiting.bytes_in_memory, waiting.bytes_on_disk) == (800, 1200), step
        assert [waiting.read(key)[7].item() for key in range(5)] == [3.0, 4.0, 5.0, 6.0, 7.0]


@pytest.mark.gpu
@pytest.mark.parametrize("bound", [0, 200, 1 << 20])
def test_what_waits_for_a_gpu_comes_back_to_it_bit_for_bit(bound: int, tmp_path: Path) -> None:
    with WaitingStates(bound, tmp_path) as waiting:
        for name, tensor in TENSORS.items():
            waiting.put(name, tensor.cuda())
        assert waiting.bytes_in_memory <= bound
        for name, tensor in TENSORS.items():
            for device in ("cuda", "cpu"):
                found = waiting.read(name, device)
                assert (found.device.type, found.dtype, found.shape) == (device, tensor.dtype, tensor.shape)
                expected = tensor.contiguous().reshape(-1).view(torch.uint8)
                assert torch.equal(found.cpu().contiguous().reshape(-1).view(torch.uint8), expected)


def test_page_locked_memory_counts_as_the_powers_of_two_in_which_it_is_given_out() -> None:
    sizes = (0, 1, 2, 3, 4, 1000, 1024, 1025)
    assert [locked_bytes(size) for size in sizes] == [0, 1, 2, 4, 4, 1024, 1024, 2048]


def test_places_in_the_file_are_used_again(tmp_path: Path) -> None:
    with WaitingStates(0, tmp_path) as waiting:
        for step in range(10):
            for key in range(3):
                waiting.put(key, torch.full((1000,), float(step * key)))
        assert waiting._file is not None
        assert os.fstat(waiting._file).st_size <= 4 * 4000
        assert [waiting.read(key)[0].item() for key in range(3)] == [0.0, 9.0, 18.0]


def test_a_part_of_a_larger_tensor_does_not_hold_the_rest_in_memory(tmp_path: Path) -> None:
    waiting = WaitingStates(1 << 20, tmp_path)
    waiting.put("row", torch.ones(100, 50)[3])
    assert waiting.read("row").untyped_storage().nbytes() == 50 * 4


def test_a_new_value_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    for bound in (0, 1 << 20):
        waiting = WaitingStates(bound, tmp_path)
        waiting.put(1, torch.ones(8))
        waiting.put(1, torch.zeros(3))
        assert waiting.read(1).tolist() == [0, 0, 0]
        assert waiting.bytes_in_memory + waiting.bytes_on_disk == 12
        waiting.clear()
        assert 1 not in waiting


def test_nothing_is_written_before_the_bound_is_reached(tmp_path: Path) -> None:
    waiting = WaitingStates(1 << 20, tmp_path / "none")
    waiting.put(1, torch.ones(8))
    assert not (tmp_path / "none").exists()


def killed(folder: Path) -> None:
    waiting = WaitingStates(0, folder)
    waiting.put(1, torch.ones(1 << 20))
    os.kill(os.getpid(), signal.SIGKILL)


def test_no_file_is_left_after_the_end_an_error_or_a_kill(tmp_path: Path) -> None:
    def fail() -> None:
        with WaitingStates(0, tmp_path) as waiting:
            waiting.put(1, torch.ones(8))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert call(killed, tmp_path).returncode == -signal.SIGKILL
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_line_and_what_waited_before_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting = WaitingStates(0, tmp_path)
    waiting.put(1, torch.ones(8))

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(ValueError, match=r"could not be written to .*No space left on device.*make room there"):
            waiting.put(2, torch.ones(8))
    waiting.put(2, torch.zeros(8))
    assert [waiting.take(key)[0].item() for key in (1, 2)] == [1.0, 0.0]
