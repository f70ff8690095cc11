"""Every wrapper: its language model is quantized, and all else of its files is in both exports as it was."""

import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from callbacks.export import Export
from callbacks.gptq import GPTQ
from callbacks.hessian_calibration import HessianCalibration
from callbacks.rtn import RTN
from moeq.checkpoint.loading import load_model
from moeq.checkpoint.names import dense_weight
from moeq.export.moeq_format import read_quantized
from moeq.models.experts import expert_modules
from moeq.module import MoEQuantModule
from tests.families import SUPPORTED_WRAPPERS
from tests.test_families import RandomIds, logits, opened, same
from tests.tiny import save_tiny

pytestmark = pytest.mark.slow
PACKED = (".weight_packed", ".weight_scale", ".weight_zero_point", ".weight_shape")
METHODS: dict[str, list[Any]] = {"rtn": [RTN], "gptq": [HessianCalibration, GPTQ]}


def quantize(source: Path, folder: Path, method: str, placement: Any) -> Path:
    """Run folder of a fit."""
    module = MoEQuantModule(str(source), bits=3, group_size=16, sequential="block", placement=placement)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*without.*logger.*|.*num_training_batches.*")
        trainer = pl.Trainer(
            accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=folder, max_epochs=1,
            callbacks=[*(each() for each in METHODS[method]), Export()],
        )  # fmt: skip
        trainer.fit(module, datamodule=RandomIds())
    return folder


@pytest.fixture(scope="module", params=SUPPORTED_WRAPPERS)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(request.param, tmp_path_factory.mktemp(request.param) / "model")


@pytest.fixture(scope="module", params=METHODS)
def run(source: Path, request: pytest.FixtureRequest) -> Path:
    return quantize(source, source.parent / request.param, request.param, "memory")


def tensors(folder: Path) -> dict[str, Tensor]:
    """Everything that the files of a folder hold."""
    return {key: tensor for path in folder.glob("*.safetensors") for key, tensor in load_file(path).items()}


def test_everything_beside_the_quantized_weights_is_in_both_exports_byte_by_byte(source: Path, run: Path) -> None:
    files, packed, dense = tensors(source), tensors(run / "export"), tensors(run / "dense")
    assert dense.keys() == files.keys()
    gone = files.keys() - packed.keys()
    # By their numbers of numbers: whatever is gone is there as codes, and nothing else.
    codes = read_quantized(run / "export").values()
    assert sum(files[key].numel() for key in gone) == sum(weight.codes_OI.numel() for weight in codes)
    assert all(key.endswith(PACKED) for key in packed.keys() - files.keys())
    for key in files.keys() - gone:
        for export in (packed, dense):
            assert export[key].dtype == files[key].dtype, key
            assert torch.equal(export[key], files[key]), key
    assert not any(torch.equal(dense[key], files[key]) for key in gone)


def test_the_exports_are_of_the_source_s_class_and_open_by_it_with_the_values_of_the_codes(
    source: Path, run: Path
) -> None:
    expected = opened(source)
    for folder in (run / "export", run / "dense"):
        assert type(load_model(str(folder))) is type(expected)
    experts = expert_modules(expected)
    for name, weight in read_quantized(run / "export").items():
        size = weight.codes_OI.shape[1] // weight.scale_OG.shape[1]
        zero_OI, scale_OI = (x.repeat_interleave(size, 1).float() for x in (weight.zero_point_OG, weight.scale_OG))
        dense_weight(expected, name, experts).copy_((weight.codes_OI - zero_OI) * scale_OI)
    wanted = logits(expected)
    assert wanted.isfinite().all()
    assert same(logits(opened(run / "export")), wanted)
    assert same(logits(opened(run / "dense")), wanted)
    assert not same(logits(opened(source)), wanted)


def test_streamed_from_its_files_it_has_the_same_exports(source: Path, run: Path) -> None:
    streamed = quantize(source, source.parent / f"{run.name}-streamed", run.name, "stream")
    for kind in ("export", "dense"):
        for path in (run / kind).glob("*.safetensors"):
            assert path.read_bytes() == (streamed / kind / path.name).read_bytes()
