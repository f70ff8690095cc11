"""Options of the Trainer that would change numbers unseen are refused, whoever makes the Trainer."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.accelerators import MPSAccelerator

import moeq.trainer_options
from main import main
from moeq.module import MoEQuantModule
from moeq.trainer_options import (
    REFUSED,
    default_device,
    is_alone,
    numeric_switches,
    refuse_device,
    refuse_options,
    refuse_trainer,
)

QUIET = ["--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"]
CHANGED: dict[str, Any] = {
    "precision": "bf16-mixed", "fast_dev_run": True, "overfit_batches": 2, "use_distributed_sampler": True,
    "max_epochs": 3, "min_epochs": 1, "max_steps": 10, "min_steps": 1, "max_time": "00:01:00:00",
    "accumulate_grad_batches": 2, "gradient_clip_val": 0.5, "gradient_clip_algorithm": "norm",
    "reload_dataloaders_every_n_epochs": 1,
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_each_is_refused_with_what_to_do_and_its_default_is_not(name: str) -> None:
    commands, harmless, reason = REFUSED[name]
    for command in ("fit", "validate"):
        for value in harmless:
            refuse_options(command, {name: value})
        if command in commands:
            with pytest.raises(ValueError, match=f"--trainer.{name} .* cannot be honoured by {command}: ") as error:
                refuse_options(command, {name: CHANGED[name]})
            assert str(error.value).endswith(reason)
        else:
            refuse_options(command, {name: CHANGED[name]})


@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed", "bf16-true", "16-true", "64-true", 16, "bf16", 64])
@pytest.mark.parametrize("command", ["fit", "validate"])
def test_no_precision_but_the_default_is_taken(command: str, precision: str | int) -> None:
    with pytest.raises(ValueError, match=r"--model.dtype for weights and exports, --model.compute_dtype for products"):
        refuse_options(command, {"precision": precision})


def test_data_of_no_batch_are_refused() -> None:
    with pytest.raises(ValueError, match="limit_train_batches 0 calibrates on nothing"):
        refuse_options("fit", {"limit_train_batches": 0})
    for some in (None, 1.0, 3, 0.5):
        refuse_options("fit", {"limit_train_batches": some})


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--trainer.precision=bf16-mixed", "moeq: --trainer.precision bf16-mixed cannot be honoured by fit"),
        ("--trainer.max_steps=3", "moeq: --trainer.max_steps 3 cannot be honoured by fit"),
        ("--ckpt_path=last", "moeq: --ckpt_path last cannot be honoured: models are given by --model.name"),
    ],
)
def test_the_command_line_refuses_before_anything_is_written(option: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=message):
        main(["fit", "--config=configs/rtn_w3.yaml", *QUIET, f"--trainer.default_root_dir={tmp_path / 'run'}", option])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
def test_a_trainer_of_ones_own_is_refused_alike(precision: str, tmp_path: Path) -> None:
    own: dict[str, Any] = {"accelerator": "cpu", "logger": False, "default_root_dir": tmp_path}
    module = MoEQuantModule(name="none")
    module.trainer = L.Trainer(precision=precision, enable_checkpointing=False, max_epochs=-1, **own)
    with pytest.raises(ValueError, match=f"precision {precision} of the Trainer cannot be honoured"):
        module.setup("fit")
    refuse_trainer(L.Trainer(enable_checkpointing=False, **own))
    with pytest.raises(ValueError, match=r"DDPStrategy needs a model that is trained; set --trainer.strategy moeq_ddp"):
        refuse_trainer(L.Trainer(enable_checkpointing=False, devices=2, strategy="ddp", **own))


def test_a_device_without_float64_is_not_chosen_and_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert default_device("auto") == ("auto", None)
    monkeypatch.setattr(MPSAccelerator, "is_available", lambda: True)
    device, fallback = default_device("auto")
    assert device == "cpu"
    assert fallback is not None
    assert "no float64" in fallback.detail
    assert default_device("mps") == ("mps", None)

    def zeros(*_: Any, **__: Any) -> None:
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype")

    refuse_device(torch.device("cpu"))
    monkeypatch.setattr(moeq.trainer_options.torch, "zeros", zeros)
    with pytest.raises(ValueError, match=r"mps has no float64, which sums need; set --trainer.accelerator cpu"):
        refuse_device(torch.device("mps"))


def test_switches_of_torch_count_where_they_are_on() -> None:
    assert numeric_switches() == {}
    torch.use_deterministic_algorithms(True)
    try:
        assert numeric_switches() == {"deterministic": True}
    finally:
        torch.use_deterministic_algorithms(False)


def test_one_process_is_told_from_several() -> None:
    assert is_alone({"devices": 1, "strategy": "auto", "num_nodes": 1, "plugins": None})
    assert is_alone({"devices": [3]})
    for several in ({"devices": 2}, {"devices": 1, "strategy": "moeq_ddp"}, {"devices": 1, "num_nodes": 2}):
        assert not is_alone(several)


def test_the_variables_of_a_batch_system_do_not_make_one_process_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {
        "SLURM_NTASKS": "4",
        "SLURM_JOB_NAME": "night",
        "SLURM_JOB_ID": "7",
        "SLURM_PROCID": "3",
    }.items():
        monkeypatch.setenv(name, value)
    run = f"--trainer.default_root_dir={tmp_path / 'run'}"
    with pytest.raises(SystemExit, match="moeq: no model found at 'none'"):
        main(["fit", "--config=configs/rtn_w3.yaml", "--model.name=none", *QUIET, run])
    with pytest.raises(SystemExit, match=r"moeq: .*--ntasks=4.*of Lightning's Trainer"):
        main(["fit", "--config=configs/rtn_w3.yaml", *QUIET, run, "--trainer.devices=2", "--trainer.strategy=moeq_ddp"])
