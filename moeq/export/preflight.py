"""What exports are going to take: they are written and read back block by block, on the CPU.

writing       the block, made of its file (mapped while it is read) and the source
verification  the same, and the export as it is read back: whole where it is small, else a block of it with what
lies outside of the blocks
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moeq.export.reopen import WHOLE_BYTES
from moeq.preflight.phases import Moment, Phase


@dataclass(frozen=True)
class ExportSizes:
    """Bytes of a model and its exports; of one block those of the largest.

    Attributes:
        held: What is in memory while a block is worked on, by name.
        loading: Beside a block that is loaded from the source, for a moment.
        outside: What lies outside of the blocks, in the files' dtype.
        block: A block in the files' dtype.
        block_file: A block's file.
        source: The whole model in the files' dtype.
        packed: The packed export.
        widening: Bytes of a number in memory for each in the files.
        carried: What both exports copy of the source's files beside the model's tensors (draft layers).
    """

    held: Mapping[str, int]
    loading: int
    outside: int
    block: int
    block_file: int
    source: int
    packed: int
    widening: float = 1.0
    carried: int = 0


@dataclass(frozen=True)
class Rates:
    """Bytes per second that the source is read with, and files are written with."""

    read: float
    write: float


def export_phases(
    sizes: ExportSizes, *, dense: bool, served: Sequence[str] = (), streamed: bool, rates: Rates | None
) -> tuple[Phase, ...]:
    """Phases of ``Export``.

    Args:
        sizes: Of the model and its exports.
        dense: Whether a dense copy is written, too.
        served: Formats of runtimes that are made of the packed export.
        streamed: Whether each visit of a block reads the source again.
        rates: Of the disk; None leaves times open.
    """
    source = sizes.source if streamed else 0
    packed = _pair(sizes, "export", sizes.packed, sizes.block_file, source, rates)
    dense_copy = _pair(sizes, "dense copy", sizes.source, sizes.block, source, rates) if dense else ()
    return packed + dense_copy + tuple(_served(sizes, name, rates) for name in served)


def _served(sizes: ExportSizes, name: str, rates: Rates | None) -> Phase:
    """A runtime's files, made of the packed export and read back: one stacked weight at a time, a block at most."""
    written = sizes.packed + sizes.carried
    seconds = None if rates is None else (3 * written) / rates.read + written / rates.write
    return Phase(name, name, (Moment({}, {"codes": 2 * sizes.block}),), disk=written, seconds=seconds)


def _pair(
    sizes: ExportSizes, kind: str, num_bytes: int, block: int, source: int, rates: Rates | None
) -> tuple[Phase, Phase]:
    """One folder is written, and read back."""
    work = {"parts from files": sizes.loading, "block file": sizes.block_file}
    if num_bytes <= WHOLE_BYTES:  # opened by transformers: files mapped while parameters are made of them
        reopened = {"export read back": int(num_bytes * (1 + sizes.widening))}
    else:
        reopened = {"export read back": int((sizes.outside + block) * sizes.widening) + block}
    written = num_bytes + sizes.carried
    writing = None if rates is None else (source + sizes.carried) / rates.read + written / rates.write
    reading = None if rates is None else (source + 2 * written) / rates.read
    return (
        Phase(kind, kind, (Moment({}, {**sizes.held, **work}),), disk=written, seconds=writing),
        Phase(
            f"{kind} verified", f"{kind} verified", (Moment({}, {**sizes.held, **work, **reopened}),), seconds=reading
        ),
    )
