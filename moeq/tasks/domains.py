"""Perplexity of any text as a task: a file, cut into windows."""

from pathlib import PurePosixPath

from moeq.disk.texts import CONTENTS, row_text
from moeq.tasks.task import Source, Windows


def domain_task(name: str, file: str, window_length: int, num_windows: int | None) -> Windows:
    """Windows of a text file: documents end with the end-of-text token, windows are evenly spread over the text.

    Args:
        name: Name of the domain.
        file: A .txt file (one document) or a .jsonl file (one per line), also .gz, as a path below ``data_dir``.
        window_length: Tokens per window.
        num_windows: Windows that are evaluated; None is all of them.

    Raises:
        ValueError: The file is of another kind.
    """
    path = PurePosixPath(file)
    stem = path.with_suffix("") if path.suffix == ".gz" else path
    if stem.suffix not in CONTENTS:
        raise ValueError(f"domain {name}: file {file} must end in .txt or .jsonl (or one of them and .gz); convert it")
    source = Source(folder=str(path.parent), hub=None, splits=(path.name,), whole=True)
    return Windows(name=name, source=source, text=row_text, documents=num_windows, length=window_length)
