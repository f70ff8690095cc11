"""One run in a folder at a time: a lock that names its holder, and vanishes with the process, however that ends."""

import errno
import fcntl
import json
import os
import socket
from contextlib import suppress
from pathlib import Path
from types import TracebackType

LOCK = "run.lock"
# What file systems without locks answer.
_UNKNOWN = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}


class FolderLock:
    """The right to write into a run folder, until ``release`` or the end of the process.

    The kernel holds it, not the file: what a killed process left of the file locks nothing.

    Args:
        folder: Made where there is none.

    Attributes:
        unknown: Why nothing is locked, where the file system has no locks; else empty.

    Raises:
        ValueError: Another process holds it, or the folder may not be written.
    """

    def __init__(self, folder: Path) -> None:
        self.path, self.unknown = folder / LOCK, ""
        self._made = [path for path in (folder, *folder.parents) if not path.exists()]
        self._descriptor = -1
        try:
            folder.mkdir(parents=True, exist_ok=True)
            while self._descriptor < 0:
                self._descriptor = self._take()
            os.ftruncate(self._descriptor, 0)
            os.write(self._descriptor, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode())
        except OSError as error:
            self.release()
            raise ValueError(
                f"{folder} cannot be written ({error.strerror}); set --trainer.default_root_dir to a folder on a disk "
                "with room that may be written"
            ) from error

    def _take(self) -> int:
        """A descriptor of the locked file; -1 where its holder has just let go of it."""
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _holder(self.path)
            os.close(descriptor)
            raise ValueError(
                f"{self.path.parent} is in use by another run{holder}; wait for its end, or set "
                "--trainer.default_root_dir to another folder"
            ) from None
        except OSError as error:
            if error.errno not in _UNKNOWN:
                os.close(descriptor)
                raise
            self.unknown = error.strerror or "no locks"
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), self.path.stat()):
                return descriptor
        os.close(descriptor)
        return -1

    def release(self) -> None:
        """Let go, and leave no trace: neither the file, nor a folder that was made for it and is empty."""
        if self._descriptor >= 0:
            self.path.unlink(missing_ok=True)
            os.close(self._descriptor)
            self._descriptor = -1
        with suppress(OSError):
            while self._made:
                self._made.pop(0).rmdir()

    def __enter__(self) -> "FolderLock":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def _holder(path: Path) -> str:
    """Such as " (process 17 on node3)"; empty where it has not written that yet."""
    with suppress(OSError, ValueError, KeyError):
        held = json.loads(path.read_text(encoding="utf8"))
        return f" (process {held['pid']} on {held['host']})"
    return ""
