"""Landlock: a process that gives up, for ever, access to all files but some (``man 7 landlock``, Linux 5.13).

A ruleset handles kinds of access; each kind is denied everywhere but beneath the paths of its rules.
"""

import ctypes
import os

from moeq.programs.confinement.kernel import call

# The same numbers on every architecture.
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_GET_VERSION, _PATH_BENEATH = 1, 1
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR, _TRUNCATE = 1 << 0, 1 << 1, 1 << 2, 1 << 3, 1 << 14
# Kinds of access to files that each version of the interface knows, and of the network (bind, connect), and scopes
# (no abstract sockets and no signals to processes outside).
_ACCESS = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 4: (1 << 15) - 1, 5: (1 << 16) - 1}
_TCP, _SCOPES = 0b11, 0b11


class _Ruleset(ctypes.Structure):
    _fields_ = (("access", ctypes.c_uint64), ("network", ctypes.c_uint64), ("scopes", ctypes.c_uint64))


class _Rule(ctypes.Structure):
    _pack_ = 1
    _fields_ = (("access", ctypes.c_uint64), ("folder", ctypes.c_int32))


def restrict_files(read: list[str], write: list[str]) -> bool:
    """Allow this process and its children to read beneath some paths, to do everything beneath others, no more.

    Needs ``forbid_new_privileges`` first.  Directories outside of these paths cannot be listed, processes outside
    cannot be traced, and where the kernel knows how, TCP and signals to processes outside are denied, too.

    Returns:
        Whether this kernel has Landlock, and it is on.
    """
    try:
        version = call("syscall", _CREATE_RULESET, None, 0, _GET_VERSION)
        access = _ACCESS[min(version, max(_ACCESS))]
        ruleset = _Ruleset(access, _TCP, _SCOPES)
        num_fields = 1 + (version >= 4) + (version >= 6)
        handle = call("syscall", _CREATE_RULESET, ctypes.byref(ruleset), 8 * num_fields, 0)
        try:
            for path in read:
                _allow(handle, path, (_READ_FILE | _READ_DIR) & access)
            for path in write:
                _allow(handle, path, access)
            call("syscall", _RESTRICT_SELF, handle, 0)
        finally:
            os.close(handle)
    except OSError:
        return False
    return True


def _allow(handle: int, path: str, access: int) -> None:
    """Add a rule; of a path that is not there nothing is allowed."""
    try:
        folder = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        if not os.path.isdir(path):
            access &= _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE
        call("syscall", _ADD_RULE, handle, _PATH_BENEATH, ctypes.byref(_Rule(access, folder)), 0)
    finally:
        os.close(folder)
