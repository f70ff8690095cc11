"""EndToEndTuning in a run: memory and stream give the same bytes, a killed tuning ends with them, too."""

import json
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from callbacks.end_to_end_tuning import EndToEndTuning
from callbacks.export import Export
from callbacks.gptq import GPTQ
from tests.processes import run
from tests.test_main import QUIET
from tests.tiny import save_tiny

SMALL = {
    "num_sequences": 32, "length": 16, "batch_size": 4, "num_epochs": 2, "sequences_at_once": 16, "num_checks": 2,
    "level_rate": 0.005, "scale_rate": 0.002,
}  # fmt: skip


def arguments(folder: Path, model: Path, *extra: dict[str, Any]) -> list[str]:
    """Of a small fit with tuning; its configuration is written beside the folder."""
    tuning = {"class_path": "EndToEndTuning", "init_args": SMALL}
    steps = [*({"class_path": name} for name in ("HessianCalibration", "GPTQ")), *extra, tuning]
    steps += [{"class_path": "Export"}, {"class_path": "Record"}]
    data = {"class_path": "tests.on_ranks.FewTokens", "init_args": {"num_sequences": 3}}
    options = {"name": str(model), "group_size": 16, "bits": 3}
    trainer = {"callbacks": steps, "default_root_dir": str(folder), "logger": False}
    path = folder.with_suffix(".yaml")
    path.write_text(yaml.safe_dump({"model": options, "data": data, "trainer": trainer}))
    return ["fit", "--config", str(path), *QUIET]


def results(folder: Path) -> dict[str, bytes]:
    """Every tensor file of a run, and what its tuning found."""
    paths = [*sorted(folder.rglob("*.safetensors")), folder / "tuning/tuned.json"]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def refused(callbacks: list[Any], world_size: int = 1) -> str:
    """What ``on_fit_start`` says of a list of callbacks."""
    step = next(each for each in callbacks if isinstance(each, EndToEndTuning))
    with pytest.raises(ValueError, match=";") as error:
        step.on_fit_start(SimpleNamespace(callbacks=callbacks, world_size=world_size), None)  # type: ignore[arg-type]
    return str(error.value)


def test_orders_and_ranks_that_cannot_work_are_refused_before_work() -> None:
    assert "put EndToEndTuning before Export" in refused([GPTQ(), Export(), EndToEndTuning()])
    assert "add a method such as GPTQ" in refused([EndToEndTuning(), Export()])
    few = EndToEndTuning(num_sequences=32, batch_size=16)
    assert "fewer batches than the 2 ranks" in refused([GPTQ(), few], world_size=2)


@pytest.mark.slow
def test_streamed_killed_and_repeated_runs_give_the_bytes_of_one_in_memory(tmp_path: Path) -> None:
    model = save_tiny("qwen2_moe", tmp_path / "model")
    whole, streamed, killed = (tmp_path / name for name in ("whole", "streamed", "killed"))
    assert run(arguments(whole, model)).returncode == 0
    record = json.loads((whole / "tuning/tuned.json").read_text())
    assert record["kept"]
    assert record["after"] < record["before"]
    expected = results(whole)
    assert {"tuning/blocks/block_001.safetensors", "export/model.safetensors"} <= expected.keys()
    done = run([*arguments(streamed, model), "--model.placement=stream"])
    assert done.returncode == 0, done.stderr
    assert results(streamed) == expected
    for name in ("batch_00003.safetensors", "tuned.json", "export"):
        killer = {"class_path": "tests.killer.KillBeforeName", "init_args": {"name": name}}
        done = run(arguments(killed, model, killer))
        assert done.returncode == -signal.SIGKILL, done.stderr
    done = run(arguments(killed, model))
    assert done.returncode == 0, done.stderr
    assert results(killed) == expected
    # A run that goes on when all is tuned has nothing left but to export.
    shutil.rmtree(killed / "export")
    shutil.rmtree(killed / "dense")
    done = run(arguments(killed, model))
    assert done.returncode == 0, done.stderr
    assert results(killed) == expected


@pytest.mark.slow
def test_two_ranks_agree_and_learn_from_batches_of_their_own(tmp_path: Path) -> None:
    model = save_tiny("qwen2_moe", tmp_path / "model")
    folder = tmp_path / "two"
    ranks = ["--trainer.devices=2", "--trainer.strategy=moeq.strategy.UnwrappedDDPStrategy"]
    done = run([*arguments(folder, model), *ranks, "--trainer.strategy.start_method=fork"])
    assert done.returncode == 0, done.stderr
    record = json.loads((folder / "tuning/tuned.json").read_text())
    assert record["kept"]
    assert record["steps"] == 6
    assert record["tokens"] == 6 * 2 * 4 * 16
