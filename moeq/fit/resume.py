"""Resuming a killed fit after its last finished block.

Each finished block is one file in the run folder, with a fingerprint of what it depends on: the configuration, the
model and the calibration data.  A restarted run with the same fingerprint loads those blocks and starts behind them.
What a run makes before its first block is finished, a survey and a plan, belongs to the fingerprint in a file of its
own: another run is refused there, too.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from moeq.disk.atomic import write_json
from moeq.disk.checked import DamagedFile
from moeq.distributed import gather_lists, rank_and_world, wait_for_ranks
from moeq.fit.block_files import BlockFile, Grid, block_path, check_fingerprint, read_block, save_block, take_records
from moeq.fit.run import Run
from moeq.fit.solve import change_parameters, commit
from moeq.models.adapter import Adapter
from moeq.quant.spec import Fallback, QuantizedWeight

DAMAGED = "finished block was damaged"
# The fingerprint of the run that began last in a folder, and what that may have left, which is hours of work.
FINGERPRINT, PLANS = "fingerprint.json", ("survey.json", "allocation.json")


def refuse_other_run(folder: Path, known: Mapping[str, str]) -> None:
    """Refuse a folder with blocks, a plan or a survey of another run.

    Args:
        folder: Of the run.
        known: Its fingerprint, or some of it: data may take hours to make.

    Raises:
        ValueError: They were made with another configuration, model or data, or nothing says with which.
    """
    if block_path(folder, 0).exists():
        with suppress(DamagedFile):
            check_fingerprint(folder, "blocks", read_block(folder, 0).fingerprint, known)
            return
    if left := [name for name in PLANS if (folder / name).exists()]:
        held = " and ".join(left)
        try:
            before = json.loads((folder / FINGERPRINT).read_text(encoding="utf8"))
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{folder} holds {held}, and no {FINGERPRINT} that says of which run; set --trainer.default_root_dir "
                "to a new folder, or --model.restart true to start over in this one"
            ) from error
        check_fingerprint(folder, held, before, known)


class Resume:
    """Finished blocks of a run: writes them and finds them again.

    Args:
        adapter: The model.
        run: Its state; finished blocks are entered into it.
        folder: Of the run.
        fingerprint: Digests of what the blocks depend on, by subject, as far as they are known before the data are.
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
        self._finished = folder
        self._before: list[dict[str, str]] = []
        self._restart = restart

    def load(self, announce: Callable[[str], None]) -> int:
        """Read what is known of the finished blocks into the run; returns the first block that is not finished.

        A file that is truncated or damaged ends them: that block and those after it are quantized again.

        Args:
            announce: Tells the user something, once for all ranks.

        Raises:
            ValueError: A block, a plan or a survey belongs to another run.
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
            check_fingerprint(self.folder, "blocks", file.fingerprint, self.fingerprint)
        if not files:
            refuse_other_run(self.folder, self.fingerprint)
        self._before = [file.fingerprint for file in files]
        # A disk may show one rank what it does not show another: all begin where the first of them has to.
        self.first_block = min(gather_lists([len(files)]))
        for file in files[: self.first_block]:
            take_records(file, self.run)
            self.grids |= file.grids
        if damage := next((found for found in gather_lists([damage]) if found), ""):
            announce(f"{damage}; so are those after it")
            self.run.fallbacks.append(Fallback(self.sites[self.first_block][0].weight_names()[0], DAMAGED, damage))
        return self.first_block

    def add_data(self, data: Mapping[str, str]) -> None:
        """The rest of the fingerprint, once the data are made.

        Raises:
            ValueError: What is finished was made of other data.
        """
        self.fingerprint |= data
        for before in self._before:
            check_fingerprint(self.folder, "blocks", before, self.fingerprint)
        if not self._restart and not self._before:
            refuse_other_run(self.folder, self.fingerprint)

    def begin(self) -> None:
        """Before the first pass: what is to be started over is deleted, now that nothing refuses the run."""
        if rank_and_world()[0] == 0:
            if self._restart:
                shutil.rmtree(self.folder / "blocks", ignore_errors=True)
            write_json(self.folder / FINGERPRINT, self.fingerprint)
        wait_for_ranks()  # no rank writes what another is about to delete

    def quantized(self, block: int) -> Mapping[str, QuantizedWeight]:
        """Quantized weights of a finished block by canonical name, each unpacked when it is asked for."""
        return read_block(self._finished, block)

    def replace_blocks(self, folder: Path) -> None:
        """Files of the same blocks in another folder take the place of all that are finished, from here on."""
        self._finished = folder
        for block in range(len(self.sites)):
            file = read_block(folder, block).without_codes()
            self.run.changed |= file.changed
            self.run.reasons |= file.records["reasons"]

    def commit(self, block: int) -> None:
        """Write the weights and changed parameters of a finished block into the model, where it is resident."""
        file = read_block(self._finished, block)
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
