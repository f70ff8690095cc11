"""Make a runtime's files of a packed export: refused before the work, verified before they have their name."""

from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from pathlib import Path

from transformers import PreTrainedModel

from moeq.checkpoint.packed_weight import PackedFormat
from moeq.disk.folder import atomic_folder, check_target
from moeq.export.finished import Progress, silent
from moeq.formats.format import Format, FormatReport
from moeq.formats.source import open_packed
from moeq.quant.carrier import FORMATS, CarrierMode


def find_format(name: str) -> Format:
    """A format by name; raises ValueError for any other."""
    if name not in FORMATS:
        raise ValueError(f"format ({name}) must be one of {', '.join(FORMATS)}")
    found: Format = import_module(f"moeq.formats.{name.replace('-', '_')}").FORMAT
    return found


def check_format(name: str, model: PreTrainedModel, grids: Mapping[str, PackedFormat], carrier: CarrierMode) -> None:
    """Raise ValueError where a format has no right file for a model on these grids; see ``Format.check``."""
    find_format(name).check(model, grids, carrier)


def convert(
    packed: Path | str,
    name: str,
    directory: Path | str,
    *,
    carrier: CarrierMode = "exact",
    overwrite: bool = False,
    progress: Progress = silent,
) -> FormatReport:
    """Write a packed export in a runtime's format; the folder appears complete and verified, or not at all.

    Args:
        packed: Folder of the packed export.
        name: Of the format.
        directory: Folder to create.
        carrier: "exact" keeps every value; "native" takes types of the grids' own widths, see ``moeq.quant.carrier``.
        overwrite: Replace a folder that exists.
        progress: Shows how far it is.

    Raises:
        ValueError: The folder is taken, the packed export is damaged, or the format cannot hold it.
        ExportMismatchError: What was read back differs.
    """
    check_target(directory, overwrite=overwrite)
    with atomic_folder(directory, overwrite=overwrite) as folder:
        report = fill_format(packed, name, folder, carrier=carrier, progress=progress)
    return renamed(report, folder, Path(directory))


def fill_format(
    packed: Path | str, name: str, folder: Path, *, carrier: CarrierMode = "exact", progress: Progress = silent
) -> FormatReport:
    """Write the files of a format into an empty folder, and verify them; see ``convert``."""
    chosen, export = find_format(name), open_packed(packed)
    chosen.check(export.model, export.grids, carrier)
    chosen.write(export, folder, carrier, progress)
    return chosen.verify(export, folder, carrier, progress)


def renamed(report: FormatReport, before: Path, after: Path) -> FormatReport:
    """A report of a folder that was renamed."""
    return replace(report, path=report.path.replace(str(before), str(after)))


def proof(report: FormatReport) -> str:
    """What was verified, in words."""
    same = "bit for bit" if report.largest_error == 0 else f"within {report.largest_error:.2g} of a scale"
    left = f"; {report.num_left_out} tensors beside the language model left out" if report.num_left_out else ""
    return f"{report.num_quantized} quantized weights read back by {report.reader}, equal {same}{left}"
