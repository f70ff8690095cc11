"""Calibration on token ids of a file: a set that was written before, or elsewhere."""

from pathlib import Path
from typing import Any

from torch import Tensor
from typing_extensions import override

from datamodules.calibration import CalibrationDataModule, check_positions
from moeq.sampling.given_ids import check_ids, read_ids


class GivenIdsDataModule(CalibrationDataModule):
    """Sequences of token ids as they are in a file, for what a model too large to write here wrote elsewhere.

    Args:
        path: A .safetensors file with a tensor input_ids [N, L] (or calibration/ebss-*.safetensors of a run folder), a
            .npy array [N, L], or a .jsonl file with one list of ids per line; all sequences have one length.
        num_sequences: The first so many; null takes all.
        batch_size: Sequences per step.
    """

    def __init__(self, path: str, num_sequences: int | None = None, batch_size: int = 8) -> None:
        super().__init__(batch_size)
        if num_sequences is not None and num_sequences < 1:
            raise ValueError(f"num_sequences ({num_sequences}) must be at least 1; null takes all sequences")
        self.path, self.num_sequences = path, num_sequences

    @override
    def make_ids(self) -> Tensor:
        assert self.trainer is not None, "the data are made by a Trainer"
        module: Any = self.trainer.lightning_module
        ids_NL = read_ids(Path(self.path))
        if self.num_sequences is not None and self.num_sequences > len(ids_NL):
            raise ValueError(
                f"num_sequences ({self.num_sequences}) exceeds the {len(ids_NL)} sequences of {self.path}; "
                f"choose at most {len(ids_NL)}"
            )
        check_positions(module.model.config, ids_NL.shape[1])
        check_ids(ids_NL, self.path, module.model.config.get_text_config().vocab_size)
        return ids_NL[: self.num_sequences]
