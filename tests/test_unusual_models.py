"""Models that differ from others of their family as published ones do: pruned, hybrid, untied, partly rotated."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from callbacks.export import Export
from callbacks.gptq import GPTQ
from callbacks.hessian_calibration import HessianCalibration
from callbacks.rtn import RTN
from moeq.checkpoint.loading import load_config, load_model
from moeq.checkpoint.packed_weight import dequantize_codes
from moeq.export.moeq_format import read_quantized
from tests.quantized import edit_config
from tests.test_placements import fit
from tests.tiny import save_tiny

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
]
# Experts, how many are chosen, groups of them that must divide: as after experts were cut out, and at both ends.
PRUNED = {
    "odd": ("qwen3_moe", {"num_experts": 7, "num_experts_per_tok": 3}),
    "three groups": ("deepseek_v3", {"n_routed_experts": 6, "n_group": 3, "topk_group": 1}),
    "all chosen": ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 4}),
    "one of two": ("mixtral", {"num_local_experts": 2, "num_experts_per_tok": 1}),
}


def edit(folder: Path, **tensors: torch.Tensor) -> None:
    """Add or replace tensors of a checkpoint, with dots for double underscores in their names."""
    path = folder / "model.safetensors"
    added = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    save_file({**load_file(path), **added}, path, metadata={"format": "pt"})


@pytest.mark.parametrize("case", PRUNED)
def test_any_number_of_experts_is_quantized_and_none_is_lost(case: str, tmp_path: Path) -> None:
    family, values = PRUNED[case]
    model = save_tiny(family, tmp_path / "model", **values)
    fit([HessianCalibration(), GPTQ(), Export()], model, tmp_path / "run", "memory")
    weights = read_quantized(tmp_path / "run" / "export")
    assert all(dequantize_codes(weight).abs().amax() > 0 for weight in weights.values())


def test_an_expert_that_is_never_chosen_is_rounded_like_the_others(tmp_path: Path) -> None:
    model = save_tiny("deepseek_v3", tmp_path / "model")
    source = load_file(model / "model.safetensors")
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    source[bias][5] = -1e4
    edit(model, **{bias.replace(".", "__"): source[bias]})
    module = fit([HessianCalibration(), GPTQ(), Export()], model, tmp_path / "run", "memory")
    reasons = {fallback.reason for fallback in module.run.fallbacks if ".experts.5." in fallback.weight}
    assert "no calibration tokens" in reasons
    weights = read_quantized(tmp_path / "run" / "export")
    errors = {
        name: float((dequantize_codes(w).float() - source[f"{name}.weight"].float()).norm())
        / float(source[f"{name}.weight"].float().norm())
        for name, w in weights.items()
        if ".experts." in name
    }
    never = [error for name, error in errors.items() if ".experts.5." in name]
    others = [error for name, error in errors.items() if ".experts.5." not in name]
    assert max(never) < 1.5 * max(others)


@pytest.mark.parametrize(
    ("family", "values"),
    [("granitemoehybrid", {"mamba_n_groups": 2}), ("nemotron_h", {"n_groups": 2}), ("jamba", {}), ("qwen3_next", {})],
)
def test_inputs_longer_than_a_scan_s_chunk_are_the_same_packed_and_dense(
    family: str, values: dict[str, int], tmp_path: Path
) -> None:
    model = save_tiny(family, tmp_path / "model", **values)
    fit([RTN(), Export()], model, tmp_path / "run", "memory")
    ids = torch.arange(300).remainder(250).reshape(1, 300)
    packed, dense = (load_model(str(tmp_path / "run" / name)) for name in ("export", "dense"))
    dense.set_experts_implementation("eager")
    with torch.no_grad():
        logits = [opened(input_ids=ids, use_cache=False).logits for opened in (packed, dense)]
    assert torch.equal(*logits)


def test_a_head_that_the_configuration_ties_and_the_file_does_not_is_kept(tmp_path: Path) -> None:
    model = save_tiny("qwen3_moe", tmp_path / "model", tie_word_embeddings=True)
    head = torch.randn_like(load_file(model / "model.safetensors")["model.embed_tokens.weight"])
    edit(model, lm_head__weight=head)
    fit([RTN(), Export()], model, tmp_path / "run", "memory")
    for name in ("export", "dense"):
        assert torch.equal(load_file(tmp_path / "run" / name / "model.safetensors")["lm_head.weight"], head)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "dense")
    assert torch.equal(opened.lm_head.weight, head)


def test_rotation_of_a_part_of_each_head_is_read_in_the_words_of_the_published_configuration(tmp_path: Path) -> None:
    model = save_tiny("minimax_m2", tmp_path / "model")
    path = model / "config.json"
    config = json.loads(path.read_text())
    config.pop("partial_rotary_factor", None)
    config["rope_parameters"].pop("partial_rotary_factor", None)
    path.write_text(json.dumps(config))
    edit_config(model, rotary_dim=8)
    assert load_config(str(model)).rope_parameters["partial_rotary_factor"] == 0.5
    fit([RTN(), Export()], model, tmp_path / "run", "memory")
    dense = tmp_path / "run" / "dense"
    assert json.loads((dense / "config.json").read_text())["rotary_dim"] == 8
    assert load_config(str(dense)).rope_parameters["partial_rotary_factor"] == 0.5
