"""AWQ through the command line: close at 8 bits, exported as evaluated, resumed to the same bytes."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor
from transformers import AutoModelForCausalLM

from callbacks.awq import AWQ
from tests.test_main import QUIET, fit, texts
from tests.tiny import save_tiny

CONFIG = Path("configs/awq_w4.yaml")
SMALL = ["--data.num_windows=8", "--data.length=32", *QUIET]
IDS = torch.arange(1, 65).reshape(2, 32)


def config_with(folder: Path, **options: object) -> Path:
    """The configuration with other arguments of AWQ, and without figures."""
    config = yaml.safe_load(CONFIG.read_text())
    callbacks = config["trainer"]["callbacks"]
    config["trainer"]["callbacks"] = [c for c in callbacks if not c["class_path"].endswith("Figures")]
    next(c for c in callbacks if c["class_path"].endswith("AWQ"))["init_args"] = options
    path = folder / "awq_options.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


@torch.no_grad()
def logits(folder: Path) -> Tensor:
    result: Tensor = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(IDS).logits
    return result


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("qwen2_moe", []),
        ("mixtral", ["--model.sequential=block"]),
        ("deepseek_v3", ["--model.affinity_power=1"]),
    ],
)
def test_at_8_bits_the_export_is_the_original_with_other_norms(family: str, options: list[str], tmp_path: Path) -> None:
    model = save_tiny(family, tmp_path / "model", dtype=torch.float32)
    fit(config_with(tmp_path), model, tmp_path / "run", "--model.bits=8", *SMALL, *texts(CONFIG), *options)
    assert json.loads((tmp_path / "run/verification.json").read_text())["checkpoint"]["logits_equal"]
    records = json.loads((tmp_path / "run/fallbacks.json").read_text())
    assert {record["reason"] for record in records} <= {
        "few calibration tokens", "no calibration tokens", "announced draft layers are not in the source's files",
    }  # fmt: skip
    original, exported = logits(model), logits(tmp_path / "run/dense")
    difference_BT = (exported - original).norm(dim=-1) / original.norm(dim=-1)
    # The median: a token near the border between two experts may go to the other one.
    assert 0 < float(difference_BT.median()) < 0.02
    norms = [
        dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())
        for folder in (model, tmp_path / "run/dense")
    ]
    moved = [name for name in norms[0] if "norm.weight" in name and not torch.equal(norms[0][name], norms[1][name])]
    assert moved, "no scale was found"


@pytest.mark.slow
@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_a_run_that_lost_its_last_block_ends_with_the_same_bytes(rounding: str, tmp_path: Path) -> None:
    model = save_tiny("qwen2_moe", tmp_path / "model")
    config = config_with(tmp_path, rounding=rounding)
    fit(config, model, tmp_path / "whole", *SMALL)
    (tmp_path / "again").mkdir()
    shutil.copytree(tmp_path / "whole/blocks", tmp_path / "again/blocks")
    (tmp_path / "again/blocks/block_001.safetensors").unlink()
    fit(config, model, tmp_path / "again", *SMALL)
    for name in ("export/model.safetensors", "dense/model.safetensors", "fallbacks.json", "errors.csv"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name


def test_hessians_have_to_be_gathered_before(tmp_path: Path) -> None:
    model = save_tiny("qwen2_moe", tmp_path / "model")
    config = yaml.safe_load(config_with(tmp_path).read_text())
    callbacks = config["trainer"]["callbacks"]
    config["trainer"]["callbacks"] = [c for c in callbacks if "Hessian" not in c["class_path"]]
    path = tmp_path / "awq_alone.yaml"
    path.write_text(yaml.safe_dump(config))
    with pytest.raises(SystemExit, match=r"add HessianCalibration to the list"):
        fit(path, model, tmp_path / "run", *SMALL)


def test_a_bound_on_memory_that_cuts_a_block_is_refused_before_any_work(tmp_path: Path) -> None:
    model = save_tiny("qwen2_moe", tmp_path / "model")
    with pytest.raises(SystemExit, match=r"AWQ needs the Hessians of all experts .*set --model\.hessian_gib 0\.01"):
        fit(config_with(tmp_path), model, tmp_path / "run", "--model.hessian_gib=0.0002", *SMALL)
    assert not (tmp_path / "run/blocks").exists()


def test_another_rounding_is_refused() -> None:
    with pytest.raises(ValueError, match=r"rounding \(up\) must be nearest or gptq"):
        AWQ("up")  # type: ignore[arg-type]
