"""A run on a source that is quantized already is a run on the plain checkpoint of its values, to the byte."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from moeq.checkpoint.sources import raw_tensors
from tests.quantized import save_quantized
from tests.test_main import fit

pytestmark = pytest.mark.slow
RTN = Path("configs/rtn_w3.yaml")
IDS = torch.arange(3, 21).reshape(2, 9)


def codes(run_folder: Path) -> dict[str, Tensor]:
    """What the files of the blocks hold, by file and name; their headers name the source."""
    paths = sorted((run_folder / "blocks").glob("*.safetensors"))
    return {f"{path.name}:{name}": tensor for path in paths for name, tensor in load_file(path).items()}


def tensors(folder: Path) -> dict[str, Tensor]:
    return {key: tensor.read() for key, tensor in raw_tensors(folder).items()}


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())


@pytest.mark.parametrize(
    ("kind", "placements"),
    [
        ("fp8_blocks", ("memory", "stream")),
        ("mxfp4", ("stream",)),
        ("packed_4", ("stream",)),
        ("gptq", ("memory",)),
        ("awq", ("memory",)),
    ],
)
@torch.no_grad()
def test_codes_and_exports_are_those_of_the_plain_checkpoint(
    kind: str, placements: tuple[str, ...], tmp_path: Path
) -> None:
    quantized, plain = save_quantized(kind, tmp_path / "sources")
    for placement in placements:
        fit(RTN, quantized, tmp_path / placement, f"--model.placement={placement}")
    fit(RTN, plain, tmp_path / "plain")
    expected = codes(tmp_path / "plain")
    assert expected
    assert all(same(codes(tmp_path / name), expected) for name in placements)
    for export in ("export", "dense"):
        held = {
            name: {k: t.read() for k, t in raw_tensors(tmp_path / name / export).items()}
            for name in (*placements, "plain")
        }
        assert all(same(held[name], held["plain"]) for name in placements)
    config = json.loads((tmp_path / placements[0] / "dense" / "config.json").read_text())
    assert "quantization_config" not in config
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / name / "dense") for name in (placements[0], "plain")]
    ours, theirs = (model(IDS, use_cache=False).logits for model in models)
    assert torch.equal(ours, theirs)
