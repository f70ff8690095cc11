"""Namespaces of Linux: a process with its own network, process numbers, shared memory, host name and file system.

Root takes them directly; anybody else inside of a user namespace, where the system lets users make one.
See ``man 7 namespaces``, ``man 7 user_namespaces``, ``man 2 pivot_root``.
"""

import os
import sys

from moeq.programs.confinement.kernel import call, works

_NEW_USER = 0x10000000
_NEW = {
    "mount namespace": 0x00020000,
    "host name namespace": 0x04000000,
    "shared memory namespace": 0x08000000,
    "process namespace": 0x20000000,
    "network namespace": 0x40000000,
}
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_REMOUNT, _MS_BIND, _MS_REC = 1, 2, 4, 8, 32, 4096, 16384
_MS_PRIVATE, _MNT_DETACH = 1 << 18, 2
# os.statvfs's flag and mount's: a bind mount made read-only must keep those of what it shows.
_KEPT_FLAGS = ((2, 2), (4, 4), (8, 8), (1024, 1024), (2048, 2048), (4096, 1 << 21))
# A program's own file system: its directory, and what the interpreter may load later.
SYSTEM_PATHS = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache", "/usr/share/zoneinfo")
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")


def enter_namespaces(wanted: frozenset[str]) -> list[str]:
    """Leave the system's namespaces; returns which of the wanted ones this process (or its next child) is in now."""
    given = []
    names = [name for name in _NEW if name in wanted]
    if not names or not works(call, "unshare", _NEW[names[0]]):
        uid, gid = os.getuid(), os.getgid()
        if "user namespace" in wanted and works(call, "unshare", _NEW_USER):
            given.append("user namespace")
            works(_write, "/proc/self/uid_map", f"{uid} {uid} 1")
            works(_write, "/proc/self/setgroups", "deny")
            works(_write, "/proc/self/gid_map", f"{gid} {gid} 1")
    else:
        given.append(names.pop(0))
    return given + [name for name in names if works(call, "unshare", _NEW[name])]


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def readable_paths() -> list[str]:
    """What the interpreter may still have to read after it has started: its library and the system's."""
    library = [os.path.dirname(os.path.realpath(os.__file__)), *sys.path]
    # Shared libraries of interpreters that bring their own lie beside the standard library.
    beside = os.path.dirname(library[0])
    paths = [beside, *library, *SYSTEM_PATHS]
    return list(dict.fromkeys(path for path in paths if os.path.exists(path)))


def make_private_root(folder: str, num_bytes: int) -> bool:
    """Make an empty file system in memory the root, with nothing of the system in it but what Python loads, read-only.

    Its ``/tmp`` is the only place for files, of at most ``num_bytes`` in all.  There is no ``/proc``, so nothing of any
    other process can be read.

    Args:
        folder: Absolute path of an empty directory; hidden from this process on.
        num_bytes: Size of the file system in bytes.

    Returns:
        Whether that worked; if not, nothing has changed.
    """
    try:
        call("mount", None, b"/", None, _MS_REC | _MS_PRIVATE, None)
        options = f"size={num_bytes},nr_inodes=10000,mode=755".encode()
        call("mount", b"tmpfs", folder.encode(), b"tmpfs", _MS_NOSUID | _MS_NODEV, options)
    except OSError:
        return False
    try:
        for path in (*readable_paths(), *DEVICES):
            _bind(path, folder + path)
        os.mkdir(folder + "/tmp", mode=0o700)
        os.chdir(folder)
        call("pivot_root", b".", b".")
        call("umount2", b".", _MNT_DETACH)
    except OSError:
        os.chdir("/")
        call("umount2", folder.encode(), _MNT_DETACH)
        return False
    os.chdir("/tmp")
    return True


def _bind(source: str, target: str) -> None:
    """Show a file or folder at another place, read-only; one that is shown already or is not there is left out."""
    if not os.path.exists(source) or os.path.exists(target):
        return
    if os.path.isdir(source):
        os.makedirs(target, mode=0o755)
    else:
        os.makedirs(os.path.dirname(target), mode=0o755, exist_ok=True)
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))
    call("mount", source.encode(), target.encode(), None, _MS_BIND | _MS_REC, None)
    flags = os.statvfs(target).f_flag
    kept = sum(mount_flag for stat_flag, mount_flag in _KEPT_FLAGS if flags & stat_flag)
    device = source.startswith("/dev/")
    read_only = 0 if device else _MS_RDONLY
    call("mount", None, target.encode(), None, _MS_BIND | _MS_REMOUNT | _MS_NOSUID | read_only | kept, None)
