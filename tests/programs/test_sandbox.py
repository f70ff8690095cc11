"""Programs that behave, programs that do not, and programs that try to get out."""

import os
import time

import pytest

from moeq.programs.sandbox import LAYERS, PURPOSES, Limits, check_permission, protections, run_program, run_programs

HUMANEVAL = '''from typing import List

def add_all(numbers: List[int]) -> int:
    """ Sum of the numbers
    >>> add_all([1, 2])
    3
    """
    {body}

def check(candidate):
    assert candidate([1, 2, 3]) == 6
    assert candidate([]) == 0

check(add_all)
'''
MBPP = (
    "import re, math\r\ndef is_odd(n): \r\n    return {body}\n\nassert is_odd(3) == True\nassert is_odd(4) == False\n"
)
GENEROUS = 30.0  # seconds, for a busy machine


def test_right_programs_pass() -> None:
    for program in (HUMANEVAL.format(body="return sum(numbers)"), MBPP.format(body="n % 2 == 1"), "", "x = 1"):
        verdict = run_program(program, Limits())
        assert verdict.passed, verdict
        assert verdict.reason == "passed"


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        (HUMANEVAL.format(body="return 6"), "failed: AssertionError"),
        (MBPP.format(body="True"), "failed: AssertionError"),
        ("assert 1 == 2, 'one\\nis not two'", "failed: AssertionError: one is not two"),
        ("def f(:\n  pass", "failed: SyntaxError"),
        ("x = \0", "failed: "),
        ("x = '\ud800'", "failed: UnicodeEncodeError"),
        ("f()", "failed: NameError: name 'f' is not defined"),
        ("def f(): return f()\nf()", "failed: RecursionError"),
        ("import no_such_module", "failed: ModuleNotFoundError"),
        ("import torch", "failed: ModuleNotFoundError"),
        ("import moeq", "failed: ModuleNotFoundError"),
        ("input()", "failed: EOFError"),
        ("raise KeyboardInterrupt", "failed: KeyboardInterrupt"),
        ("import ctypes; ctypes.string_at(0)", "killed by SIGSEGV"),
        ("import os; os.kill(os.getpid(), 9)", "killed by SIGKILL"),
        ("import os; os.abort()", "killed by SIGABRT"),
        ("class E(Exception):\n  def __str__(self): raise SystemExit\nraise E", "failed: E"),
    ],
)
def test_wrong_programs_fail_with_the_reason(program: str, reason: str) -> None:
    verdict = run_program(program, Limits())
    assert not verdict.passed
    assert verdict.reason.startswith(reason)


def test_the_traceback_names_the_line_and_nothing_of_the_launcher() -> None:
    verdict = run_program("def f():\n    raise OSError('no')\nf()", Limits())
    assert 'File "<program>", line 2, in f' in verdict.stderr
    assert "start.py" not in verdict.stderr


@pytest.mark.parametrize(
    "program",
    [
        "import os; os._exit(0)",
        "import sys; sys.exit(0)",
        "raise SystemExit",
        "import os; os.execv('/bin/true', ['true'])",
        "import os, threading\nt = threading.Thread(target=os._exit, args=(0,))\nt.start()\nwhile True: pass",
        "import os; os.closerange(0, 100)",
        "import os; os.dup2(os.open('/dev/null', os.O_WRONLY), 3)",
        "import os; os.write(3, b'passed\\n'); os._exit(0)",
        "import os; os.write(3, bytes(32) + b' passed\\n'); os._exit(0)",
        "import os\nos.set_blocking(3, False)\nos.write(3, b'x' * 60000); os._exit(0)",
        "import os; os.write(3, b'not the start of a line')",
        "import os, sys; os.write = print; sys.excepthook = print; os._exit = print; assert False",
        "import atexit, os; atexit.register(os._exit, 0); assert False",
        "import signal, os; signal.signal(15, lambda *_: os._exit(0)); os.kill(os.getpid(), 15); assert False",
    ],
)
def test_ending_early_is_not_passing(program: str) -> None:
    verdict = run_program(program + "\nassert True", Limits(seconds=5.0, cpu_seconds=1))
    assert not verdict.passed
    assert verdict.reason.startswith(("failed", "timed out", "killed")), verdict


def test_a_program_may_replace_what_the_launcher_uses() -> None:
    assert run_program("import os, sys; os.write = os._exit = os.getpid = None; sys.stderr = None", Limits()).passed


@pytest.mark.parametrize("program", ["while True: pass", "import re; re.match('(a*)*b', 'a' * 40)"])
def test_an_endless_loop_ends_at_the_processor_time_limit(program: str) -> None:
    begun = time.monotonic()
    verdict = run_program(program, Limits(cpu_seconds=1, seconds=GENEROUS))
    assert verdict.reason == "timed out"
    assert time.monotonic() - begun < GENEROUS


