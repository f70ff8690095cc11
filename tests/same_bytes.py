"""Two runs that must have the same bytes, one of which streams its blocks."""

from pathlib import Path

from moeq.checkpoint.stream import BlockStream
from moeq.module import MoEQuantModule

# Times, and what the run was asked for.
TOLD = frozenset(
    {
        "manifest.json", "moeq_manifest.json", "memory.csv", "summary.md", "verification.json", "preflight.json",
        "preflight.md",
    }
)  # fmt: skip


def written(folder: Path) -> dict[str, bytes]:
    """Every file of a run folder but those of ``TOLD``, by its path in the folder, whose own name is left out."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in TOLD)
    name = str(folder).encode()
    return {path.relative_to(folder).as_posix(): path.read_bytes().replace(name, b"") for path in paths}


def assert_same_bytes(one: Path, other: Path) -> None:
    """Two runs that exported have the same files."""
    files, others = written(one), written(other)
    assert files.keys() == others.keys()
    assert [name for name in files if files[name] != others[name]] == []
    assert {"export/model.safetensors", "blocks/block_000.safetensors", "export/config.json"} <= files.keys()


def assert_no_block_stayed(module: MoEQuantModule) -> None:
    """The module of a streamed run has let go of all blocks."""
    residency = module.adapter.residency
    assert isinstance(residency, BlockStream)
    assert all(parameter.is_meta for parameter in residency.blocks.parameters()), "a block stayed in memory"
