"""llama.cpp's choice of types, its blocks, and what is gathered for them."""

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.lab.judge import Judge, file_bits
from benchmarks.lab.llama_quantize import importances, is_quantized, quantize_file, type_of
from moeq.checkpoint.loading import load_model
from tests.formats.gguf_models import IDS, write_dense
from tests.formats.llama_cpp import needs_llama_cpp
from tests.tiny import save_tiny

# Of the bundled model: in-features of each weight of a block, and how many values it has.
_TENSORS = {
    "attn_q": (256, 256 * 256), "attn_k": (256, 128 * 256), "attn_v": (256, 128 * 256),
    "attn_output": (256, 256 * 256), "ffn_gate_exps": (256, 16 * 128 * 256), "ffn_up_exps": (256, 16 * 128 * 256),
    "ffn_down_exps": (128, 16 * 128 * 256), "ffn_gate_shexp": (256, 256 * 256), "ffn_up_shexp": (256, 256 * 256),
    "ffn_down_shexp": (256, 256 * 256),
}  # fmt: skip
_BITS = {"Q2_K": 2.625, "Q3_K": 3.4375, "Q4_K": 4.5, "Q5_K": 5.5, "Q6_K": 6.5625, "Q4_0": 4.5, "Q5_0": 5.5, "Q8_0": 8.5}


@pytest.mark.parametrize(("mixture", "bits"), [("Q2_K", 3.19), ("Q3_K_M", 4.08), ("Q4_K_M", 5.22), ("Q4_0", 4.5)])
def test_mixtures_have_the_size_of_the_files_that_llama_quantize_wrote_of_the_bundled_model(
    mixture: str, bits: float
) -> None:
    total = stored = 0.0
    for block in range(4):
        for name, (in_features, numel) in _TENSORS.items():
            kind = type_of(f"blk.{block}.{name}.weight", in_features, mixture, 4, 16)
            total, stored = total + numel, stored + numel * _BITS[kind]
    assert round(stored / total, 2) == bits


# In a model of eight experts values and keys are Q8_0 and outputs Q5_K, but for the plain types.
@pytest.mark.parametrize(
    ("mixture", "kinds"),
    [
        (
            "Q2_K",
            {"attn_q": "Q2_K", "attn_k": "Q8_0", "attn_v": "Q8_0", "attn_output": "Q5_K", "ffn_down_exps": "Q3_K"},
        ),
        (
            "Q4_0",
            {"attn_q": "Q4_0", "attn_k": "Q8_0", "attn_v": "Q8_0", "attn_output": "Q4_0", "ffn_down_exps": "Q4_0"},
        ),
        ("IQ2_XS", {"attn_k": "Q4_K", "attn_v": "Q4_K", "attn_output": "Q5_K", "ffn_down_exps": "IQ2_XS"}),
        ("IQ4_XS", {"attn_k": "Q8_0", "attn_output": "Q5_K", "ffn_up_exps": "IQ4_XS"}),
    ],
)
def test_eight_experts_have_more_bits_in_attention(mixture: str, kinds: dict[str, str]) -> None:
    assert {name: type_of(f"blk.1.{name}.weight", 256, mixture, 4, 8) for name in kinds} == kinds


def test_more_bits_go_to_both_ends_and_every_third_between() -> None:
    kinds = [type_of(f"blk.{block}.attn_v.weight", 256, "Q4_K_M", 16, 16) for block in range(16)]
    assert [block for block, kind in enumerate(kinds) if kind == "Q6_K"] == [0, 1, 4, 7, 10, 13, 14, 15]


def test_rows_that_hold_no_256_get_narrower_blocks() -> None:
    assert type_of("blk.3.ffn_down_exps.weight", 128, "Q4_K_M", 4, 16) == "Q8_0"
    assert type_of("blk.1.ffn_down_exps.weight", 128, "IQ3_XXS", 4, 16) == "IQ4_NL"


def test_routers_norms_and_embeddings_stay() -> None:
    assert is_quantized("blk.0.ffn_up_exps.weight", (4, 8, 32))
    for name in ("blk.0.ffn_gate_inp.weight", "blk.0.ffn_gate_inp_shexp.weight", "token_embd.weight", "output.weight"):
        assert not is_quantized(name, (8, 32))
    assert not is_quantized("blk.0.attn_norm.weight", (32,))


