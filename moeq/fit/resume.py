"""Resuming a killed fit after its last finished block.

Each finished block is one file in the run folder, with a fingerprint of what it depends on: the configuration, the
model and the calibration data.  A restarted run with the same fingerprint loads those blocks and starts behind them.
"""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from moeq.distributed import gather_lists, rank_and_world, wait_for_ranks
from moeq.fit.block_files import BlockFile, block_path, check_fingerprint, read_block, save_block, take_block
from moeq.fit.run import Run
from moeq.fit.solve import change_parameters, commit
from moeq.models.adapter import Adapter
from moeq.quant.spec import Fallback

DAMAGED = "finished block was damaged"


class Resume:
    """Finished blocks of a run: writes them and finds them again.

    Args:
        adapter: The model.
        run: Its state; finished blocks are entered into it.
        folder: Of the run.
        fingerprint: Digests of what the blocks depend on, by subject.
        restart: Delete the finished blocks first.
    """

    def __init__(
        self, adapter: Adapter, run: Run, folder: Path, fingerprint: Mapping[str, str], *, restart: bool = False
    ) -> None:
        self.adapter, self.run, self.folder = adapter, run, folder
        self.fingerprint = dict(fingerprint)
        self.sites = [adapter.sites(block) for block in range(len(adapter.blocks))]
        self.first_block = 0
        if restart and rank_and_world()[0] == 0:
            shutil.rmtree(folder / "blocks", ignore_errors=True)
        wait_for_ranks()  # no rank reads what another is about to delete

    def load(self, announce: Callable[[str], None]) -> int:
        """Read the finished blocks into the run; returns the first block that is not finished.

        A file that is truncated or damaged ends them: that block and those after it are quantized again.

        Args:
            announce: Tells the user something, once for all ranks.

        Raises:
            ValueError: A block belongs to another run.
        """
        files: list[BlockFile] = []
        damage = ""
        while not damage and len(files) < len(self.sites) and block_path(self.folder, len(files)).exists():
            try:
                files.append(read_block(self.folder, len(files)))
            except ValueError as error:
                damage = str(error)
        for file in files:
            check_fingerprint(file, self.fingerprint)
        # A disk may show one rank what it does not show another: all begin where the first of them has to.
        self.first_block = min(gather_lists([len(files)]))
        for file in files[: self.first_block]:
            take_block(file, self.run)
        if damage := next((found for found in gather_lists([damage]) if found), ""):
            announce(f"{damage}; so are those after it")
            self.run.fallbacks.append(Fallback(self.sites[self.first_block][0].weight_names()[0], DAMAGED, damage))
        return self.first_block

    def commit(self) -> None:
        """Write the weights of the finished blocks into the model."""
        for sites in self.sites[: self.first_block]:
            commit(self.adapter, sites, self.run.quantized)
        change_parameters(self.adapter, self.run, dict(self.run.changed))

    def save(self, block: int) -> None:
        """Write a finished block (by the first rank), where its weights were quantized at all."""
        names = [name for site in self.sites[block] for name in site.weight_names()]
        if rank_and_world()[0] == 0 and all(name in self.run.quantized for name in names):
            prefix = f"{self.adapter.block_prefix}.{block}."
            changed = [name for name in self.run.changed if name.startswith(prefix)]
            save_block(self.folder, block, self.run, names, changed, self.fingerprint)
