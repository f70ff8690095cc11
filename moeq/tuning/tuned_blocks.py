"""The result of a tuning on disk: block files like those that it started from, and a record that ends it.

``tuning/blocks`` in the run folder holds the best state so far, ``tuning/tuned.json`` is written last.  The files in
``blocks`` stay what they were, so that a run that is killed or damaged at any time quantizes, and tunes, to the same
bits again.
"""

import json
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moeq.disk.atomic import write_json
from moeq.disk.digest import digest
from moeq.fit.block_files import read_block, save_block
from moeq.fit.run import Run
from moeq.models.adapter import Adapter
from moeq.quant.spec import QuantizedWeight
from moeq.tuning.leaves import BlockLeaves

TUNED = "tuned end to end"


@dataclass(frozen=True)
class TuningFolder:
    """Files of the tuning of a run.

    Attributes:
        path: ``tuning`` in the run folder.
        fingerprint: Of the run.
    """

    path: Path
    fingerprint: Mapping[str, str]

    @property
    def originals(self) -> Path:
        """Folder of sequences and hidden states of the original."""
        return self.path / "original"

    @property
    def sequences(self) -> Path:
        """Folder of the sequences while they are written, a part at a time."""
        return self.path / f"sequences-{digest(dict(self.fingerprint))}"

    def record(self, num_blocks: int) -> dict[str, Any] | None:
        """What a finished tuning of this run has found; None where there is none, or its blocks are damaged."""
        with suppress(OSError, ValueError):
            told: dict[str, Any] = json.loads((self.path / "tuned.json").read_text(encoding="utf8"))
            if told.pop("fingerprint") == dict(self.fingerprint):
                if told["kept"]:
                    for block in range(num_blocks):
                        read_block(self.path, block)
                return told
        return None

    def finish(self, record: Mapping[str, Any]) -> None:
        """Write the record; originals are not needed any more."""
        write_json(self.path / "tuned.json", {**record, "fingerprint": dict(self.fingerprint)})
        shutil.rmtree(self.originals, ignore_errors=True)

    def clear(self) -> None:
        """Delete everything."""
        shutil.rmtree(self.path, ignore_errors=True)

    def save(
        self, adapter: Adapter, run: Run, block: int, leaves: BlockLeaves, solved: Mapping[str, QuantizedWeight]
    ) -> int:
        """Write what a block has become; the number of its codes that changed."""
        weights, others = leaves.close(solved)
        reasons = {name: f"{run.reasons[name]}, {TUNED}" if name in run.reasons else TUNED for name in others}
        tuned = replace(
            run, quantized=weights, changed={**run.changed, **others}, reasons={**run.reasons, **reasons},
            errors=[], fallbacks=[], usage={},
        )  # fmt: skip
        changed = [name for name in tuned.changed if name.startswith(f"{adapter.block_prefix}.{block}.")]
        save_block(self.path, block, tuned, list(weights), changed, self.fingerprint)
        return sum(int((weight.codes_OI != solved[name].codes_OI).sum()) for name, weight in weights.items())
