"""The study of learned costs: what scales them, what is read from a fit, and which cases there are."""

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.lab.trial import fit
from benchmarks.studies.learned_costs import LEARNED, SOLVED, WIDTHS, Case, LearnedCosts, Watched, learned_costs
from callbacks.bit_allocation import BitAllocation
from callbacks.gptq import GPTQ
from callbacks.hessian_calibration import HessianCalibration
from moeq.allocation.plan import Choice
from tests.allocation.toy import CHOICES, toy_costs, toy_weights
from tests.tiny import save_tiny

WEIGHTS = toy_weights()


def row(seed: int, costs: str, bits: float, kl: float) -> dict[str, Any]:
    domains = {"prose": {"kl": kl}, "python": {"kl": 3 * kl}}
    left = {"0": 0.5, "1": 0.25} if costs == "uniform" else {}
    return {"seed": seed, "costs": costs, "bits": bits, "left": left, "widths": {"3": 1.0}, "domains": domains}


def test_a_cost_falls_by_what_its_block_keeps_at_its_width() -> None:
    costs = toy_costs(WEIGHTS)
    left = {(choice.bits, weight.block): choice.bits + weight.block for choice in CHOICES for weight in WEIGHTS}
    scaled = learned_costs(costs, WEIGHTS, left)
    for weight in WEIGHTS:
        for choice in CHOICES:
            assert scaled[weight.name][choice] == costs[weight.name][choice] * (choice.bits + weight.block)
    with pytest.raises(KeyError):
        learned_costs({WEIGHTS[0].name: {Choice(7): 1.0}}, WEIGHTS, left)


def test_a_fit_tells_what_was_left_of_the_error_of_every_block(tmp_path: Path) -> None:
    save_tiny("mixtral", tmp_path)
    ids_NL = torch.randint(1, 200, (8, 16), generator=torch.Generator().manual_seed(0))
    watched = Watched()
    steps = [BitAllocation(), HessianCalibration(), GPTQ(), watched]
    module = fit(ids_NL, steps, name=str(tmp_path), bits=2, group_size=16)
    assert sorted(watched.left) == list(range(len(module.adapter.blocks)))
    assert all(0.0 < share <= 1.0 for share in watched.left.values())
    assert min(watched.left.values()) < 1.0


def test_uniform_fits_of_a_seed_come_before_the_plans_that_read_them() -> None:
    cases = LearnedCosts(Namespace(seeds=[3, 1], budgets=[3.0])).cases()
    assert cases[: len(WIDTHS)] == [Case(3, "uniform", float(bits)) for bits in WIDTHS]
    assert cases[len(WIDTHS) : len(WIDTHS) + 2] == [Case(3, SOLVED, 3.0), Case(3, LEARNED, 3.0)]
    assert [case.seed for case in cases] == [3] * (len(WIDTHS) + 2) + [1] * (len(WIDTHS) + 2)


def test_plans_are_compared_by_seed() -> None:
    rows = [
        row(0, SOLVED, 3.0, 0.01),
        row(0, LEARNED, 3.0, 0.02),
        row(1, SOLVED, 3.0, 0.02),
        row(1, LEARNED, 3.0, 0.02),
    ]
    text = LearnedCosts(Namespace()).report([*rows, row(0, "uniform", 2.0, 0.1)])
    assert "| 3 | 1.500 +- 0.707 |" in text
    assert f"| 3 | {LEARNED} | 2 | 0.0400 +- 0.0000 | 0.0600 +- 0.0000 | 0 +- 0 | 100 +- 0 |" in text
    assert "| 2 | 0.500 | 0.250 |" in text
