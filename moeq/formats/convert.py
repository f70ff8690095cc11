"""Make a runtime's files of a packed export: refused before the work, verified before they have their name."""

from dataclasses import replace
from importlib import import_module
from pathlib import Path

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


def convert(
    packed: Path | str,
    name: str,
    directory: Path | str,
    *,
    carrier: CarrierMode = "exact",
    overwrite: bool = False,
    progress: Progress = silent,
) -> FormatReport:
    """Write a packed export in a runtime's format.

    Args:
        packed: Folder of the packed export.
        name: Of the format.
        directory: Folder to create; it appears complete and verified, or not at all.
        carrier: "exact" keeps every value; "native" takes types of the grids' own widths, see ``moeq.quant.carrier``.
        overwrite: Replace a folder that exists.
        progress: Shows how far it is.

    Raises:
        ValueError: The folder is taken, the packed export is damaged, or the format cannot hold it.
        ExportMismatchError: What was read back differs.
    """
    check_target(directory, overwrite=overwrite)
    chosen, export = find_format(name), open_packed(packed)
    chosen.check(export.model, export.grids, carrier)
    with atomic_folder(directory, overwrite=overwrite) as folder:
        chosen.write(export, folder, carrier, progress)
        report = chosen.verify(export, folder, carrier, progress)
    return replace(report, path=report.path.replace(str(folder), str(directory)))
