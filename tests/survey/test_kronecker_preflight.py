"""What is foreseen of Kronecker factors is what their sums and their files take."""

from dataclasses import replace
from pathlib import Path

import torch

from moeq.disk.waiting import WaitingStates
from moeq.fit.factors import Factors
from moeq.fit.preflight import fit_phases
from moeq.fit.run import Needs
from moeq.models.adapter import Adapter
from moeq.quant.two_sided_solve import TwoSidedSpec
from moeq.survey.kronecker import BlockSums, gather_factors, rank_batches
from moeq.survey.kronecker_preflight import factor_bytes, kronecker_phases
from moeq.survey.kronecker_spec import KroneckerSpec
from moeq.survey.sweeps import unseen
from tests.fit.test_preflight import work_of
from tests.tiny import tiny_model

CPU = torch.device("cpu")


def test_sums_and_files_are_as_large_as_foreseen(tmp_path: Path) -> None:
    work = replace(work_of(), adapter=Adapter(tiny_model("qwen2_moe")))
    (phase,) = kronecker_phases(work, KroneckerSpec())
    made = [BlockSums(work.adapter.sites(block), CPU).of.values() for block in range(len(work.adapter.blocks))]
    largest = max(
        sum(state.sum_EII.nbytes for factors in block for state in (factors.output, factors.input)) for block in made
    )
    (moment,) = phase.moments
    assert moment.device["sums"] == largest
    factors, batches = Factors(tmp_path, {}, TwoSidedSpec()), rank_batches(torch.ones(2, 4, dtype=torch.int64), 2, CPU)
    blocks = list(range(len(made)))
    gather_factors(work.adapter, batches, blocks, factors, 0, WaitingStates(0, tmp_path), CPU, unseen)
    on_disk = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert phase.disk == factor_bytes(work)
    assert 0 <= on_disk - phase.disk < 20_000  # headers and numbers of tokens


def test_solving_with_factors_holds_more_than_without() -> None:
    held = [
        moment.device
        for needs in (Needs(), Needs(factors=True))
        for phase in fit_phases(work_of(needs=needs))
        for moment in phase.moments
        if phase.label == "block 0 mlp_in solve"
    ]
    assert "factors to solve" not in held[0]
    assert held[1]["factors to solve"] > held[1]["Hessians to solve"]
