"""Errors that a user can mend become one line with a remedy; all others keep their traceback."""

import errno
from argparse import ArgumentError

import pytest
import torch

import main as entry
from moeq.cli import MoEQuantCLI
from moeq.mistakes import SYSTEM, first_mistake, one_line

UNION = "Does not validate against any of the Union subtypes\nSubtypes: [<class 'A'>, <class 'NoneType'>]\nErrors:\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("bits (9) must be between 2 and 8", "bits (9) must be between 2 and 8"),
        (
            UNION + "  - length (0) must be positive;\n    take 8\n  - Expected a <class 'NoneType'>\nGiven value: x",
            "length (0) must be positive; take 8",
        ),
        (
            f"Parser key \"data\":\n  {UNION}  - Problem with given class_path 'my.Data':\n"
            f"      Parser key \"sampling\":\n  {UNION}    - Problem with given class_path 'my.Data':\n"
            "        Option 'num_sample' is not accepted\n    - Expected a <class 'NoneType'>\n",
            "data.sampling: Option 'num_sample' is not accepted; --data.help my.Data lists its options",
        ),
        (
            f'Parser key "data":\n  {UNION}  - Parser key "length":\n  {UNION}    - Expected a <class \'int\'>\n',
            "data.length: Expected a <class 'int'>",
        ),
    ],
)
def test_an_error_of_types_within_types_becomes_what_was_meant(text: str, expected: str) -> None:
    assert first_mistake(ValueError(text)) == expected


class ConnectError(Exception):
    """As a library for the hub raises it."""


ConnectError.__module__ = "httpx._exceptions"


@pytest.mark.parametrize("number", SYSTEM)
def test_conditions_of_the_system_are_one_line_with_the_file_and_a_remedy(number: int) -> None:
    line = one_line(OSError(number, "as the system says it", "runs/a/events"))
    assert line == f"runs/a/events: {SYSTEM[number]}"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("bits (9)\nmust be less"), "bits (9) must be less"),
        (ArgumentError(None, "unrecognized"), "unrecognized"),
        (MemoryError(), "memory ran out; set --model.placement stream"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), "start the same command again: it goes on"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate"), "memory ran out"),
        (ConnectionError("refused"), "the network failed: refused; check the connection, or set HF_HUB_OFFLINE=1"),
        (ConnectError("no route"), "the network failed: no route"),
        (TimeoutError(), "the network failed: TimeoutError"),
        (RuntimeError("tensorboard: No space left on device"), "No space left on device; make room on the disk, then"),
    ],
)
def test_other_conditions_are_one_line_too(error: Exception, message: str) -> None:
    line = one_line(error)
    assert line is not None
    assert message in line
    assert "\n" not in line


@pytest.mark.parametrize("error", [KeyError("a"), TypeError("b"), RuntimeError("shapes differ"), AssertionError()])
def test_a_fault_of_moeq_is_not_dressed_up(error: Exception) -> None:
    assert one_line(error) is None


def test_the_command_line_ends_with_the_line_and_moeq_debug_shows_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(MoEQuantCLI, "run", full)
    with pytest.raises(SystemExit, match="moeq: the disk is full; make room on it, then start the same command again"):
        entry.main(["fit"])
    monkeypatch.setenv("MOEQ_DEBUG", "1")
    with pytest.raises(OSError, match="No space left"):
        entry.main(["fit"])