def test_bits_are_what_a_file_has_beyond_its_other_parts() -> None:
    # 1000 weights at 4.5 bits and 700 bytes of everything else.
    assert file_bits(563 + 700, 2000 + 700, 1000) == pytest.approx(4.504)


@needs_llama_cpp
def test_importances_choose_the_rounding_of_heavy_columns(tmp_path: Path) -> None:
    import gguf

    _, dense = write_dense("qwen2_moe", tmp_path, moe_intermediate_size=64, num_experts=6)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(dense).tensors}
    weight = {name: np.array(tensor.data) for name, tensor in tensors.items()}
    heavy = {name: torch.ones(values.shape[0] if values.ndim == 3 else 1, values.shape[-1])
             for name, values in weight.items() if is_quantized(name, values.shape)}  # fmt: skip
    for importance_EI in heavy.values():
        importance_EI[:, 0] = 1e4
    for target, importance in (("plain.gguf", None), ("weighted.gguf", heavy)):
        quantize_file(dense, tmp_path / target, "Q4_0", importance)
    files = [{t.name: t for t in gguf.GGUFReader(tmp_path / name).tensors} for name in ("plain.gguf", "weighted.gguf")]
    for name, original in weight.items():
        if name not in heavy:
            assert all(np.array_equal(file[name].data, original) for file in files)
            continue
        errors = [
            (gguf.dequantize(file[name].data, file[name].tensor_type).reshape(original.shape) - original) ** 2
            for file in files
        ]
        assert errors[1][..., 0].mean() < errors[0][..., 0].mean() / 4
        assert errors[1].mean() > errors[0].mean() > 0


def test_importances_are_means_over_the_tokens_that_reach_an_expert(tmp_path: Path) -> None:
    model = load_model(str(save_tiny("mixtral", tmp_path / "model", dtype=torch.float32)), "float32")
    found = importances(model, IDS[None])
    inputs = []
    layer = model.model.layers[0]
    hook = layer.self_attn.q_proj.register_forward_hook(lambda _, given, made: inputs.append(given[0]))
    routed = []
    gate = layer.mlp.register_forward_pre_hook(lambda _, given: routed.append(given[0]))
    with torch.no_grad():
        model(IDS[None])
        scores_TE = torch.nn.functional.linear(routed[0].flatten(0, 1), layer.mlp.gate.weight)
    hook.remove()
    gate.remove()
    torch.testing.assert_close(
        found["model.layers.0.self_attn.q_proj"], inputs[0].flatten(0, 1).square().mean(0), rtol=1e-4, atol=1e-6
    )
    chosen_T = (scores_TE.topk(model.config.num_experts_per_tok).indices == 1).any(1)
    expected_I = routed[0].flatten(0, 1)[chosen_T].square().mean(0)
    torch.testing.assert_close(found["model.layers.0.mlp.experts.1.gate_proj"], expected_I, rtol=1e-4, atol=1e-6)


def test_a_judge_finds_no_divergence_from_itself_and_the_mean_of_what_is_there() -> None:
    windows = {"a": torch.tensor([[0, 1, 0], [1, 1, 0]])}
    even = Judge.by(lambda ids: torch.zeros(len(ids), 2), windows)
    same = even.measure(lambda ids: torch.zeros(len(ids), 2))["a"]
    assert (same["kl"], same["top1_agreement"]) == (0.0, 1.0)
    assert same["nll"] == pytest.approx(np.log(2))
    tilted = even.measure(lambda ids: torch.tensor([[0.0, np.log(3)]]).expand(len(ids), 2))["a"]
    # 1/2 log(1/2 / 1/4) + 1/2 log(1/2 / 3/4)
    assert tilted["kl"] == pytest.approx(0.5 * np.log(2) + 0.5 * np.log(2 / 3))
    assert tilted["nll"] == pytest.approx(-(2 * np.log(3 / 4) + 2 * np.log(1 / 4)) / 4)
