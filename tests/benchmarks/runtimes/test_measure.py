"""A model through one format: what a runtime answers is judged, what moeq refuses is not run."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.runtimes import exports, measure
from benchmarks.runtimes.cells import TINY_GRIDS, Cell
from benchmarks.runtimes.exports import log_probabilities, open_reference, tiny_source
from benchmarks.runtimes.measure import Measurement
from benchmarks.runtimes.opened import Answer, Job
from benchmarks.runtimes.runtime import Runtime
from moeq.quant.spec import GridSpec

CELL = Cell("qwen3_moe", "4", "compressed-tensors")


def runtime(run: object, format_name: str = "compressed-tensors", missing: str | None = None) -> Runtime:
    return Runtime("it", format_name, "float32", True, False, None, lambda: missing, lambda: "it 1", run)  # type: ignore[arg-type]


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Measurement:
    grids = {"4": TINY_GRIDS["4"], "channels of an odd kind": lambda name, block: GridSpec(4, 16, True)}
    monkeypatch.setattr(measure, "TINY_GRIDS", grids)
    monkeypatch.setattr(exports, "TINY_GRIDS", grids)
    return Measurement(tiny_source("qwen3_moe", tmp_path / "source", 0), tmp_path)


def test_answers_are_judged_and_refusals_named(measured: Measurement, tmp_path: Path) -> None:
    source = tiny_source("qwen3_moe", tmp_path / "same", 0)

    def run(jobs: Sequence[Job]) -> list[Answer]:
        """The unquantized model as it is, the other one with an expert that was exchanged for another."""
        answers = []
        for job in jobs:
            model = open_reference(source, job.export, CELL, list(job.export.grids))
            if len(job.export.grids) > 1:
                with torch.no_grad():
                    model.get_parameter("model.layers.0.mlp.experts.down_proj")[:2] = 0
            answers.append(log_probabilities(model, job.ids_NL))
        return answers

    rows = {row["grids"]: row for row in measured.rows([runtime(run)])}
    assert rows["unquantized"]["verdict"] == "right"
    assert rows["unquantized"]["kl"] == pytest.approx(0, abs=1e-9)
    assert rows["4"]["verdict"] == "wrong"
    assert rows["4"]["kl"] > 100 * rows["4"]["bound"]
    assert rows["channels of an odd kind"]["verdict"] == "refused by moeq"
    assert "groups of 16" in rows["channels of an odd kind"]["reason"]
    # What is known is not measured again, and its noise counts.
    known = rows["unquantized"] | {"kl": 100.0}
    again = {row["grids"]: row for row in measured.rows([runtime(run)], [known])}
    assert again.keys() == {"4", "channels of an odd kind"}
    assert (again["4"]["own_noise"], again["4"]["verdict"]) == (100.0, "right")
    assert measured.rows([runtime(run)], [*rows.values()]) == []


def test_what_a_runtime_raises_and_what_is_not_installed_have_their_reason(
    measured: Measurement, tmp_path: Path
) -> None:
    folders = []

    def run(jobs: Sequence[Job]) -> list[Answer]:
        folders.extend(job.folder.name for job in jobs)
        return ["no such layer"] * len(jobs)

    rows = measured.rows([replace(runtime(run), opens_source=True)])
    assert {row["reason"] for row in rows if row["verdict"] == "refused by the runtime"} == {"no such layer"}
    assert folders == ["source", "compressed-tensors_exact_4"]
    absent = measured.rows([runtime(None, missing="not installed")])
    assert [row["reason"] for row in absent if row["verdict"] == "absent"] == ["not installed"] * 2


def test_grids_with_zero_points_are_exported_in_both_modes(tmp_path: Path) -> None:
    source = exports.Source("reference", tmp_path, torch.zeros(1, 2, dtype=torch.int64))
    cells = Measurement(source, tmp_path).cells()
    assert Cell("reference", "4, zero points", "gguf", "native") in cells
    assert Cell("reference", "4, zero points", "gptq", "native") not in cells
    assert Cell("reference", "4", "gguf", "native") not in cells
