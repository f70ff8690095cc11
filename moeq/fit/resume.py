"""Resuming a killed fit after its last finished block.

Each finished block is one file in the run folder, with a fingerprint of what it depends on: the configuration, the
model and the calibration data.  A restarted run with the same fingerprint loads those blocks and starts behind them.
"""

import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from moeq.disk.checked import DamagedFile
from moeq.distributed import gather_lists, rank_and_world, wait_for_ranks
from moeq.fit.block_files import BlockFile, Grid, block_path, check_fingerprint, read_block, save_block, take_records
from moeq.fit.run import Run
from moeq.fit.solve import change_parameters, commit
from moeq.models.adapter import Adapter
from moeq.quant.spec import Fallback, QuantizedWeight

DAMAGED = "finished block was damaged"


def refuse_other_run(folder: Path, known: Mapping[str, str]) -> None:
    """Refuse a folder with blocks of another run by what is known before the data are made, which may take hours.

    Args:
        folder: Of the run.
        known: Some of its fingerprint.

    Raises:
        ValueError: The first finished block was made with another configuration or model.
    """
    if block_path(folder, 0).exists():
        with suppress(DamagedFile):
            check_fingerprint(read_block(folder, 0), known)


class Resume:
    """Finished blocks of a run: writes them and finds them again.

    Args:
        adapter: The model.
        run: Its state; finished blocks are entered into it.
        folder: Of the run.
        fingerprint: Digests of what the blocks depend on, by subject.
        restart: Pass over the finished blocks, which ``begin`` deletes.

    Attributes:
        first_block: The first block that was not finished when the run began.
        grids: Grid of every weight of the blocks that are finished by now, by canonical name.
    """

    def __init__(
        self, adapter: Adapter, run: Run, folder: Path, fingerprint: Mapping[str, str], *, restart: bool = False
    ) -> None:
        self.adapter, self.run, self.folder = adapter, run, folder
        self.fingerprint = dict(fingerprint)
        self.sites = [adapter.sites(block) for block in range(len(adapter.blocks))]
        self.first_block = 0
        self.grids: dict[str, Grid] = {}
        self._restart = restart

    def load(self, announce: Callable[[str], None]) -> int:
        """Read what is known of the finished blocks into the run; returns the first block that is not finished.

        A file that is truncated or damaged ends them: that block and those after it are quantized again.

        Args:
            announce: Tells the user something, once for all ranks.

        Raises:
            ValueError: A block belongs to another run.
        """
        files: list[BlockFile] = []
        damage = ""
        if self._restart:
            return 0
        while not damage and len(files) < len(self.sites) and block_path(self.folder, len(files)).exists():
            try:
                files.append(read_block(self.folder, len(files)).without_codes())
            except DamagedFile as error:
                damage = str(error)
        for file in files:
            check_fingerprint(file, self.fingerprint)
        # A disk may show one rank what it does not show another: all begin where the first of them has to.
        self.first_block = min(gather_lists([len(files)]))
        for file in files[: self.first_block]:
            take_records(file, self.run)
            self.grids |= file.grids
        if damage := next((found for found in gather_lists([damage]) if found), ""):
            announce(f"{damage}; so are those after it")
            self.run.fallbacks.append(Fallback(self.sites[self.first_block][0].weight_names()[0], DAMAGED, damage))
        return self.first_block

    def begin(self) -> None:
        """Before the first pass: what is to be started over is deleted, now that nothing refuses the run."""
        if self._restart and rank_and_world()[0] == 0:
            shutil.rmtree(self.folder / "blocks", ignore_errors=True)
        wait_for_ranks()  # no rank writes what another is about to delete

    def quantized(self, block: int) -> Mapping[str, QuantizedWeight]:
        """Quantized weights of a finished block by canonical name, each unpacked when it is asked for."""
        return read_block(self.folder, block)

    def commit(self, block: int) -> None:
        """Write the weights and changed parameters of a finished block into the model, where it is resident."""
        file = read_block(self.folder, block)
        commit(self.adapter, self.sites[block], file)
        change_parameters(self.adapter, self.run, file.changed)

    def save(self, block: int) -> None:
        """Write a finished block (by the first rank), where its weights were quantized at all; its codes leave memory.

        All ranks must call it.
        """
        everything = [name for site in self.sites[block] for name in site.weight_names()]
        names = [name for name in everything if name not in self.run.kept]
        if not all(name in self.run.quantized for name in names):
            return
        self.run.kept.clear()
        if rank_and_world()[0] == 0:
            prefix = f"{self.adapter.block_prefix}.{block}."
            changed = [name for name in self.run.changed if name.startswith(prefix)]
            save_block(self.folder, block, self.run, names, changed, self.fingerprint)
        for name in names:
            weight = self.run.quantized.pop(name)
            self.grids[name] = weight.bits, weight.group_size, weight.kind
