"""Writing the weights and the configuration of an export, block by block."""

from collections.abc import Callable, Iterable
from pathlib import Path

from torch import Tensor

from moeq.export.config_file import write_config
from moeq.export.finished import FinishedModel, Progress
from moeq.export.layout import Layout, layout_writer
from moeq.export.stored import outside_tensors


def write_weights(
    source: FinishedModel,
    layout: Layout,
    block_tensors: Callable[[int], Iterable[tuple[str, Tensor]]],
    folder: Path,
    progress: Progress,
) -> None:
    """Write configuration and weights of a finished model, at most one block of it in memory.

    Args:
        source: The model.
        layout: Of the files.
        block_tensors: Tensors of a block, which is finished, by name in the model that the files are of.
        folder: Where to write.
        progress: Shows how many blocks are written.

    Raises:
        ValueError: Tensors are not those of the layout, or the disk is full.
    """
    write_config(layout.skeleton, source.origin, folder)
    with layout_writer(folder, layout) as writer:
        writer.write(outside_tensors(source))
        writer.copy(source.origin.carried.values())
        for block in progress(source.block_indices, "writing"):
            with source.finished(block):
                writer.write(block_tensors(block))
