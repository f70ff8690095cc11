"""A made checkpoint has the names and shapes of published ones, the same numbers for the same seed, and can be run."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.large.checkpoint import (
    DEVIATION,
    QWEN3_30B_A3B,
    Draws,
    Shape,
    config_of,
    link_checkpoint,
    shards,
    write_checkpoint,
)

TOKENIZER = str(Path(__file__).resolve().parents[3] / "assets/reference-moe")
SMALL = Shape(64, 4, 2, 16, 8, 2, 32, 4096)


@pytest.fixture(autouse=True)
def small_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Draws.__init__, "__defaults__", (1 << 16,))


def write(folder: Path, num_blocks: int, seed: int = 0) -> Path:
    write_checkpoint(folder, SMALL, num_blocks, seed, TOKENIZER)
    return folder


def test_transformers_loads_every_tensor_of_it(tmp_path: Path) -> None:
    folder = write(tmp_path / "model", 2)
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    assert model.dtype == torch.bfloat16
    with torch.no_grad():
        logits = model(torch.arange(8).unsqueeze(0)).logits
    assert torch.isfinite(logits).all()
    assert len(AutoTokenizer.from_pretrained(folder)) <= SMALL.vocab_size


def test_the_large_shape_is_that_of_the_published_model() -> None:
    # 30,532,122,624 parameters in 48 blocks, 18,867 tensors.
    outside = sum(torch.Size(shape).numel() for shape in QWEN3_30B_A3B.outside_shapes().values())
    assert outside + 48 * QWEN3_30B_A3B.block_numbers() == 30_532_122_624
    assert sum(len(shapes) for _, shapes in shards(QWEN3_30B_A3B, 48)) == 18_867
    assert config_of(QWEN3_30B_A3B, 48, 0)["intermediate_size"] == 6144


def test_blocks_depend_on_the_seed_and_their_index_alone(tmp_path: Path) -> None:
    one, other, seeded = write(tmp_path / "one", 2), write(tmp_path / "other", 1), write(tmp_path / "seeded", 1, seed=1)
    name = "block_000.safetensors"
    assert (one / name).read_bytes() == (other / name).read_bytes() != (seeded / name).read_bytes()
    first, second = (load_file(one / f"block_{block:03d}.safetensors") for block in range(2))
    key = "mlp.experts.0.gate_proj.weight"
    assert not torch.equal(first[f"model.layers.0.{key}"], second[f"model.layers.1.{key}"])


def test_numbers_have_the_scale_of_a_trained_model() -> None:
    made = Draws(0).tensors({"weight": (300, 400), "norm": (500,)}, 0)  # more than a quarter of the pool
    assert made["weight"].float().std() == pytest.approx(DEVIATION, rel=0.02)
    assert made["norm"].float().mean() == pytest.approx(1, abs=0.01)
    assert made["weight"].is_contiguous()


def test_a_smaller_model_is_links_to_the_files_of_a_larger(tmp_path: Path) -> None:
    source = write(tmp_path / "model", 3)
    link_checkpoint(source, tmp_path / "small", SMALL, 1, TOKENIZER)
    name = "block_000.safetensors"
    assert (tmp_path / "small" / name).samefile(source / name)
    assert not (tmp_path / "small/block_001.safetensors").exists()
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "small").config.num_hidden_layers == 1


def test_files_of_another_seed_are_not_mixed_in(tmp_path: Path) -> None:
    write(tmp_path, 1)
    with pytest.raises(ValueError, match="give another folder"):
        write(tmp_path, 2, seed=1)
