import errno
from collections.abc import Callable

import pytest

from moeq.programs.confinement.seccomp import filter_instructions

ALLOW, KILL, FAIL = 0x7FFF0000, 0x80000000, 0x00050000
AUDIT = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
PID = 4321
Run = Callable[..., int]


def reference_run(
    instructions: list[tuple[int, int, int, int]], architecture: int, number: int, argument: int = 0
) -> int:
    """A packet filter's machine, for the five instructions that the filter has."""
    data = {0: number, 4: architecture, 16: argument & 0xFFFFFFFF}
    accumulator, at = 0, 0
    while True:
        code, if_true, if_false, value = instructions[at]
        at += 1
        if code == 0x06:
            return value
        if code == 0x20:
            accumulator = data[value]
        else:
            taken = {0x15: accumulator == value, 0x35: accumulator >= value, 0x45: bool(accumulator & value)}[code]
            at += if_true if taken else if_false


@pytest.fixture(params=["x86_64", "aarch64"])
def run(request: pytest.FixtureRequest) -> Run:
    instructions = filter_instructions(request.param, PID)

    def run(x86_64: int, aarch64: int, argument: int = 0) -> int:
        number = {"x86_64": x86_64, "aarch64": aarch64}[request.param]
        return reference_run(instructions, AUDIT[request.param], number, argument)

    return run


def test_what_every_program_needs_is_allowed(run: Run) -> None:
    for numbers in (
        (0, 63),
        (1, 64),
        (9, 222),
        (257, 56),
        (202, 98),
        (231, 94),
    ):  # read write mmap openat futex exit
        assert run(*numbers) == ALLOW


def test_sockets_and_new_programs_are_denied(run: Run) -> None:
    for numbers in ((41, 198), (59, 221), (101, 117), (165, 40), (425, 425)):  # socket execve ptrace mount io_uring
        assert run(*numbers) == FAIL | errno.EPERM


def test_threads_are_allowed_and_processes_are_not(run: Run) -> None:
    assert run(56, 220, 0x10000 | 0x100) == ALLOW
    assert run(56, 220, 17) == FAIL | errno.EPERM
    assert run(435, 435) == FAIL | errno.ENOSYS


def test_a_process_signals_and_limits_only_itself(run: Run) -> None:
    for numbers in ((62, 129), (234, 131)):  # kill, tgkill
        assert run(*numbers, PID) == ALLOW
        for other in (1, 0, -1, -PID, PID + 1):
            assert run(*numbers, other) == FAIL | errno.EPERM
    assert run(302, 261, PID) == run(302, 261, 0) == ALLOW
    assert run(302, 261, 1) == FAIL | errno.EPERM


def test_calls_by_another_architecture_s_numbers_end_the_process() -> None:
    assert reference_run(filter_instructions("x86_64", PID), 0x40000003, 1) == KILL
    assert reference_run(filter_instructions("aarch64", PID), AUDIT["x86_64"], 1) == KILL
    assert reference_run(filter_instructions("x86_64", PID), AUDIT["x86_64"], 0x40000001) == FAIL | errno.EPERM


def test_an_unknown_machine_is_refused() -> None:
    with pytest.raises(ValueError, match="machine 'm68k' has no seccomp filter"):
        filter_instructions("m68k", PID)
