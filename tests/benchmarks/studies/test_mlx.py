"""Which folders the study of MLX asks for, and how mlx-lm's own are made and counted."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.lab.files import tensor_bytes
from benchmarks.lab.study import MODEL
from benchmarks.studies.mlx import (
    BUDGETS,
    DWQ,
    MLX_GPTQ,
    MLX_LM,
    OWN,
    RECIPES,
    WIDTHS,
    Mlx,
    is_quantized,
    write_dense,
    write_mlx_lm,
)
from moeq.checkpoint.loading import load_model
from tests.tiny import save_tiny


def test_what_uses_data_comes_for_every_seed_and_rounding_to_nearest_once() -> None:
    found = Counter((case.quantizer, case.kind) for case in Mlx(Mlx.parser().parse_args([])).cases())
    learned = [*((DWQ, kind) for kind in WIDTHS), (MLX_GPTQ, "2 bits"), (MLX_GPTQ, "4 bits")]
    assert found == {
        **{(MLX_LM, kind): 1 for kind in (*WIDTHS, *RECIPES)}, **dict.fromkeys(learned, 3),
        **{(OWN, f"{budget:g}"): 3 for budget in BUDGETS},
    }  # fmt: skip


@pytest.mark.parametrize("leaf", ["mlp.gate", "mlp.shared_expert_gate"])
def test_routers_are_not_quantized_and_gates_of_experts_are(leaf: str) -> None:
    assert not is_quantized(f"model.layers.0.{leaf}")
    assert is_quantized("model.layers.0.mlp.switch_mlp.gate_proj")
    assert not is_quantized("model.embed_tokens")
    assert not is_quantized("lm_head")


def test_folders_of_mlx_lm_differ_from_the_dense_one_in_the_weights_of_blocks_alone(tmp_path: Path) -> None:
    pytest.importorskip("mlx.core", reason="MLX has no build for this system")
    pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")
    write_dense(load_model(MODEL), Path(MODEL), tmp_path / "dense")
    dense = load_file(tmp_path / "dense" / "model.safetensors")
    assert torch.equal(dense["lm_head.weight"], dense["model.embed_tokens.weight"])
    # Values and down projections of the last two of four blocks are in more bits by a recipe; 7,864,320 weights.
    for kind, bits in {"3 bits": 3.5, "mixed_3_6": 3.5 + 3 * 1_245_184 / 7_864_320}.items():
        write_mlx_lm(tmp_path / "dense", tmp_path / kind, kind)
        saved = tensor_bytes(tmp_path / "dense") - tensor_bytes(tmp_path / kind)
        assert 8 * saved == pytest.approx((16 - bits) * 7_864_320)
        written = load_file(tmp_path / kind / "model.safetensors")
        kept = {name for name, tensor in written.items() if tensor.dtype == torch.bfloat16 and name in dense}
        assert all(torch.equal(written[name], dense[name]) for name in kept)
        assert {name for name in dense if "layers" not in name or ".mlp.gate." in name} <= kept


def test_a_tied_head_is_no_tensor_where_mlx_lm_has_one(tmp_path: Path) -> None:
    save_tiny("mixtral", tmp_path / "source", tie_word_embeddings=True)
    write_dense(load_model(str(tmp_path / "source")), tmp_path / "source", tmp_path / "dense")
    assert "lm_head.weight" not in load_file(tmp_path / "dense" / "model.safetensors")
    assert json.loads((tmp_path / "dense" / "config.json").read_text())["tie_word_embeddings"]
