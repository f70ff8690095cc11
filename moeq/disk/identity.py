"""Identity of a model that a name stands for, told from its files without loading them.

A folder is identified by what is in it, not by its path or times, so a copy is the same model.  Small files count
whole.  Of a large weight file the size, the safetensors header (names, dtypes, shapes, places) and blocks of 4 KiB
count: at least one of every tensor, and one per 4 MiB, so 100 GB are told apart by reading about 100 MB.  A change
between the blocks alone is not seen; quantizing, training or merging a weight changes all of it.  An export of moeq is
identified to the byte: its manifest, a small file, holds the SHA-256 of every other.
"""

import hashlib
import json
import mmap
from collections.abc import Iterator
from pathlib import Path

WHOLE_BYTES = 1 << 22
STRIDE_BYTES = 1 << 22
BLOCK_BYTES = 1 << 12
# What decides the answers of a model: configuration and code, weights, tokenizer.
IDENTITY_SUFFIXES = frozenset({".json", ".py", ".safetensors", ".bin", ".pt", ".model", ".txt", ".jinja"})


def model_identity(name: str, revision: str | None = None) -> str:
    """The digest of a folder, or the commit of a hub id: the newest, or offline that of the local cache.

    Args:
        name: Folder or hub id.
        revision: Branch, tag or commit at the hub; None is its main branch.

    Raises:
        ValueError: The folder has no model files, or the hub does not know the id or cannot be reached for it.
    """
    if Path(name).is_dir():
        return f"sha256:{folder_digest(Path(name))}"
    from huggingface_hub import hf_hub_download

    try:
        # Its path ends in snapshots/<commit>/config.json.
        return f"{name}@{Path(hf_hub_download(name, 'config.json', revision=revision)).parent.name}"
    except (OSError, ValueError) as error:
        raise ValueError(
            f"no model found at {name!r}: it is not a folder here and the hub does not know or cannot be reached for it"
        ) from error


def folder_digest(folder: Path) -> str:
    """Short SHA-256 over names and contents of the model files of a folder; see the module for large ones.

    Raises:
        ValueError: It has none.
    """
    paths = sorted(path for path in folder.iterdir() if path.is_file() and path.suffix in IDENTITY_SUFFIXES)
    if not paths:
        raise ValueError(f"{folder} holds no model files; give the folder of a Hugging Face checkpoint")
    state = hashlib.sha256()
    for path in paths:
        state.update(f"{path.name}:{file_digest(path)};".encode())
    return state.hexdigest()[:16]


def file_digest(path: Path) -> str:
    """SHA-256 of a file up to 4 MiB; of a larger one, of its size and of blocks of it."""
    size = path.stat().st_size
    if size <= WHOLE_BYTES:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    state = hashlib.sha256(str(size).encode())
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        for start, stop in _blocks(content):
            state.update(content[start:stop])
    return state.hexdigest()


def _blocks(content: mmap.mmap) -> Iterator[tuple[int, int]]:
    """Byte ranges that are read: the header, then evenly spaced blocks of each tensor (or of the whole file)."""
    data, tensors = _safetensors_layout(content)
    yield 0, data
    for begin, end in tensors:
        count = -(-(end - begin) // STRIDE_BYTES)
        for i in range(count):
            start = begin + (end - begin) * i // count
            yield start, min(start + BLOCK_BYTES, end)


def _safetensors_layout(content: mmap.mmap) -> tuple[int, list[tuple[int, int]]]:
    """Where the data begin, and the byte ranges of the tensors; a file of another format is one range."""
    length = int.from_bytes(content[:8], "little")
    if length > len(content) or content[8:9] != b"{":
        return 0, [(0, len(content))]
    data = 8 + length
    header = json.loads(content[8:data])
    places = [entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"]
    return data, sorted((data + begin, data + end) for begin, end in places)
