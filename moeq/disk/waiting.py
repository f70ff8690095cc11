"""Tensors that wait to be used again, in memory up to a bound and beyond it on the disk.

The file has no name: when the process ends, killed or not, its space is free again, so no run leaves any behind and
two processes can wait in one folder.  It is written and read, not mapped: a full disk is an error that says so, not a
signal, and what is on the disk takes no memory but the system's cache.  A tensor takes the place of one of its size
that was taken, so the file is as large as the most that waited at once.

What comes from a GPU waits in page-locked memory, so that it comes and goes without the host waiting for the copy;
such memory is given out in powers of two, and counts as that.
"""

import os
import tempfile
import weakref
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class _Held:
    """A tensor in memory: what it takes there, and what tells that its copy has arrived; None where it has."""

    tensor: Tensor
    num_bytes: int
    arrived: torch.cuda.Event | None = None


@dataclass(frozen=True)
class _Place:
    """Where a tensor is in the file."""

    start: int
    num_bytes: int
    dtype: torch.dtype
    shape: torch.Size


class WaitingStates:
    """Tensors by key, which come back with the dtype, shape and bits that they had.

    A context manager: at its end, everything that waits is forgotten.

    Args:
        bound_bytes: Of what waits in memory; 0 is all on the disk.
        folder: Where the file is, such as the run folder; it is made where there is none.

    Attributes:
        bytes_in_memory: Of the tensors that wait in memory.
        bytes_on_disk: Of the tensors that wait on the disk.
    """

    def __init__(self, bound_bytes: int, folder: Path) -> None:
        self.bound_bytes, self.folder = bound_bytes, folder
        self._in_memory: dict[Hashable, _Held] = {}
        self._on_disk: dict[Hashable, _Place] = {}
        self.bytes_in_memory = self.bytes_on_disk = 0
        self._file: int | None = None  # its descriptor
        self._close: weakref.finalize[Any, Any] | None = None
        self._end = 0
        self._vacant: dict[int, list[int]] = {}  # places that were left, by their size

    def put(self, key: Hashable, tensor: Tensor) -> None:
        """Keep a tensor, of any device, in the place of what waits under the key.

        One that is on the CPU already is not copied where it stays in memory: it must not be changed.

        Raises:
            ValueError: The disk is full, or does not take the file for another reason.
        """
        self.drop(key)
        num_bytes = locked_bytes(tensor.nbytes) if tensor.is_cuda else tensor.nbytes
        if self.bytes_in_memory + num_bytes <= self.bound_bytes:
            self._in_memory[key] = _held(tensor.detach(), num_bytes)
            self.bytes_in_memory += num_bytes
        else:
            self._on_disk[key] = self._write(tensor.detach().cpu().contiguous())
            self.bytes_on_disk += tensor.nbytes

    def read(self, key: Hashable, device: torch.device | str = "cpu") -> Tensor:
        """What waits under a key, on a device; it goes on waiting, so it must not be changed.

        Raises:
            KeyError: Nothing waits under it.
        """
        if key not in self._in_memory:
            return self._read(self._on_disk[key]).to(device)
        held = self._in_memory[key]
        if held.arrived is None:
            return held.tensor.to(device)
        if torch.device(device).type != "cuda":
            held.arrived.synchronize()
            return held.tensor.to(device)
        torch.cuda.current_stream(device).wait_event(held.arrived)
        return held.tensor.to(device, non_blocking=True)

    def take(self, key: Hashable, device: torch.device | str = "cpu") -> Tensor:
        """What waits under a key, on a device; it waits no longer.

        Raises:
            KeyError: Nothing waits under it.
        """
        value = self.read(key, device)
        self.drop(key)
        return value

    def drop(self, key: Hashable) -> None:
        """Forget what waits under a key, if anything does."""
        if (held := self._in_memory.pop(key, None)) is not None:
            self.bytes_in_memory -= held.num_bytes
        if (place := self._on_disk.pop(key, None)) is not None:
            self.bytes_on_disk -= place.num_bytes
            self._vacant.setdefault(place.num_bytes, []).append(place.start)

    def clear(self) -> None:
        """Forget everything, and give back its space."""
        self._in_memory.clear()
        self._on_disk.clear()
        self._vacant.clear()
        self._end = self.bytes_in_memory = self.bytes_on_disk = 0
        self._file = None
        if self._close is not None:
            self._close()

    def __contains__(self, key: Hashable) -> bool:
        return key in self._in_memory or key in self._on_disk

    def __enter__(self) -> "WaitingStates":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.clear()

    def _open(self) -> int:
        self.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=self.folder) as file:
            descriptor = os.dup(file.fileno())
        self._close = weakref.finalize(self, os.close, descriptor)
        return descriptor

    def _write(self, value: Tensor) -> _Place:
        try:
            if self._file is None:
                self._file = self._open()
            vacant = self._vacant.get(value.nbytes)
            place = _Place(vacant[-1] if vacant else self._end, value.nbytes, value.dtype, value.shape)
            view, done = memoryview(_bytes(value).numpy()), 0  # type: ignore[arg-type]
            while done < place.num_bytes:
                done += os.pwrite(self._file, view[done:], place.start + done)
        except OSError as error:
            raise ValueError(
                f"hidden states that wait on the disk could not be written to {self.folder} ({error}); make room there "
                "or choose a run folder on a larger disk, and start again"
            ) from error
        if vacant:
            vacant.pop()
        else:
            self._end += place.num_bytes
        return place

    def _read(self, place: _Place) -> Tensor:
        assert self._file is not None
        value = torch.empty(place.shape, dtype=place.dtype)
        view, done = memoryview(_bytes(value).numpy()), 0  # type: ignore[arg-type]
        while done < place.num_bytes:
            count = os.preadv(self._file, [view[done:]], place.start + done)
            if count == 0:
                raise ValueError(f"hidden states that wait on the disk of {self.folder} are gone; start again")
            done += count
        return value


def locked_bytes(num_bytes: int) -> int:
    """What a tensor takes in page-locked memory: torch gives it out in powers of two."""
    return 1 << max(num_bytes - 1, 0).bit_length() if num_bytes else 0


def _held(tensor: Tensor, num_bytes: int) -> _Held:
    """A tensor as it waits in memory."""
    if not tensor.is_cuda:
        value = tensor.cpu().contiguous()
        is_part = value.untyped_storage().nbytes() > value.nbytes
        return _Held(value.clone() if is_part else value, num_bytes)
    value = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    value.copy_(tensor, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record(torch.cuda.current_stream(tensor.device))
    return _Held(value, num_bytes, arrived)


def _bytes(value: Tensor) -> Tensor:
    """The bytes of a contiguous tensor, without a copy."""
    return value.reshape(-1).view(torch.uint8)
