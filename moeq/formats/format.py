"""What a runtime's format is to the rest of moeq: a refusal before the work, a writer, an independent reader."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from moeq.checkpoint.packed_weight import PackedFormat
from moeq.export.finished import Progress
from moeq.formats.source import PackedExport
from moeq.quant.carrier import CarrierMode, FormatName


@dataclass(frozen=True)
class FormatReport:
    """What a file holds, found by reading it back.

    Attributes:
        format: Its name.
        path: File or folder.
        reader: What read it, which moeq did not write.
        num_quantized: Quantized weights, all compared.
        num_other: Other tensors, all compared.
        num_bytes: Of all files.
        bits_per_weight: Of the quantized weights in the file: codes, scales and zero points.
        types: How many weights have which type of the format.
        largest_error: Largest difference of a weight from moeq's own, in scales of its group; 0.0 is bit for bit.
        num_left_out: Tensors of the packed export that the files do not hold, as their runtime does not read them:
            draft layers, and what stands beside a wrapper's language model.
    """

    format: str
    path: str
    reader: str
    num_quantized: int
    num_other: int
    num_bytes: int
    bits_per_weight: float
    types: dict[str, int]
    largest_error: float
    num_left_out: int = 0

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values."""
        return asdict(self)


@dataclass(frozen=True)
class Format:
    """A format.

    Attributes:
        name: Of ``FormatName``.
        check: Raises ValueError, which names a weight or an option, where a model on these grids has no right file:
            (dense model, which may have no values; grids by canonical name; mode).
        write: Fill an empty folder: (export, folder, mode, progress).
        verify: Read the folder back by another's reader and compare every weight; raises ExportMismatchError.
        serve: The command that serves what is in a folder.
    """

    name: FormatName
    check: Callable[[PreTrainedModel, Mapping[str, PackedFormat], CarrierMode], None]
    write: Callable[[PackedExport, Path, CarrierMode, Progress], None]
    verify: Callable[[PackedExport, Path, CarrierMode, Progress], FormatReport]
    serve: Callable[[Path], str]
