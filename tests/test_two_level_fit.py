"""A fit on llama.cpp's grids, from options to files: packed export, GGUF, streamed, continued, refused."""

import json
import shutil
from pathlib import Path

import gguf
import pytest
import torch
from lightning.pytorch import Callback
from transformers import AutoModelForCausalLM

from callbacks.awq import AWQ
from callbacks.bit_allocation import BitAllocation
from callbacks.export import Export
from callbacks.gptq import GPTQ
from callbacks.hessian_calibration import HessianCalibration
from callbacks.hqq import HQQ
from callbacks.learned_rounding import LearnedRounding
from callbacks.rtn import RTN
from moeq.allocation.patterns import Pattern
from moeq.export.moeq_format import read_quantized
from moeq.fit.fingerprint import run_fingerprint
from moeq.module import MoEQuantModule
from moeq.trainer_options import numeric_switches
from tests.own_fit import fit_own
from tests.same_bytes import assert_same_bytes, written
from tests.two_level import save_wide

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")
NARROW = Pattern("*.experts.*.down_proj", bits=4)


def fit(steps: list[Callback], model: Path, folder: Path, **options: object) -> MoEQuantModule:
    return fit_own(steps, model, folder, **{"grid": "q3_k", **options})


@pytest.mark.slow
def test_a_solved_model_is_exported_packed_and_as_gguf_with_the_same_values(tmp_path: Path) -> None:
    model = save_wide(tmp_path / "model")
    patterns = [NARROW, Pattern("*.self_attn.*", grid="q5_k"), Pattern("*.o_proj", grid="q4_k")]
    steps = [BitAllocation(patterns=patterns), HessianCalibration(), GPTQ(), LearnedRounding(num_steps=3)]
    module = fit([*steps, Export(formats=["moeq", "gguf"])], model, tmp_path / "run")
    kinds = {name: weight.kind for name, weight in read_quantized(tmp_path / "run/export").items()}
    assert set(kinds.values()) == {"q3_k", "q4_k", "q5_k", "uniform"}
    assert {name: grid.stored_kind for name, grid in module.run.plan.items()} == kinds
    report = json.loads((tmp_path / "run/verification.json").read_text())
    assert report["checkpoint"]["logits_equal"]
    assert report["gguf"]["largest_error"] == 0.0
    assert {"Q3_K", "Q4_K", "Q5_K", "Q4_0"} <= report["gguf"]["types"].keys()
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "run/export", dtype=torch.float32)
    (path,) = (tmp_path / "run").rglob("*.gguf")
    tensor = next(t for t in gguf.GGUFReader(path).tensors if t.name == "blk.1.attn_output.weight")
    values = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
    assert torch.equal(values.bfloat16(), opened.model.layers[1].self_attn.o_proj.weight)
    # Continued from its first block, with the same bytes.
    shutil.copytree(tmp_path / "run/blocks", tmp_path / "again/blocks")
    (tmp_path / "again/blocks/block_001.safetensors").unlink()
    fit([BitAllocation(patterns=patterns), *steps[1:], Export()], model, tmp_path / "again")
    ours, theirs = written(tmp_path / "run"), written(tmp_path / "again")
    assert ours["export/model.safetensors"] == theirs["export/model.safetensors"]


@pytest.mark.slow
def test_a_streamed_fit_has_the_bytes_of_one_in_memory(tmp_path: Path) -> None:
    model = save_wide(tmp_path / "model")
    for placement in ("memory", "stream"):
        steps = [BitAllocation(patterns=[NARROW]), HessianCalibration(), GPTQ(), Export()]
        fit(steps, model, tmp_path / placement, placement=placement, grid="q4_k")
    assert_same_bytes(tmp_path / "memory", tmp_path / "stream")


@pytest.mark.parametrize(
    ("steps", "options", "message"),
    [
        ([RTN()], {}, r"grid \(q3_k\) needs in_features in multiples of 256, which are not 32 of .*down_proj \(8 x\); "
         r"give these .*\{pattern: '.*down_proj', bits: 4, group_size: 32\}"),
        ([BitAllocation(patterns=[NARROW]), HQQ()], {}, "HQQ solves uniform groups alone"),
        ([BitAllocation(patterns=[NARROW]), HessianCalibration(), AWQ()], {}, "AWQ solves uniform groups alone"),
        ([BitAllocation(patterns=[NARROW]), RTN(), Export(formats=["mlx"])], {}, "a grid of gguf"),
        ([RTN()], {"bits": 2}, r"bits \(2\) follows from grid \(q3_k\)"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused_before_any_work(
    steps: list[Callback], options: dict[str, object], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        fit(steps, save_wide(tmp_path / "model"), tmp_path / "run", **options)
    assert not (tmp_path / "run/blocks").exists()


def test_fingerprints_of_runs_on_uniform_grids_do_not_know_the_option(tmp_path: Path) -> None:
    module = fit([RTN()], save_wide(tmp_path / "model"), tmp_path / "run", grid="uniform", group_size=32)
    trainer, settings = module.trainer, {name: value for name, value in module.settings.items() if name != "grid"}
    settings |= {"batches": [trainer.limit_train_batches, None], **numeric_switches()}
    expected = run_fingerprint(settings, trainer.callbacks, "", module.model.dtype)["configuration"]  # type: ignore[attr-defined]
    assert module.walk.resume.fingerprint["configuration"] == expected
    module.hparams["grid"] = "q4_k"
    assert module._fingerprint()["configuration"] != expected
