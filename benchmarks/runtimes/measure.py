"""One model through every format and runtime: a row for each cell and runtime."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch

from benchmarks.lab.tables import Row
from benchmarks.runtimes.cells import REFERENCE, REFERENCE_GRIDS, TINY_GRIDS, UNQUANTIZED, Cell
from benchmarks.runtimes.exports import (
    Source,
    dequantized_in_file,
    log_probabilities,
    open_reference,
    write_packed,
)
from benchmarks.runtimes.judge import agreement, bound, judge
from benchmarks.runtimes.opened import Answer, Job, why_not_transformers
from benchmarks.runtimes.rounding import rounding_by_token, rounding_of
from benchmarks.runtimes.runtime import Runtime
from moeq.checkpoint.loading import DType
from moeq.export.contents import read_contents
from moeq.formats.convert import convert
from moeq.formats.source import PackedExport
from moeq.quant.carrier import FORMATS


class Measurement:
    """Exports of one model, and what transformers computes with their values.

    Args:
        source: The model.
        folder: Where exports are written.
        only: Keys of the grids that are measured; None is all.
    """

    def __init__(self, source: Source, folder: Path, only: Collection[str] | None = None) -> None:
        self._source, self._folder, self._only = source, folder, only
        self._exports: dict[str, PackedExport] = {}
        self._ours: dict[tuple[str, str, frozenset[str]], torch.Tensor] = {}

    def cells(self) -> list[Cell]:
        """What is exported; grids with zero points in both modes."""
        name = self._source.name
        every = (UNQUANTIZED, *(REFERENCE_GRIDS if name == REFERENCE else TINY_GRIDS))
        keys = [key for key in every if self._only is None or key in self._only]
        cells = [Cell(name, key, each) for each in FORMATS for key in keys]
        return cells + [
            replace(cell, carrier="native") for cell in cells if cell.format != "gptq" and "zero points" in cell.grids
        ]

    def rows(self, runtimes: Sequence[Runtime], known: Sequence[Row] = ()) -> list[Row]:
        """One for each cell and runtime that opens it, but for those that are known."""
        opened = [runtime for runtime in runtimes if runtime.opens(self._source.name)]
        done = {_key(row) for row in known}
        folders: dict[Cell, Path] = {}
        rows: list[Row] = []
        for cell in self.cells():
            readers = [each for each in opened if each.format == cell.format and not _is_source(cell, each)]
            readers = [each for each in readers if _key(_row(cell, each, "")) not in done]
            path = self._convert(cell) if readers else ""
            if isinstance(path, Path):
                folders[cell] = path
            else:
                rows += [_row(cell, runtime, "refused by moeq", reason=path) for runtime in readers]
        for runtime in opened:
            own = {cell: self._source.folder for cell in self.cells() if _is_source(cell, runtime)}
            made = {cell: path for cell, path in folders.items() if cell.format == runtime.format}
            given = own | {cell: path for cell, path in made.items() if cell not in own}
            left = {cell: path for cell, path in given.items() if _key(_row(cell, runtime, "")) not in done}
            rows += self._open(runtime, left, _own_noise(known, runtime)) if left else []
        return rows

    def _convert(self, cell: Cell) -> Path | str:
        """The folder of a cell, or why moeq refuses it."""
        folder = self._folder / f"{cell.format}_{cell.carrier}_{cell.grids.replace(' ', '_').replace(',', '')}"
        try:
            convert(self._packed(cell.grids).folder, cell.format, folder, carrier=cell.carrier, overwrite=True)
        except ValueError as error:
            return str(error).replace(str(self._folder), "FOLDER")
        return folder

    def _open(self, runtime: Runtime, folders: dict[Cell, Path], own_noise: float) -> Iterable[Row]:
        if (reason := runtime.missing()) is not None:
            return [_row(cell, runtime, "absent", reason=reason) for cell in folders]
        rows, given = [], dict(folders)
        if runtime.name == "transformers":
            for cell, folder in folders.items():
                if (reason := why_not_transformers(folder)) is not None:
                    del given[cell]
                    rows.append(_row(cell, runtime, "refused by moeq", reason=reason))
        jobs = [Job(folder, self._source.ids_NL, self._export(cell, runtime)) for cell, folder in given.items()]
        for cell, answer in zip(given, runtime.run(jobs), strict=True):  # the unquantized one comes first
            row = self._judge(cell, runtime, answer, own_noise)
            own_noise = row["kl"] if cell.grids == UNQUANTIZED and "kl" in row else own_noise
            rows.append(row)
        return rows

    def _judge(self, cell: Cell, runtime: Runtime, answer: Answer, own_noise: float) -> Row:
        if isinstance(answer, str):
            return _row(cell, runtime, "refused by the runtime", reason=answer)
        ours_NLV = self._log_probabilities(cell, runtime)
        alike_NLV = self._in_arithmetic(cell, runtime)
        try:
            found, rest = agreement(ours_NLV, answer), agreement(alike_NLV, answer)
        except ValueError as error:
            return _row(cell, runtime, "wrong", reason=str(error))
        predicted = agreement(ours_NLV, alike_NLV).kl
        largest = bound([own_noise, predicted])
        numbers = {
            **asdict(found),
            "bound": largest,
            "own_noise": own_noise,
            "predicted_noise": predicted,
            "rest": rest.kl,
        }
        return _row(cell, runtime, judge(found, largest)) | numbers

    def _in_arithmetic(self, cell: Cell, runtime: Runtime) -> torch.Tensor:
        """What transformers computes in the arithmetic of a runtime."""
        if runtime.arithmetic == "float32":
            return self._log_probabilities(cell, runtime)
        export, ids_NL, rounded = self._export(cell, runtime), self._source.ids_NL, self._rounded(cell, runtime)
        dtype: DType = "float32" if runtime.arithmetic == "rounded blocks" else "bfloat16"
        model = open_reference(self._source, export, cell, rounded, dtype)
        if runtime.arithmetic == "bfloat16":
            return log_probabilities(model, ids_NL)
        by_token = runtime.arithmetic == "rounded tokens"
        with rounding_by_token(model, export) if by_token else rounding_of(model, export, cell.carrier):
            return log_probabilities(model, ids_NL)

    def _export(self, cell: Cell, runtime: Runtime) -> PackedExport:
        """What a runtime opens, as a packed export; the source has no quantized weight."""
        if not _is_source(cell, runtime):
            return self._packed(cell.grids)
        return PackedExport(self._source.folder, read_contents(self._source.folder))

    def _packed(self, key: str) -> PackedExport:
        if key not in self._exports:
            name = f"packed_{key.replace(' ', '_').replace(',', '')}"
            self._exports[key] = write_packed(self._source, key, self._folder / name)
        return self._exports[key]

    def _log_probabilities(self, cell: Cell, runtime: Runtime) -> torch.Tensor:
        """What transformers computes in float32 with the values that a runtime has."""
        rounded = self._rounded(cell, runtime)
        export = self._export(cell, runtime)
        key = (str(export.folder), cell.format if cell.carrier == "native" else "", rounded)
        if key not in self._ours:
            model = open_reference(self._source, export, cell, rounded)
            self._ours[key] = log_probabilities(model, self._source.ids_NL)
        return self._ours[key]

    def _rounded(self, cell: Cell, runtime: Runtime) -> frozenset[str]:
        export = self._export(cell, runtime)
        return frozenset(export.grids) if runtime.rounded else dequantized_in_file(export, cell)


def _is_source(cell: Cell, runtime: Runtime) -> bool:
    return runtime.opens_source and runtime.format == cell.format and cell.grids == UNQUANTIZED


def _key(row: Row) -> tuple[str, ...]:
    return row["grids"], row["format"], row["carrier"], row["runtime"]


def _own_noise(known: Sequence[Row], runtime: Runtime) -> float:
    """Divergence of the runtime's run of the unquantized model, where it is known."""
    found = [row for row in known if row["runtime"] == runtime.name and row["grids"] == UNQUANTIZED]
    return next((row["kl"] for row in found if "kl" in row), 0.0)


def _row(cell: Cell, runtime: Runtime, verdict: str, *, reason: str = "") -> Row:
    return {**asdict(cell), "runtime": runtime.name, "verdict": verdict, "reason": " ".join(reason.split())[:600]}
