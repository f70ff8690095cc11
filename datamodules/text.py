"""Calibration on windows of text: of a local file, or of a data set of the hub."""

from pathlib import Path
from typing import Any

from torch import Tensor
from typing_extensions import override

from datamodules.calibration import CalibrationDataModule, check_positions
from moeq.disk.texts import as_text, is_chat, read_documents, token_stream
from moeq.fit.memory import DataShape
from moeq.sampling.chats import chat_renderer
from moeq.sampling.given_ids import check_ids
from moeq.sampling.text import cut_windows, overlap, window_starts


class TextDataModule(CalibrationDataModule):
    """Windows of any text for comparison with self-sampled sequences.

    Args:
        path: A local .txt or .jsonl file, gzipped or not; documents are separated by the end-of-text token.
        dataset: Or a data set of the hub, such as wikitext; its rows are joined by empty lines, as in the GPTQ papers.
        dataset_config: Configuration of the data set, such as wikitext-2-raw-v1.
        split: Split of the data set.
        field: Field of a .jsonl file, or column of the data set, that holds the text; chats, which are lists of
            {role, content} such as "messages", go through the chat template of the tokenizer.
        num_windows: Windows to calibrate on.
        length: Tokens per window.
        seed: Of the choice of windows.
        batch_size: Windows per step.
    """

    def __init__(
        self,
        path: str | None = None,
        dataset: str | None = None,
        dataset_config: str | None = None,
        split: str = "train",
        field: str = "text",
        num_windows: int = 128,
        length: int = 512,
        seed: int = 0,
        batch_size: int = 8,
    ) -> None:
        super().__init__(batch_size)
        if (path is None) == (dataset is None):
            raise ValueError(f"give either path or dataset, not both and not neither (path {path}, dataset {dataset})")
        for name, value in {"num_windows": num_windows, "length": length}.items():
            if value < 1:
                raise ValueError(f"{name} ({value}) must be positive; the usual values are 128 windows of 512 tokens")
        self.path, self.dataset, self.dataset_config = path, dataset, dataset_config
        self.split, self.field = split, field
        self.num_windows, self.length, self.seed = num_windows, length, seed

    @override
    def shape(self) -> DataShape:
        return DataShape(self.num_windows, self.length, self.batch_size)

    @override
    def make_ids(self) -> Tensor:
        source = str(self.path or self.dataset)
        config = self._module.model.config
        check_positions(config, self.length)
        try:
            ids_T = self._stream()
            starts_N = window_starts(ids_T.numel(), self.length, self.num_windows, self.seed)
        except ValueError as error:
            raise ValueError(f"calibration text {source}: {error}") from error
        if repeated := overlap(starts_N, self.length, ids_T.numel()):
            self._tell(source, "calibration windows overlap", repeated)
        ids_NL = cut_windows(ids_T, starts_N, self.length)
        check_ids(ids_NL, f"calibration text {source}", config.get_text_config().vocab_size)
        return ids_NL

    def _stream(self) -> Tensor:
        tokenizer = self._module.tokenizer
        render = chat_renderer(tokenizer)
        if self.path is not None:
            return token_stream(read_documents(Path(self.path), self.field, render), tokenizer)
        assert self.dataset is not None
        rows = load_rows(self.dataset, self.dataset_config, self.split, self.field)
        chats = is_chat(rows[0]) if rows else False
        texts = [as_text(row, f"row {index}, column {self.field!r}", render) for index, row in enumerate(rows)]
        return token_stream(texts if chats else ["\n\n".join(texts)], tokenizer, ends=chats)


def load_rows(dataset: str, config: str | None, split: str, field: str) -> list[Any]:
    """One column of a data set of the hub (or of its local copy), as it is.

    Raises:
        ValueError: There is no such data set, configuration, split or column, or the hub cannot be reached.
    """
    from datasets import load_dataset

    try:
        rows = load_dataset(dataset, config, split=split)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"dataset {dataset!r} (config {config}, split {split}) could not be loaded: {error}; "
            "check its name, or give path to a local file"
        ) from error
    if field not in rows.column_names:
        raise ValueError(f"field {field!r} is not one of the columns {rows.column_names} of {dataset}; choose one")
    return list(rows[field])
