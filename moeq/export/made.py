"""How an export was made, as far as a run knows it, for its card."""

import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Made:
    """How an export was made, as far as a run knows it.

    Attributes:
        source: Hub id or folder of the source, as given.
        identity: Commit or digest of its files.
        method: Name of what quantized it.
        bits: Bits per quantized weight, codes alone.
        average_bits: The same with scales and zero points.
        data: What it was calibrated on, in words.
        data_digest: Digest of the calibration data.
        command: That made it.
    """

    source: str
    identity: str | None = None
    method: str | None = None
    bits: float | None = None
    average_bits: float | None = None
    data: str | None = None
    data_digest: str | None = None
    command: str | None = None


def command_line(argv: Sequence[str], left_out: Collection[str]) -> str | None:
    """The command of a process as one types it; None where it is not that of ``main.py``.

    Args:
        argv: Of the process.
        left_out: Options that change where a run stands and what it takes, not what it makes.
    """
    if not argv or Path(argv[0]).name != "main.py":
        return None
    kept: list[str] = []
    dropped = False
    for word in argv[1:]:
        if word.startswith("--"):
            dropped = word.removeprefix("--").partition("=")[0] in left_out
        if not dropped:
            kept.append(word)
    return shlex.join(["python", "main.py", *kept])


def describe_data(maker: object, options: Mapping[str, Any]) -> str:
    """The calibration data in words: who made them, with its options; of a path, the name.

    Args:
        maker: Of the data.
        options: Its own, by name; a dataclass stands for its fields.
    """
    flat: dict[str, Any] = {}
    for name, value in options.items():
        flat |= asdict(value) if is_dataclass(value) and not isinstance(value, type) else {name: value}
    given = [
        f"{name} {Path(value).name if isinstance(value, str) and value.startswith('/') else value}"
        for name, value in flat.items()
        if isinstance(value, int | float | str) and not name.startswith("_")
    ]
    return f"{type(maker).__name__}{': ' if given else ''}{', '.join(given)}"
