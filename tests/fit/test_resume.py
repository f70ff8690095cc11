"""A fit that is killed continues, and two ranks give the codes of one; each in processes of its own."""

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
import yaml

from moeq.allocation.evidence import read_evidence
from moeq.export.moeq_format import read_quantized
from moeq.sampling.store import load_sampled
from tests.processes import TWO_RANKS, run
from tests.test_main import QUIET, fit, small_data
from tests.tiny import save_tiny

CONFIG = Path("configs/moequant_w3.yaml")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("qwen2_moe", tmp_path_factory.mktemp("resume") / "model", num_hidden_layers=4)


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was never interrupted; tests change copies only."""
    folder = tmp_path_factory.mktemp("resume") / "whole"
    fit(CONFIG, model, folder)
    return folder


@pytest.fixture
def unexported(whole: Path, tmp_path: Path) -> Path:
    """The same run without what it exported."""
    folder = tmp_path / "unexported"
    shutil.copytree(whole, folder, ignore=shutil.ignore_patterns("export", "dense"))
    return folder


def arguments(config: Path, model: Path, folder: Path) -> list[str]:
    options = ["--model.name", str(model), "--model.group_size=16", "--trainer.default_root_dir", str(folder)]
    return ["fit", "--config", str(config), *options, *small_data(config), *QUIET]


def killing_config(folder: Path, killer: str = "KillAtBlock", **options: int) -> Path:
    """The configuration with a killer added to its callbacks."""
    config = yaml.safe_load(CONFIG.read_text())
    config["trainer"]["callbacks"].append({"class_path": f"tests.killer.{killer}", "init_args": options})
    path = folder / "moequant_killing.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def test_a_killed_run_continues_and_ends_with_the_same_bytes(model: Path, whole: Path, tmp_path: Path) -> None:
    killed = run(arguments(killing_config(tmp_path, block=2), model, tmp_path / "killed"))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert sorted(p.name for p in (tmp_path / "killed/blocks").iterdir()) == [
        "block_000.safetensors", "block_001.safetensors"
    ]  # fmt: skip
    assert not (tmp_path / "killed/export").exists()
    resumed = run(arguments(CONFIG, model, tmp_path / "killed"))
    assert resumed.returncode == 0, resumed.stderr
    assert "Resuming: blocks 0 to 1 of 4 are finished" in resumed.stdout + resumed.stderr
    for name in ("export/model.safetensors", "dense/model.safetensors", "allocation.json", "fallbacks.json"):
        assert (whole / name).read_bytes() == (tmp_path / "killed" / name).read_bytes(), name
    assert (whole / "errors.csv").read_text() == (tmp_path / "killed/errors.csv").read_text()


SAMPLING = ["--data.mode=corpus", "--data.sequences_at_once=2", "--data.num_sequences=6"]


def sampled_ids(folder: Path) -> torch.Tensor:
    (path,) = (folder / "calibration").glob("ebss-*.safetensors")
    return load_sampled(path).ids_NT


def test_a_run_killed_while_it_samples_continues_and_ends_with_the_same_ids(model: Path, tmp_path: Path) -> None:
    fit(CONFIG, model, tmp_path / "whole", *SAMPLING)
    killing = killing_config(tmp_path, "KillWhileSampling", num_parts=2)
    killed = run([*arguments(killing, model, tmp_path / "killed"), *SAMPLING])
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    calibration = tmp_path / "killed/calibration"
    assert len(list(calibration.glob("*.parts/*.safetensors"))) == 2
    assert not list(calibration.glob("*.safetensors"))
    fit(CONFIG, model, tmp_path / "killed", *SAMPLING)
    assert torch.equal(sampled_ids(tmp_path / "whole"), sampled_ids(tmp_path / "killed"))
    exports = [(tmp_path / name / "export/model.safetensors").read_bytes() for name in ("whole", "killed")]
    assert exports[0] == exports[1]


def test_two_ranks_sample_a_share_each_and_calibrate_on_the_whole_set(model: Path, tmp_path: Path) -> None:
    done = run([*arguments(CONFIG, model, tmp_path), *TWO_RANKS, "--data.batch_size=1", *SAMPLING])
    assert done.returncode == 0, done.stderr
    assert sampled_ids(tmp_path).shape == (6, 24)
    (usage, *_) = json.loads((tmp_path / "expert_usage.json").read_text()).values()
    assert sum(usage) == 6 * 24 * 2  # every sequence once, two experts per token


def test_a_run_killed_before_its_export_only_exports(model: Path, whole: Path, unexported: Path) -> None:
    blocks = {path.name: path.stat().st_mtime_ns for path in (unexported / "blocks").iterdir()}
    fit(CONFIG, model, unexported)
    assert {path.name: path.stat().st_mtime_ns for path in (unexported / "blocks").iterdir()} == blocks
    for name in ("export/model.safetensors", "dense/model.safetensors"):
        assert (unexported / name).read_bytes() == (whole / name).read_bytes(), name


def test_an_export_that_was_cut_short_is_written_again(
    model: Path, whole: Path, unexported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def power_cut(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("moeq.formats.exports.fill_dense", power_cut)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            fit(CONFIG, model, unexported)
    assert not (unexported / "export").exists()
    assert not (unexported / "dense").exists()
    fit(CONFIG, model, unexported)
    dense = "dense/model.safetensors"
    assert (unexported / dense).read_bytes() == (whole / dense).read_bytes()
    with pytest.raises(SystemExit, match="exists and is not empty"):
        fit(CONFIG, model, unexported)


def test_what_does_not_change_a_weight_does_not_stop_a_run_from_continuing(
    model: Path, whole: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(whole, folder)
    config = yaml.safe_load(CONFIG.read_text())
    export = next(c for c in config["trainer"]["callbacks"] if c["class_path"].endswith("Export"))
    export["init_args"] = {"overwrite": True, "formats": ["moeq"]}
    again = tmp_path / "moequant_again.yaml"
    again.write_text(yaml.safe_dump(config))
    weights = folder / "export/model.safetensors"
    before = weights.stat().st_mtime_ns
    fit(again, model, folder, "--model.label=again")
    assert weights.stat().st_mtime_ns > before
    assert weights.read_bytes() == (whole / "export/model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("option", "changed"),
    [("--model.bits=4", "configuration"), ("--data.seed=1", "calibration set"), ("--model.name", "model")],
)
def test_blocks_of_another_run_are_refused(
    option: str, changed: str, model: Path, unexported: Path, tmp_path: Path
) -> None:
    if option == "--model.name":
        other = save_tiny("qwen2_moe", tmp_path / "other", num_hidden_layers=4, seed=1)
        option = f"--model.name={other}"
    with pytest.raises(SystemExit, match=f"blocks of a run with another .*{changed}.*--model.restart true"):
        fit(CONFIG, model, unexported, option)
    assert not (unexported / "export").exists()
    fit(CONFIG, model, unexported, option, "--model.restart=true")
    assert (unexported / "export").is_dir()


def test_two_ranks_give_the_codes_of_one(model: Path, tmp_path: Path) -> None:
    # Corpus mode writes other sequences with other numbers of ranks.  In bfloat16 any other batch shows.
    same = ["--data.batch_size=1", "--data.mode=stochastic", "--model.compute_dtype=stored"]
    two = ["--trainer.devices=2", "--trainer.strategy=moeq_ddp", *same]
    done = run([*arguments(CONFIG, model, tmp_path / "two"), *two])
    assert done.returncode == 0, done.stderr
    fit(CONFIG, model, tmp_path / "one", *same)
    assert torch.equal(*(sampled_ids(tmp_path / name) for name in ("one", "two")))
    one, both = (read_quantized(tmp_path / name / "export") for name in ("one", "two"))
    assert one.keys() == both.keys()
    different = sum(int((one[name].codes_OI != both[name].codes_OI).sum()) for name in one)
    total = sum(weight.codes_OI.numel() for weight in one.values())
    assert different <= 0.001 * total
    for name in one:
        assert torch.equal(one[name].scale_OG, both[name].scale_OG)
    usage = [(tmp_path / name / "expert_usage.json").read_text() for name in ("one", "two")]
    assert usage[0] == usage[1]


def test_two_ranks_survey_and_allocate_as_one(model: Path, tmp_path: Path) -> None:
    config = yaml.safe_load(Path("configs/allocate_w25.yaml").read_text())
    config["model"]["clip_search"] = False
    # Of four batches three have backward passes: two of the first rank, one of the second.
    survey = {"costs": ["fisher", "fisher_kl", "gemq"], "choices": [2, 4], "num_gradient_batches": 3}
    survey["num_kl_batches"] = 1
    allocation = {"method": "allocate", "cost": "fisher", "budget": 2.6, "choices": [2, 4]}
    config["trainer"]["callbacks"] = [
        {"class_path": "callbacks.survey.Survey", "init_args": survey},
        {"class_path": "callbacks.bit_allocation.BitAllocation", "init_args": allocation},
    ]
    path = tmp_path / "allocate.yaml"
    path.write_text(yaml.safe_dump(config))
    done = run([*arguments(path, model, tmp_path / "two"), "--data.batch_size=1", *TWO_RANKS])
    assert done.returncode == 0, done.stderr
    fit(path, model, tmp_path / "one", "--data.batch_size=1")
    plans = [json.loads((tmp_path / name / "allocation.json").read_text()) for name in ("one", "two")]
    assert plans[0]["weights"] == plans[1]["weights"]
    assert {grid["bits"] for grid in plans[0]["weights"].values()} == {2, 4}
    one, both = (read_evidence(tmp_path / name / "survey.json") for name in ("one", "two"))
    for cost, table in one.costs.items():
        for weight, by_choice in table.items():
            assert both.costs[cost][weight] == pytest.approx(by_choice, rel=1e-3), (cost, weight)
    assert {path: counts.tolist() for path, counts in one.tokens.items()} == {
        path: counts.tolist() for path, counts in both.tokens.items()
    }
