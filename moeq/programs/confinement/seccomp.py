"""A seccomp filter: system calls that a program of pure computation never needs fail with EPERM.

It starts no process, opens no socket, signals, traces and limits nobody but itself, and changes no mount, namespace
or key.  The filter is a program of the classic Berkeley packet filter over ``struct seccomp_data`` (``man 2 seccomp``).
"""

import ctypes
import errno
import os

from moeq.programs.confinement.kernel import PR_SET_SECCOMP, call

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL_PROCESS, _FAIL = 0x7FFF0000, 0x80000000, 0x00050000
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16
_CLONE_THREAD = 0x10000
_FILTER_MODE = 2
# AUDIT_ARCH_* and the numbers of system calls: x86_64 has a table of its own, aarch64 the generic one.
_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_X32_BIT = 0x40000000
_DENIED = {
    "socket": (41, 198),
    "execve": (59, 221),
    "execveat": (322, 281),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "pidfd_open": (434, 434),
    "pidfd_send_signal": (424, 424),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "tkill": (200, 130),
    "setpriority": (141, 140),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "fsopen": (430, 430),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "mount_setattr": (442, 442),
    "unshare": (272, 97),
    "setns": (308, 268),
    "open_by_handle_at": (304, 265),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "memfd_create": (319, 279),
    "shmget": (29, 194),
    "msgget": (68, 186),
    "semget": (64, 190),
    "mq_open": (240, 180),
}
_FORKS = {"x86_64": (57, 58), "aarch64": ()}  # fork and vfork
_CLONE, _CLONE3 = (56, 220), 435
# Allowed only on this very process: its number is the first argument.  prlimit64 also takes 0 for it.
_SIGNALS = {"kill": (62, 129), "tgkill": (234, 131)}
_PRLIMIT64 = (302, 261)


class _Instruction(ctypes.Structure):
    _fields_ = (
        ("code", ctypes.c_uint16),
        ("if_true", ctypes.c_uint8),
        ("if_false", ctypes.c_uint8),
        ("value", ctypes.c_uint32),
    )


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_uint16), ("instructions", ctypes.POINTER(_Instruction)))


def _fail_with(code: int) -> tuple[int, int, int, int]:
    return (_RETURN, 0, 0, _FAIL | code)


def _when_number(number: int, then: list[tuple[int, int, int, int]]) -> list[tuple[int, int, int, int]]:
    """Instructions that run for one system call; the accumulator holds its number before and, if unequal, after."""
    return [(_EQUAL, 0, len(then), number), *then]


def filter_instructions(machine: str, pid: int) -> list[tuple[int, int, int, int]]:
    """(code, steps if true, steps if false, value) of the filter for process ``pid`` on x86_64 or aarch64.

    Raises:
        ValueError: The numbers of this machine's system calls are not written down here.
    """
    if machine not in _ARCHITECTURES:
        raise ValueError(f"machine {machine!r} has no seccomp filter; those with one: {', '.join(_ARCHITECTURES)}")
    column = list(_ARCHITECTURES).index(machine)
    deny, allow = _fail_with(errno.EPERM), (_RETURN, 0, 0, _ALLOW)
    argument = (_LOAD, 0, 0, _FIRST_ARGUMENT)
    instructions = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_EQUAL, 1, 0, _ARCHITECTURES[machine]),
        (_RETURN, 0, 0, _KILL_PROCESS),
        (_LOAD, 0, 0, _NUMBER),
    ]
    if machine == "x86_64":
        instructions += [(_AT_LEAST, 0, 1, _X32_BIT), deny]
    for number in [numbers[column] for numbers in _DENIED.values()] + list(_FORKS[machine]):
        instructions += _when_number(number, [deny])
    # The C library falls back to clone, whose flags can be seen, where clone3 does not exist.
    instructions += _when_number(_CLONE3, [_fail_with(errno.ENOSYS)])
    instructions += _when_number(_CLONE[column], [argument, (_ANY_BIT, 0, 1, _CLONE_THREAD), allow, deny])
    for numbers in _SIGNALS.values():
        instructions += _when_number(numbers[column], [argument, (_EQUAL, 0, 1, pid), allow, deny])
    own = [argument, (_EQUAL, 1, 0, 0), (_EQUAL, 0, 1, pid), allow, deny]
    instructions += _when_number(_PRLIMIT64[column], own)
    return [*instructions, allow]


def forbid_calls(pid: int) -> bool:
    """Install the filter for this process and its threads, for ever; needs ``forbid_new_privileges`` first.

    Returns:
        Whether this kernel and machine have it.
    """
    try:
        instructions = filter_instructions(os.uname().machine, pid)
        table = (_Instruction * len(instructions))(*(_Instruction(*fields) for fields in instructions))
        program = _Program(len(instructions), table)
        call("prctl", PR_SET_SECCOMP, _FILTER_MODE, ctypes.byref(program), 0, 0)
    except (OSError, ValueError):
        return False
    return True