@pytest.mark.parametrize(
    "program",
    [
        "import time; time.sleep(600)",
        "import os, time; os.closerange(0, 100); time.sleep(600)",
        "import signal, time\nfor n in signal.Signals:\n    if n not in (9, 19): signal.signal(n, 1)\ntime.sleep(600)",
        "import os, signal; os.kill(os.getpid(), signal.SIGSTOP)",
        "import threading\nthreading.Event().wait()",
    ],
)
@pytest.mark.parametrize("layers", [LAYERS, ("landlock", "seccomp", "no new privileges")])
def test_waiting_ends_at_the_time_limit(program: str, layers: tuple[str, ...]) -> None:
    begun = time.monotonic()
    verdict = run_program(program, Limits(seconds=0.3), layers)
    assert verdict.reason == "timed out"
    assert 0.3 <= time.monotonic() - begun < GENEROUS


@pytest.mark.parametrize(
    "program", ["x = bytearray(1 << 30)", "x = []\nwhile True: x.append('a' * 100000 + str(len(x)))"]
)
def test_memory_is_limited(program: str) -> None:
    verdict = run_program(program, Limits(memory_bytes=256 << 20))
    assert verdict.reason == "out of memory"
    assert run_program("x = bytearray(100 << 20)", Limits(memory_bytes=256 << 20)).passed


def test_output_is_thrown_away_but_the_tail_of_the_errors(capfd: pytest.CaptureFixture[str]) -> None:
    program = "import sys\nfor _ in range(100):\n    print('x' * 100000)\n    print('y' * 100000, file=sys.stderr)"
    verdict = run_program(program + "\nprint('the end', file=sys.stderr)", Limits(output_bytes=50))
    assert verdict.passed
    assert len(verdict.stderr) <= 50
    assert verdict.stderr.endswith("the end\n")
    assert capfd.readouterr() == ("", "")


def test_threads_that_are_left_running_do_not_delay_the_verdict() -> None:
    program = "import threading, time\nthreading.Thread(target=time.sleep, args=(600,)).start()"
    verdict = run_program(program, Limits(seconds=GENEROUS))
    assert verdict.passed
    assert verdict.seconds < GENEROUS


def test_the_same_program_gets_the_same_verdict_again() -> None:
    program = "raise RuntimeError(list({'a', 'b', 'c', 'd', 'e', 'f', 'g', 'h'}))"
    assert len({run_program(program, Limits()).reason for _ in range(4)}) == 1


def test_verdicts_keep_the_order_of_the_programs_and_progress_counts_them() -> None:
    seen = []
    programs = [f"import time; time.sleep({0.2 if i == 0 else 0}); raise RuntimeError({i})" for i in range(6)]
    verdicts = run_programs(programs, Limits(), 3, seen.append)
    assert [verdict.reason for verdict in verdicts] == [f"failed: RuntimeError: {i}" for i in range(6)]
    assert seen == [1, 2, 3, 4, 5, 6]
    with pytest.raises(ValueError, match=r"num_workers \(0\) must be at least 1"):
        run_programs(programs, Limits(), 0)


def test_protections_name_what_is_missing() -> None:
    assert protections(layers=()).missing[0] == "use the network"
    assert set(protections().missing) < set(PURPOSES)
    without = [layer for layer in LAYERS if layer not in ("network namespace", "seccomp")]
    assert "use the network" in protections(layers=without).missing


def test_a_system_that_cannot_confine_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "name", "nt")
        with pytest.raises(ValueError, match="cannot be confined on"):
            run_program("", Limits())


def test_systems_without_waitid_can_run_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "waitid")
    assert run_program("", Limits()).passed
    assert run_program("import time; time.sleep(600)", Limits(seconds=0.1)).reason == "timed out"


def test_a_process_that_does_not_start_is_an_error_and_not_a_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moeq.programs.watch._SOURCE", "raise OSError('no interpreter: {}')")
    with pytest.raises(ValueError, match=r"(?s)did not start \(failed: .*no interpreter"):
        run_program("", Limits())


def test_code_runs_only_with_permission() -> None:
    check_permission(True, "humaneval")
    with pytest.raises(ValueError, match=r"'humaneval' runs programs that the model wrote.*--data\.execute_code true"):
        check_permission(False, "humaneval")


@pytest.mark.parametrize("name", ["seconds", "cpu_seconds", "memory_bytes", "file_bytes", "processes", "output_bytes"])
def test_limits_that_nothing_can_run_under_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name} \(0\) must be"):
        Limits(**{name: 0})
