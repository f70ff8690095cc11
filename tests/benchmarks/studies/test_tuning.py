"""The study of tuning end to end: its arms, and that one leaves nothing behind for the next."""

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.lab.trial import fit
from benchmarks.studies.tuning import ARMS, AS_SOLVED, STARTS, Case, Collected, Solved, TuningStudy, show, tuned
from callbacks.bit_allocation import BitAllocation
from callbacks.gptq import GPTQ
from callbacks.hessian_calibration import HessianCalibration
from moeq.checkpoint.loading import load_model
from moeq.disk.waiting import WaitingStates
from moeq.models.adapter import Adapter
from moeq.tuning.originals import read_batch, record_originals
from moeq.tuning.tuning_spec import TuningSpec
from tests.tiny import save_tiny

SETTINGS: dict[str, Any] = {"num_sequences": 640, "length": 16, "batch_size": 16, "num_checks": 8, "recompute": False}


def ids_of(seed: int, num_sequences: int) -> Tensor:
    return torch.randint(1, 200, (num_sequences, 16), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def solved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Solved, Path]:
    """A Mixtral at 2 bits, and what its original says."""
    folder = tmp_path_factory.mktemp("solved")
    save_tiny("mixtral", folder)
    original = Adapter(load_model(str(folder), "auto"))
    record_originals(original, ids_of(1, 640), 16, folder / "originals", {}, WaitingStates(1 << 20, folder), show)
    collected = Collected()
    steps = [BitAllocation(), HessianCalibration(), GPTQ(), collected]
    module = fit(ids_of(0, 8), steps, name=str(folder), bits=2, group_size=16)
    return Solved(module, collected.blocks), folder / "originals"


def parameters(solved: Solved) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in solved.module.model.named_parameters()}


@torch.no_grad()
def divergence(solved: Solved, originals: Path) -> float:
    """KL(original || model) of the sequences that are held out, by two ordinary forward passes."""
    ids_BT = torch.cat([read_batch(originals, batch)[0] for batch in range(TuningSpec(**SETTINGS).num_held_out)])
    original = load_model(str(originals.parent), "auto")(ids_BT).logits.float().log_softmax(-1)
    log_BTV = solved.module.model(ids_BT).logits.float().log_softmax(-1)
    return float((original.exp() * (original - log_BTV)).sum(-1).mean())


def test_every_block_is_collected(solved: tuple[Solved, Path]) -> None:
    assert sorted(solved[0].blocks) == list(range(len(solved[0].module.adapter.blocks)))
    names = {name for weights in solved[0].blocks.values() for name in weights}
    assert names == set(solved[0].module.run.plan)


@pytest.mark.parametrize("arm", ["scales", "all"])
def test_an_arm_leaves_its_best_state_in_the_model_and_the_next_one_begins_anew(
    arm: str, solved: tuple[Solved, Path]
) -> None:
    model, originals = solved
    before = parameters(model)
    rates = {**ARMS[arm], "scale_rate": 0.005} | ({"level_rate": 0.05} if arm == "all" else {})
    found = tuned(model, TuningSpec(**SETTINGS, **rates), originals)
    assert found["best"] < found["before"]
    assert (found["codes_changed"] > 0) == (arm == "all")
    assert divergence(model, originals) == pytest.approx(found["best"], rel=1e-3)
    after = parameters(model)
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed
    assert ("norm" in " ".join(changed)) == (arm == "all")
    model.restore()
    assert all(torch.equal(value, before[name]) for name, value in parameters(model).items())
    again = tuned(model, TuningSpec(**SETTINGS, **rates), originals)
    assert {**again, "seconds": 0} == {**found, "seconds": 0}
    assert all(torch.equal(value, after[name]) for name, value in parameters(model).items())
    model.restore()


def test_all_arms_learn_from_as_many_steps() -> None:
    study = TuningStudy(Namespace(seeds=[0, 1], starts=list(STARTS), arms=list(ARMS), num_steps=64))
    assert {study.spec(arm).num_steps(1) for arm in ARMS} == {64}
    assert len({study.spec(arm) for arm in ARMS if arm != AS_SOLVED}) == len(ARMS) - 1
    cases = study.cases()
    assert cases[: len(ARMS)] == [Case(0, STARTS[0], arm, 64) for arm in ARMS]
    assert len(cases) == 4 * len(ARMS)


def test_arms_are_compared_with_their_own_start() -> None:
    def row(seed: int, arm: str, kl: float) -> dict[str, Any]:
        found = {} if arm == AS_SOLVED else {"before": 2.0, "best": 1.0, "codes_changed": 0.01, "seconds": 5.0}
        domain = {"kl": kl, "router_agreement": 0.9}
        return {"seed": seed, "start": STARTS[0], "arm": arm, "domains": {"prose": domain}, **found}

    rows = [row(0, AS_SOLVED, 0.04), row(1, AS_SOLVED, 0.02), row(0, "scales", 0.02), row(1, "scales", 0.02)]
    text = TuningStudy(Namespace()).report(rows)
    assert (
        f"| {STARTS[0]} | {AS_SOLVED} | 2 | 30.00 +- 14.14 | 30.00 +- 14.14 | 1.000 +- 0.000 | 90.0 +- 0.0 |  |  |  |"
        in text
    )
    assert "| 0.750 +- 0.354 | 90.0 +- 0.0 | 0.500 +- 0.000 | 1.00 +- 0.00% | 5 +- 0 |" in text
