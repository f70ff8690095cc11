"""Ranks give the codes of one, with whatever they have to do; one that ends otherwise ends all, with its own error."""

import json
import subprocess
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.processes import run
from tests.test_main import QUIET
from tests.tiny import save_tiny

pytestmark = pytest.mark.slow
FORKED = ["--trainer.strategy=moeq.strategy.UnwrappedDDPStrategy", "--trainer.strategy.start_method=fork"]
# Three batches: of two ranks the first has two of them.
FEW_TOKENS = {"class_path": "tests.on_ranks.FewTokens", "init_args": {"num_sequences": 3}}


def step(name: str, **arguments: Any) -> dict[str, Any]:
    return {"class_path": name, "init_args": arguments} if arguments else {"class_path": name}


def fit(
    steps: list[dict[str, Any]], model: Path, folder: Path, num_ranks: int, *options: str
) -> subprocess.CompletedProcess[str]:
    """Fit with GPTQ and some steps more, on a few tokens."""
    folder.mkdir(parents=True)
    path = folder.with_suffix(".yaml")
    callbacks = [step("ExpertUsage"), step("HessianCalibration"), step("GPTQ"), *steps, step("Record")]
    model_options = {"name": str(model), "group_size": 16, "bits": 3}
    trainer = {"callbacks": callbacks, "default_root_dir": str(folder), "devices": num_ranks}
    path.write_text(yaml.safe_dump({"model": model_options, "data": FEW_TOKENS, "trainer": trainer}))
    strategy = FORKED if num_ranks > 1 and not any("strategy" in option for option in options) else []
    return run(["fit", "--config", str(path), *QUIET, *strategy, *options])


def results(folder: Path) -> dict[str, bytes]:
    """What a run says about its weights."""
    names = ["errors.csv", "expert_usage.json", "fallbacks.json"]
    paths = [*(folder / name for name in names), *sorted((folder / "blocks").iterdir())]
    return {path.name: path.read_bytes() for path in paths}


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3", "gpt_oss"])
def test_ranks_with_disjoint_missing_and_uneven_experts_give_the_bytes_of_one(family: str, tmp_path: Path) -> None:
    model = save_tiny(family, tmp_path / "model", num_experts_per_tok=1)
    # Three ranks have a unit or two at most stages, and where they have a dense block but one; two have one per expert.
    cases = [(1, [], "memory"), (2, [step("tests.on_ranks.SmallUnits")], "memory"), (3, [], "stream")]
    for num_ranks, steps, placement in cases:
        steps = [*steps, step("tests.on_ranks.ReachedExperts")]
        done = fit(steps, model, tmp_path / str(num_ranks), num_ranks, f"--model.placement={placement}")
        assert done.returncode == 0, done.stderr
    one, two, three = (results(tmp_path / str(num_ranks)) for num_ranks in (1, 2, 3))
    assert [name for name in one if two[name] != one[name]] == []
    assert [name for name in one if three[name] != one[name]] == []
    (whole,), parts = reached(tmp_path / "1"), reached(tmp_path / "3")
    assert any(len(experts) < 8 for experts in whole.values()), "no expert is missing"
    for path, experts in whole.items():
        assert set.union(*(part[path] for part in parts)) == experts
    assert any(not one[path] & other[path] for path in whole for one, other in combinations(parts, 2)), "none disjoint"


def reached(folder: Path) -> list[dict[str, set[int]]]:
    """Experts that have tokens by their module, rank by rank."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("reached_*.json"))]
    return [{site: set(experts) for site, experts in sites.items()} for sites in found]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("qwen2_moe", tmp_path_factory.mktemp("ranks") / "model")


@pytest.mark.parametrize("how", ["mistake", "killed"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_ends_otherwise_ends_all_with_its_error(rank: int, how: str, model: Path, tmp_path: Path) -> None:
    failing = step("tests.on_ranks.FailOnRank", rank=rank, how=how)
    done = fit([failing], model, tmp_path / "run", 3)
    assert done.returncode != 0
    expected = {"mistake": f"ValueError: rank {rank} cannot go on; help it", "killed": f"moeq: rank {rank} was killed"}
    # The launcher of forked ranks names who was killed, too, and ends the others, maybe before they have read of it.
    named = how == "killed" and f"process {rank} terminated with signal SIGKILL" in done.stderr
    assert done.stderr.count(expected[how]) == 1 or (named and expected[how] not in done.stderr), done.stderr
    assert "gloo/transport" not in done.stderr


def test_ranks_in_processes_of_their_own_end_with_the_one_line_of_the_rank_that_failed(
    model: Path, tmp_path: Path
) -> None:
    failing = step("tests.on_ranks.FailOnRank", rank=1)
    done = fit([failing], model, tmp_path / "run", 2, "--trainer.strategy=moeq_ddp")
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("moeq: ")]
    assert lines == ["moeq: rank 1 cannot go on; help it"]
    assert "Traceback" not in done.stderr
