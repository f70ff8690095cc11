"""The base classes of callbacks: their order cannot matter, and a list that cannot work is refused at the start."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer

from callbacks.awq import AWQ
from callbacks.gptq import GPTQ
from callbacks.hessian_calibration import HessianCalibration
from callbacks.learned_rounding import LearnedRounding
from callbacks.router_calibration import RouterCalibration
from callbacks.rtn import RTN
from datamodules.text import TextDataModule
from moeq.callback import HookedStep, module_of
from moeq.module import MoEQuantModule
from moeq.quant.spec import QuantizedWeight
from tests.fit.test_resume import arguments
from tests.processes import TWO_RANKS, run
from tests.tiny import save_tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("qwen2_moe", tmp_path_factory.mktemp("callback") / "model")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("One step after the other, and none of them looks back. " * 40)
    return path


def quantized(
    callbacks: list[Callback], model: Path, text: Path, folder: Path, **options: Any
) -> dict[str, QuantizedWeight]:
    """The weights of a fit with these callbacks."""
    module = MoEQuantModule(str(model), bits=3, group_size=16, **options)
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=-1, callbacks=callbacks, default_root_dir=folder, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(module, datamodule=TextDataModule(str(text), num_windows=8, length=32, batch_size=4))
    resume = module.walk.resume
    return {name: weight for block in range(len(resume.sites)) for name, weight in resume.quantized(block).items()}


def assert_equal_codes(one: dict[str, QuantizedWeight], other: dict[str, QuantizedWeight]) -> None:
    assert one.keys() == other.keys()
    assert len(one) > 0
    for name, weight in one.items():
        assert torch.equal(weight.codes_OI, other[name].codes_OI), name


@pytest.mark.parametrize("solver", [GPTQ, AWQ])
def test_the_order_of_the_callbacks_changes_no_code(
    solver: type[Callback], model: Path, text: Path, tmp_path: Path
) -> None:
    steps = (RouterCalibration, HessianCalibration, solver)
    forward, backward = (
        quantized([step() for step in order], model, text, tmp_path / str(index))
        for index, order in enumerate((steps, steps[::-1]))
    )
    assert_equal_codes(forward, backward)


@pytest.mark.slow
def test_on_two_ranks_the_order_of_the_callbacks_changes_no_byte(model: Path, tmp_path: Path) -> None:
    content = yaml.safe_load(Path("configs/gptq_text_w3.yaml").read_text())
    blocks = []
    for name, steps in (("forward", [HessianCalibration, GPTQ]), ("backward", [GPTQ, HessianCalibration])):
        content["trainer"]["callbacks"] = [{"class_path": f"{step.__module__}.{step.__name__}"} for step in steps]
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(content))
        done = run([*arguments(path, model, tmp_path / name), *TWO_RANKS, "--data.batch_size=1"])
        assert done.returncode == 0, done.stderr
        blocks.append(quantized_tensors(tmp_path / name))
    assert blocks[0] == blocks[1]


def quantized_tensors(folder: Path) -> dict[str, bytes]:
    """Tensors of all finished blocks; the fingerprints beside them tell the two orders apart."""
    from safetensors.torch import load_file

    return {
        f"{path.name}:{name}": tensor.flatten().view(torch.uint8).numpy().tobytes()
        for path in sorted((folder / "blocks").iterdir())
        for name, tensor in load_file(path).items()
    }


@pytest.mark.parametrize(
    ("callbacks", "message"),
    [
        ([GPTQ], "GPTQ needs Hessians, which no callback gathers; add HessianCalibration to the list"),
        ([AWQ], "AWQ needs Hessians"),
        ([HessianCalibration, LearnedRounding, GPTQ], "put GPTQ before LearnedRounding"),
        ([HessianCalibration, GPTQ, RTN], "GPTQ and RTN both quantize every weight; keep one of them"),
    ],
)
def test_a_list_that_cannot_work_is_refused_before_any_work(
    callbacks: list[type[Callback]], message: str, model: Path, text: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        quantized([step() for step in callbacks], model, text, tmp_path)
    assert not (tmp_path / "blocks").exists()


class Watching(HookedStep):
    """Counts the calls of all linears of the block."""

    affects_weights = False

    def __init__(self) -> None:
        super().__init__()
        self.num_calls, self.num_batches = 0, 0

    def attach(self, module: MoEQuantModule, hooks: ExitStack) -> None:
        def count(*_: Any) -> None:
            self.num_calls += 1

        norm = module.adapter.blocks[module.current_pass.block].input_layernorm
        hooks.callback(norm.register_forward_hook(count).remove)  # type: ignore[union-attr, operator]

    def finish(self, module: MoEQuantModule) -> None:
        self.num_batches += 2  # of each pass


class RunsTheBlock(Callback):
    """Runs the whole model at the end of each pass, as AWQ's probes run the block."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module_of(pl_module).model(torch.zeros(1, 4, dtype=torch.int64))


def test_hooks_see_the_batches_and_nothing_that_others_run_after_them(model: Path, text: Path, tmp_path: Path) -> None:
    watching = Watching()
    quantized([RunsTheBlock(), RTN(), watching], model, text, tmp_path)
    # Every pass runs the block from its first norm on, once for each batch; a block hands its output to the next pass.
    runs_between_blocks = 2
    assert watching.num_calls in (watching.num_batches, watching.num_batches + runs_between_blocks)


def test_constructor_arguments_are_known_with_their_defaults() -> None:
    assert LearnedRounding(num_steps=3).constructor_arguments == {"settings": {"num_steps": 3}}
    assert RTN().constructor_arguments == {}
    assert RouterCalibration(0.5).constructor_arguments == {"ridge": 0.5}
    assert GPTQ(min_tokens=3).constructor_arguments == {"coverage": "shrink", "min_tokens": 3, "kappa": "auto"}
    with pytest.raises(TypeError, match="unexpected keyword"):
        GPTQ(tokens=3)  # type: ignore[call-arg]
