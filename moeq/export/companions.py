"""Files of a source that are no weights: tokenizer, templates, processor, licence, code, copied byte by byte."""

from fnmatch import fnmatch
from pathlib import Path

from moeq.disk.atomic import copy_file
from moeq.disk.folder import INDEX, MANIFEST
from moeq.export.origin import WEIGHTS
from moeq.quant.spec import Fallback

# Larger files are data or weights under another name; the largest tokenizers take half of it.
MAX_BYTES = 100_000_000
# Written anew, or about weights.
_OWN = {"config.json", "README.md", INDEX, MANIFEST}
_ABOUT_WEIGHTS = "*.index.json"


def companions(source: Path, apart: Path | None = None) -> tuple[list[Path], list[Fallback]]:
    """Files of a source's folder that every export takes over, by path in the folder, and those that are too large.

    Args:
        source: The folder; links are followed, hidden files and folders of other models are not seen.
        apart: What lies beside this path, below the source, is not the source's (a run folder that was put there).
    """
    taken, left = [], []
    for name in _names(source, apart):
        path = source / name
        if (size := path.stat().st_size) <= MAX_BYTES:
            taken.append(name)
        else:
            detail = f"{size} bytes, above {MAX_BYTES}; copy it by hand where a runtime needs it"
            left.append(Fallback(name.as_posix(), "large file of the source left out", detail))
    return taken, left


def copy_companions(source: Path, folder: Path) -> None:
    """Copy the files that ``companions`` names into the folder of an export.

    Raises:
        ValueError: The disk does not take a file.
    """
    for name in companions(source, folder)[0]:
        copy_file(source / name, folder / name)


def _names(source: Path, apart: Path | None) -> list[Path]:
    names = []
    for top in sorted(source.iterdir()):
        if top.name.startswith("."):
            continue
        if top.is_file():
            names.append(top)
        elif not (top / "config.json").exists() and (apart is None or top.resolve() not in apart.resolve().parents):
            names += sorted(path for path in top.rglob("*") if path.is_file())
    found = [path.relative_to(source) for path in names]
    return [name for name in found if not _is_left(name.as_posix()) and not any(p.startswith(".") for p in name.parts)]


def _is_left(name: str) -> bool:
    return name in _OWN or fnmatch(name, _ABOUT_WEIGHTS) or any(fnmatch(name, pattern) for pattern in WEIGHTS)
