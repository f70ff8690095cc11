"""Every wrapper: its language model is quantized, and all else of its files is in both exports as it was."""

import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from callbacks.export import Export
from callbacks.gptq import GPTQ
from callbacks.hessian_calibration import HessianCalibration
from callbacks.rtn import RTN
from moeq.checkpoint.loading import load_model
from moeq.checkpoint.names import dense_weight
from moeq.export.moeq_format import read_quantized
from moeq.models.adapter import Adapter
from moeq.models.experts import expert_modules
from moeq.models.rotation import RotationSpec, rotate
from moeq.module import MoEQuantModule
from tests.families import SUPPORTED_WRAPPERS
from tests.test_families import PROBE, RandomIds, logits, opened, same
from tests.test_main import fit
from tests.tiny import save_tiny, tiny_model

# What an edit needs runs this one.
SHORT = "qwen3_5_moe"
PACKED = (".weight_packed", ".weight_scale", ".weight_zero_point", ".weight_shape")
METHODS: dict[str, list[Any]] = {"rtn": [RTN], "gptq": [HessianCalibration, GPTQ]}
# Wrappers of which transformers writes other keys than those they are published with, and these.
PUBLISHED_KEYS = {"kimi_k25": ("language_model.model.blocks.", "language_model.model.layers.")}


def quantize(source: Path, folder: Path, method: str, placement: Any) -> Path:
    """Run folder of a fit."""
    fitted(source, folder, method, placement, Export())
    return folder


def fitted(
    source: Path, folder: Path, method: str, placement: Any, export: Export, group_size: int = 16
) -> MoEQuantModule:
    module = MoEQuantModule(str(source), bits=3, group_size=group_size, sequential="block", placement=placement)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*without.*logger.*|.*num_training_batches.*")
        trainer = pl.Trainer(
            accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=folder, max_epochs=1,
            callbacks=[*(each() for each in METHODS[method]), export],
        )  # fmt: skip
        trainer.fit(module, datamodule=RandomIds())
    return module


@pytest.fixture(
    scope="module",
    params=[pytest.param(family, marks=[] if family == SHORT else [pytest.mark.slow]) for family in SUPPORTED_WRAPPERS],
)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny(request.param, tmp_path_factory.mktemp(request.param) / "model")
    old, new = PUBLISHED_KEYS.get(request.param, ("", ""))
    published = {key.replace(old, new): tensor for key, tensor in tensors(folder).items()}
    save_file(published, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module", params=[("rtn", "stream"), ("gptq", "memory")], ids=["rtn", "gptq"])
def run(source: Path, request: pytest.FixtureRequest) -> Path:
    method, placement = request.param
    return quantize(source, source.parent / method, method, placement)


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


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gemma4", "qwen3_vl_moe"])
def test_streamed_from_its_files_it_has_the_same_exports(family: str, tmp_path: Path) -> None:
    source = save_tiny(family, tmp_path / "model")
    held, streamed = (quantize(source, tmp_path / place, "gptq", place) for place in ("memory", "stream"))
    for kind in ("export", "dense"):
        path = Path(kind) / "model.safetensors"
        assert (held / path).read_bytes() == (streamed / path).read_bytes()


@pytest.mark.slow
def test_what_a_runtime_does_not_read_is_a_fallback_of_the_run(tmp_path: Path) -> None:
    source = save_tiny("qwen3_vl_moe", tmp_path / "model")
    module = fitted(source, tmp_path / "run", "rtn", "memory", Export(formats=["gguf"]), group_size=32)
    number = sum(".visual." in key for key in tensors(source))
    left = [each for each in module.run.fallbacks if each.reason == "tensors left out"]
    assert [each.weight for each in left] == ["gguf"]
    assert left[0].detail.startswith(f"{number} beside the language model")


# Self-sampled text, survey, bit allocation, router calibration, learned rounding; AWQ.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "family"), [("moequant_best_w3", "qwen3_5_moe"), ("moequant_awq_w4", "qwen3_vl_moe")]
)
def test_every_step_of_a_run_works_on_a_wrapper(config: str, family: str, tmp_path: Path) -> None:
    source = save_tiny(family, tmp_path / "model")
    fit(Path(f"configs/{config}.yaml"), source, tmp_path / "run")
    files = tensors(source)
    for kind in ("export", "dense"):
        assert logits(opened(tmp_path / "run" / kind)).isfinite().all()
        written = tensors(tmp_path / "run" / kind)
        assert all(torch.equal(files[key], written[key]) for key in files if "visual" in key)


def test_a_wrapper_is_not_rotated_as_its_image_features_would_not_be() -> None:
    with pytest.raises(ValueError, match="features of images or sound enter its residual stream"):
        rotate(Adapter(tiny_model("qwen3_vl_moe")), PROBE, RotationSpec())
