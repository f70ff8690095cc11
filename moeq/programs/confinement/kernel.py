"""The C library's system calls that Python lacks, with errors as OSError."""

import ctypes
import os
import sys

# What only types need would take a tenth of the start-up time.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

_LIBC = ctypes.CDLL(None, use_errno=True)

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
_CAPABILITY_VERSION_3 = 0x20080522


def call(name: str, *arguments: object) -> int:
    """Call a function of the C library; integers are passed as unsigned long, as the kernel takes them.

    Raises:
        OSError: It failed, or this system has no such function.
    """
    if sys.platform != "linux":
        raise OSError(f"{name} is a call of Linux")
    try:
        function = getattr(_LIBC, name)
    except AttributeError as error:
        raise OSError(f"the C library has no {name}") from error
    result = int(function(*(ctypes.c_ulong(value) if isinstance(value, int) else value for value in arguments)))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")
    return result


def works(function: "Callable[..., object]", *arguments: object) -> bool:
    """Call a function; whether it did what it is for, or raised OSError."""
    try:
        function(*arguments)
    except OSError:
        return False
    return True


def drop_capabilities() -> None:
    """Give up every capability of this process; raises OSError where that is not possible."""
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    call("capset", header, (ctypes.c_uint32 * 6)())


def forbid_new_privileges() -> None:
    """No program started from here gains rights by its file (set-user-id); needed by Landlock and seccomp."""
    call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def hide_memory() -> None:
    """Nobody but root may trace this process or read its memory and environment."""
    call("prctl", PR_SET_DUMPABLE, 0, 0, 0, 0)


def die_with_parent() -> None:
    """This process is killed when the thread that started it ends, however it ends."""
    call("prctl", PR_SET_PDEATHSIG, 9, 0, 0, 0)
