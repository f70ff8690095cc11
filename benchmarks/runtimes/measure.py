"""One model through every format and runtime: a row for each cell and runtime."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch

from benchmarks.lab.tables import Row
from benchmarks.runtimes.cells import REFERENCE, REFERENCE_GRIDS, TINY_GRIDS, UNQUANTIZED, Cell
from benchmarks.runtimes.exports import Source, log_probabilities, open_reference, write_packed
from benchmarks.runtimes.judge import agreement, bound, judge
from benchmarks.runtimes.opened import Answer, Job, is_kept_from_transformers
from benchmarks.runtimes.rounding import rounding_of
from benchmarks.runtimes.runtime import Runtime
from moeq.formats.convert import convert
from moeq.formats.source import PackedExport
from moeq.quant.carrier import FORMATS


class Measurement:
    """Exports of one model, and what transformers computes with their values.

    Args:
        source: The model.
        folder: Where exports are written.
    """

    def __init__(self, source: Source, folder: Path) -> None:
        self._source, self._folder = source, folder
        self._exports: dict[str, PackedExport] = {}
        self._ours: dict[tuple[str, bool], torch.Tensor] = {}

    def cells(self) -> list[Cell]:
        """What is exported; grids with zero points in both modes."""
        name = self._source.name
        keys = (UNQUANTIZED, *(REFERENCE_GRIDS if name == REFERENCE else TINY_GRIDS))
        cells = [Cell(name, key, each) for each in FORMATS for key in keys]
        return cells + [
            replace(cell, carrier="native") for cell in cells if cell.format != "gptq" and "zero points" in cell.grids
        ]

    def rows(self, runtimes: Sequence[Runtime]) -> list[Row]:
        """One for each cell and runtime that opens it."""
        opened = [runtime for runtime in runtimes if runtime.opens(self._source.name)]
        folders: dict[Cell, Path] = {}
        rows: list[Row] = []
        for cell in self.cells():
            readers = [runtime for runtime in opened if runtime.format == cell.format]
            made = self._convert(cell) if readers else ""
            if isinstance(made, Path):
                folders[cell] = made
            else:
                rows += [_row(cell, runtime, "refused by moeq", reason=made) for runtime in readers]
        for runtime in opened:
            rows += self._open(runtime, {cell: path for cell, path in folders.items() if cell.format == runtime.format})
        return rows

    def _convert(self, cell: Cell) -> Path | str:
        """The folder of a cell, or why moeq refuses it."""
        folder = self._folder / f"{cell.format}_{cell.carrier}_{cell.grids.replace(' ', '_').replace(',', '')}"
        try:
            convert(self._export(cell.grids).folder, cell.format, folder, carrier=cell.carrier)
        except ValueError as error:
            return str(error)
        return folder

    def _open(self, runtime: Runtime, folders: dict[Cell, Path]) -> Iterable[Row]:
        if (reason := runtime.missing()) is not None:
            return [_row(cell, runtime, "absent", reason=reason) for cell in folders]
        rows, given = [], dict(folders)
        if runtime.name == "transformers":
            for cell, folder in folders.items():
                if is_kept_from_transformers(folder):
                    del given[cell]
                    reason = "transformers reads one scheme for all experts of a model; config.json stops it"
                    rows.append(_row(cell, runtime, "refused by moeq", reason=reason))
        jobs = [Job(folder, self._source.ids_NL, self._export(cell.grids)) for cell, folder in given.items()]
        own_noise = 0.0
        for cell, answer in zip(given, runtime.run(jobs), strict=True):  # the unquantized one comes first
            row = self._judge(cell, runtime, answer, own_noise)
            own_noise = row["kl"] if cell.grids == UNQUANTIZED and "kl" in row else own_noise
            rows.append(row)
        return rows

    def _judge(self, cell: Cell, runtime: Runtime, answer: Answer, own_noise: float) -> Row:
        if isinstance(answer, str):
            return _row(cell, runtime, "refused by the runtime", reason=answer)
        ours_NLV = self._log_probabilities(cell.grids, rounded=runtime.rounded)
        alike_NLV = self._in_arithmetic(cell, runtime)
        try:
            found, rest = agreement(ours_NLV, answer), agreement(alike_NLV, answer)
        except ValueError as error:
            return _row(cell, runtime, "wrong", reason=str(error))
        predicted = agreement(ours_NLV, alike_NLV).kl
        largest = bound([own_noise, predicted])
        numbers = {
            **asdict(found), "bound": largest, "own_noise": own_noise, "predicted_noise": predicted, "rest": rest.kl
        }
        return _row(cell, runtime, judge(found, largest)) | numbers

    def _in_arithmetic(self, cell: Cell, runtime: Runtime) -> torch.Tensor:
        """What transformers computes in the arithmetic of a runtime."""
        if runtime.arithmetic == "float32":
            return self._log_probabilities(cell.grids, rounded=runtime.rounded)
        export, ids_NL = self._export(cell.grids), self._source.ids_NL
        if runtime.arithmetic == "bfloat16":
            model = open_reference(self._source, export, rounded=True, dtype="bfloat16")
            return log_probabilities(model, ids_NL)
        model = open_reference(self._source, export, rounded=False)
        with rounding_of(model, export, cell.carrier):
            return log_probabilities(model, ids_NL)

    def _export(self, key: str) -> PackedExport:
        if key not in self._exports:
            name = f"packed_{key.replace(' ', '_').replace(',', '')}"
            self._exports[key] = write_packed(self._source, key, self._folder / name)
        return self._exports[key]

    def _log_probabilities(self, key: str, *, rounded: bool) -> torch.Tensor:
        if (key, rounded) not in self._ours:
            model = open_reference(self._source, self._export(key), rounded=rounded)
            self._ours[key, rounded] = log_probabilities(model, self._source.ids_NL)
        return self._ours[key, rounded]


def _row(cell: Cell, runtime: Runtime, verdict: str, *, reason: str = "") -> Row:
    return {**asdict(cell), "runtime": runtime.name, "verdict": verdict, "reason": " ".join(reason.split())[:600]}
