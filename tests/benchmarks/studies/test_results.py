"""The Markdown of a result is what its JSON comes to."""

import json
from argparse import Namespace
from pathlib import Path

import pytest

from benchmarks.lab.study import Study
from benchmarks.speed import evaluation, sampling, solve
from benchmarks.studies.allocation import Allocation
from benchmarks.studies.calibration_data import CalibrationData
from benchmarks.studies.compressed_tensors import CompressedTensors
from benchmarks.studies.efficiency import Efficiency
from benchmarks.studies.gguf import Gguf
from benchmarks.studies.learned_costs import LearnedCosts
from benchmarks.studies.mlx import Mlx
from benchmarks.studies.one_bit_less import OneBitLess
from benchmarks.studies.outer_search import OuterSearch
from benchmarks.studies.peers import Peers
from benchmarks.studies.quantizers import Quantizers
from benchmarks.studies.rounding import Rounding
from benchmarks.studies.symmetric import Symmetric
from benchmarks.studies.tuning import TuningStudy
from benchmarks.studies.writers import Writers

RESULTS = Path(__file__).resolve().parents[3] / "benchmarks/results"


def read(stem: str) -> tuple[dict, str]:
    return json.loads((RESULTS / f"{stem}.json").read_text()), (RESULTS / f"{stem}.md").read_text()


@pytest.mark.parametrize(
    ("kind", "stem", "options"),
    [
        (CalibrationData, "calibration_data", {}),
        (Quantizers, "quantizers", {"peers": RESULTS / "peers.json"}),
        (Allocation, "allocation_reference", {"label": "reference", "folder": Path("runs")}),
        (Allocation, "allocation_mixtral", {"label": "Mixtral", "folder": Path("runs")}),
        (Efficiency, "efficiency", {}),
        (Peers, "peers", {}),
        (Peers, "peers_mixtral", {}),
        (Gguf, "gguf", {"label": "reference", "folder": Path("runs")}),
        (Gguf, "gguf_mixtral", {"label": "Mixtral", "folder": Path("runs")}),
        (CompressedTensors, "compressed_tensors", {"label": "reference", "folder": Path("runs")}),
        (CompressedTensors, "compressed_tensors_mixtral", {"label": "Mixtral", "folder": Path("runs")}),
        (Mlx, "mlx", {"label": "reference", "folder": Path("runs")}),
        (Mlx, "mlx_mixtral", {"label": "Mixtral", "folder": Path("runs")}),
        (LearnedCosts, "learned_costs", {}),
        (
            OuterSearch,
            "outer_search",
            {"label": "reference", "folder": Path("runs"), "others": RESULTS / "allocation_reference.json"},
        ),
        (OuterSearch, "outer_search_mixtral", {"label": "Mixtral", "folder": Path("runs"), "others": None}),
        (Rounding, "rounding", {}),
        (Symmetric, "symmetric", {}),
        (TuningStudy, "tuning", {}),
        (OneBitLess, "one_bit_less", {"peers": [RESULTS / "peers.json", RESULTS / "peers_mixtral.json"]}),
        (Writers, "writers_reference", {"label": "reference", "folder": Path("runs")}),
        (Writers, "writers_mixtral", {"label": "Mixtral", "folder": Path("runs")}),
    ],
)
def test_studies(kind: type[Study], stem: str, options: dict[str, object]) -> None:
    data, text = read(stem)
    # Allocation once called its rows entries.
    rows = data.get("rows") or data["entries"]
    assert kind(Namespace(**options)).markdown(data["origin"], rows, RESULTS / f"{stem}.png") == text


def test_speeds() -> None:
    data, text = read("sampling")
    assert sampling.speeds(data["rows"]) in text
    assert sampling.scaling(data["scaling"]) in text
    data, text = read("solve")
    assert solve.phases(data["rows"]) in text
    assert solve.against_peers(data["rows"], data["peers"]) in text
    data, text = read("evaluation")
    for model, tasks in data["results"].items():
        for task, found in tasks.items():
            sides = {side: tuple(evaluation.Seconds(*turn) for turn in found[side]) for side in ("harness", "moeq")}
            speed = evaluation.Speed(found["documents"], found["batch_size"], **sides, trials={})
            assert evaluation.report({model: {task: speed}}, "").splitlines()[-1] in text
