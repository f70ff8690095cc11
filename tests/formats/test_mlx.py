"""Folders for mlx-lm: the logits of transformers, exact values, and refusals of what it computes otherwise."""

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from moeq.export.compare import ExportMismatchError
from moeq.formats import mlx_reader
from moeq.formats.convert import convert
from moeq.formats.mlx import FORMAT
from moeq.formats.mlx_known import KNOWN
from moeq.formats.mlx_rearranged import REARRANGED
from moeq.formats.source import open_packed
from tests.formats.packed import (
    Grid,
    Tiny,
    add_draft_layer,
    config_of,
    flip_a_bit,
    is_expert,
    logits_of,
    tensors_of,
    write_tiny_packed,
)

# In each check; the others are slow.
FEW = ("qwen2_moe", "mixtral", "deepseek_v3", "qwen3_vl_moe")
# Parts of the keys of what stands beside a language model.
BESIDE = ("patch_merge", "visual", "vision", "projector", "audio_tower", "sam_model", "qwen2_model", "view_seperator")
YARN = {
    "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128, "beta_fast": 32,
    "beta_slow": 1, "mscale": 0.7, "mscale_all_dim": 1.0,
}  # fmt: skip
MISTRAL = YARN | {
    "mscale": 1.0, "original_max_position_embeddings": 16, "llama_4_scaling_beta": 0.1, "max_position_embeddings": 512,
}  # fmt: skip
# Two heads give many tokens a score of 0 alike, of which each runtime takes others.
MANY_INDEX_HEADS = {"index_n_heads": 32, "index_topk": 6}
SHARES = {
    kind: {"rope_type": "default", "partial_rotary_factor": 0.5, "rope_theta": base}
    for kind, base in (("full_attention", 5e6), ("sliding_attention", 1e4))
}
OTHER_SHARES = SHARES | {"sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
# Of three blocks of four tokens or more each query sees its own and one more.
CHOSEN_BLOCKS = {
    "layer_types": ["minimax_m3_sparse"] * 2, "index_block_size": 4, "index_topk_blocks": 2, "rotary_dim": 8,
}  # fmt: skip
OVERRIDES: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {
        "num_hidden_layers": 5, "layer_types": [*["linear_attention"] * 3, "full_attention", "full_attention"],
        "mlp_layer_types": ["dense", *["sparse"] * 4], "n_group": 4, "topk_group": 2,
    },
    "ernie4_5_moe": {"num_hidden_layers": 3, "moe_layer_end_index": 2},
    "minimax_m3_vl": CHOSEN_BLOCKS,
    "minimax_m3_vl_text": CHOSEN_BLOCKS,
    "mistral4": {"rope_parameters": MISTRAL, "n_group": 2},
    "mistral3": {"rope_parameters": MISTRAL},
    "deepseek_v32": {**MANY_INDEX_HEADS, "rope_parameters": YARN},
    "glm_moe_dsa": MANY_INDEX_HEADS,
    "exaone_moe": {"sliding_window": 8, "tie_word_embeddings": True},
    "phimoe": {"attention_bias": True, "lm_head_bias": True},
    "mimo_v2_flash": {"sliding_window": 8, "rope_parameters": SHARES},
    "kimi_linear": {"q_lora_rank": None, "linear_attn_config": {"head_dim": 32, "num_heads": 4}},
    "dots1": {"sliding_window": None},
    "deepseek_v2": {"rope_parameters": YARN, "topk_method": "group_limited_greedy"},
    "deepseek_v3": {"rope_parameters": YARN},
    # As its 26B-A4B, in small.
    "gemma4": {
        "hidden_size_per_layer_input": 0, "global_head_dim": 32, "num_global_key_value_heads": 1, "sliding_window": 8,
        "attention_k_eq_v": True, "final_logit_softcapping": 30.0, "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    },
}  # fmt: skip


def mlx_logits(folder: Path, num_tokens: int = 24, prompt: int | None = None) -> Tensor:
    """Of all tokens at once, or of a prompt and then of one token after another."""
    mx = pytest.importorskip("mlx.core", reason="MLX has no build for this system")
    utils = pytest.importorskip("mlx_lm.utils", reason="mlx-lm is not installed")
    model, _ = utils.load_model(folder)
    ids = mx.array(np.arange(1, num_tokens + 1)[None])
    if prompt is None:
        return torch.from_numpy(np.array(model(ids).astype(mx.float32)))[0]
    caches = pytest.importorskip("mlx_lm.models.cache")
    cache, ends = caches.make_prompt_cache(model), [0, *range(prompt, num_tokens + 1)]
    parts = [model(ids[:, start:end], cache=cache) for start, end in pairwise(ends)]
    return torch.from_numpy(np.array(mx.concatenate(parts, axis=1).astype(mx.float32)))[0]


def grid_by_kind(name: str) -> Grid | None:
    """Down projections on 2 bits, experts of block 0 on 3 with zero points, others kept, the rest on 8 bits."""
    if not is_expert(name):
        return (8, None, True)
    if name.endswith("down_proj"):
        return (2, 32, True)
    return (3, 32, False) if ".layers.0." in name else None


@pytest.mark.parametrize(
    "family", [family if family in FEW else pytest.param(family, marks=pytest.mark.slow) for family in KNOWN]
)
def test_mlx_lm_gives_the_logits_of_the_dequantized_model(family: str, tmp_path: Path) -> None:
    made = write_tiny_packed(family, tmp_path, grid_by_kind, dtype=torch.float32, **OVERRIDES.get(family, {}))
    report = convert(made.folder, "mlx", tmp_path / "mlx")
    assert report.num_quantized == len(made.quantized)
    assert report.largest_error < 1e-4
    assert (mlx_logits(tmp_path / "mlx") - logits_of(made.model)).abs().max() < 1e-4
    beside = [key for key in tensors_of(made.folder) if any(part in key for part in BESIDE)]
    assert report.num_left_out == len(beside)


@pytest.mark.parametrize("experts_alone", [False, True])
@pytest.mark.parametrize("family", ["minimax_m3_vl", *(pytest.param(f, marks=pytest.mark.slow) for f in REARRANGED)])
def test_what_is_split_merged_and_reordered_gives_the_logits_token_by_token(
    family: str, experts_alone: bool, tmp_path: Path
) -> None:
    def grid_of(name: str) -> Grid | None:
        return grid_by_kind(name) if is_expert(name) or not experts_alone else None

    made = write_tiny_packed(family, tmp_path, grid_of, dtype=torch.float32, **OVERRIDES[family])
    convert(made.folder, "mlx", tmp_path / "mlx")
    assert (mlx_logits(tmp_path / "mlx", 40, prompt=9) - logits_of(made.model, 40)).abs().max() < 1e-4


def test_rows_of_one_weight_are_those_of_two_modules_bit_for_bit(tmp_path: Path) -> None:
    made = write_tiny_packed("minimax_m3_vl", tmp_path, lambda name: (3, 32, False))
    report = convert(made.folder, "mlx", tmp_path / "mlx", carrier="native")
    assert report.num_quantized == len(made.quantized)
    tensors, said = tensors_of(tmp_path / "mlx"), config_of(tmp_path / "mlx")["quantization"]
    for path, name in (("mlp", "mlp"), ("block_sparse_moe.shared_experts", "mlp.shared_experts")):
        block = int(name != "mlp")
        halves = [
            mlx_reader.dequantize_bits(
                *(tensors[f"language_model.model.layers.{block}.{path}.{leaf}.{part}"] for part in
                  ("weight", "scales", "biases")), said["bits"],
            )
            for leaf in ("gate_proj", "up_proj")
        ]  # fmt: skip
        ours = made.model.get_parameter(f"model.language_model.layers.{block}.{name}.gate_up_proj.weight").float()
        assert (torch.cat(halves) - ours).abs().max() < 2**-6 * ours.abs().max()


@pytest.mark.parametrize("reader", ["mlx", "numpy"])
def test_values_in_bfloat16_are_equal_bit_for_bit_to_each_reader(
    reader: str, tiny: Callable[..., Tiny], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if reader == "numpy":
        monkeypatch.setattr(mlx_reader, "find_spec", lambda name: None)
    else:
        pytest.importorskip("mlx.core", reason="MLX has no build for this system")
    report = convert(tiny("qwen2_moe", "mixed").folder, "mlx", tmp_path / "mlx")
    assert report.largest_error == 0.0
    assert report.reader.startswith(reader)
    assert report.types == {"5 bits, groups of 32": 24, "2 bits, groups of 32": 24, "8 bits, groups of 64": 8}


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_the_numpy_reader_reads_bit_by_bit(bits: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    words = torch.randint(-(2**31), 2**31, (3, 2 * bits), generator=generator, dtype=torch.int64).to(torch.int32)
    scales, biases = torch.rand(3, 2, generator=generator), torch.rand(3, 2, generator=generator)
    read = mlx_reader.dequantize_bits(words.view(torch.uint32), scales, biases, bits)
    for row in range(3):
        stream = "".join(f"{word & (2**32 - 1):032b}"[::-1] for word in words[row].tolist())
        for column in range(64):
            code = int(stream[column * bits : (column + 1) * bits][::-1], 2)
            expected = np.float32(code) * scales[row, column // 32].numpy() + biases[row, column // 32].numpy()
            assert read[row, column].item() == pytest.approx(expected, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("bits", [4, 7])
def test_native_keeps_the_width_and_reports_how_far_biases_are_rounded(bits: int, tmp_path: Path) -> None:
    made = write_tiny_packed("olmoe", tmp_path, lambda name: (bits, 32, False), num_hidden_layers=1)
    report = convert(made.folder, "mlx", tmp_path / "mlx", carrier="native")
    assert report.types == {f"{bits if bits < 7 else 8} bits, groups of 32": len(made.quantized)}
    if bits < 7:
        assert 0 < report.largest_error <= 2 ** (bits + 1) * torch.finfo(torch.bfloat16).eps
    else:
        assert report.largest_error == 0.0


def test_a_tied_head_is_written_where_its_class_has_none(tmp_path: Path) -> None:
    made = write_tiny_packed(
        "qwen2_moe", tmp_path, lambda name: (4, 32, True), dtype=torch.float32, tie_word_embeddings=True
    )
    convert(made.folder, "mlx", tmp_path / "mlx")
    assert config_of(tmp_path / "mlx")["tie_word_embeddings"] is False
    tensors = tensors_of(tmp_path / "mlx")
    assert torch.equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"])
    assert (mlx_logits(tmp_path / "mlx") - logits_of(made.model)).abs().max() < 1e-4


def test_norms_with_one_added_are_rounded_only_where_that_is_allowed(tmp_path: Path) -> None:
    made = write_tiny_packed("qwen3_5_moe", tmp_path, lambda name: (4, 32, True), num_hidden_layers=2)
    with pytest.raises(ValueError, match=r"holds norms of qwen3_5_moe with 1 added, which bfloat16 rounds .* native"):
        convert(made.folder, "mlx", tmp_path / "mlx")
    convert(made.folder, "mlx", tmp_path / "mlx", carrier="native")
    assert "norms are 1 + weight, and rounded" in (tmp_path / "mlx" / "README.md").read_text()
    name = "model.language_model.layers.0.input_layernorm.weight"
    ours = tensors_of(tmp_path / "mlx")["language_model.model.layers.0.input_layernorm.weight"]
    assert torch.equal(ours, (made.model.get_parameter(name).float() + 1).bfloat16())


def test_a_wrapper_whose_head_is_the_embedding_gets_one(tmp_path: Path) -> None:
    made = write_tiny_packed(
        "qwen3_vl_moe", tmp_path, lambda name: (4, 32, True), dtype=torch.float32, num_hidden_layers=1,
        prepare=_tie,
    )  # fmt: skip
    convert(made.folder, "mlx", tmp_path / "mlx")
    assert config_of(tmp_path / "mlx")["text_config"]["tie_word_embeddings"] is False
    assert (mlx_logits(tmp_path / "mlx") - logits_of(made.model)).abs().max() < 1e-4


def _tie(source: Path) -> None:
    """Make a wrapper's head its embedding."""
    config = config_of(source)
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = True
    (source / "config.json").write_text(json.dumps(config))
    tensors = {key: tensor for key, tensor in tensors_of(source).items() if key != "lm_head.weight"}
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})


def test_draft_layers_are_left_out_and_not_announced(tmp_path: Path) -> None:
    made = write_tiny_packed("qwen3_moe", tmp_path, lambda name: (4, 32, True), prepare=add_draft_layer)
    convert(made.folder, "mlx", tmp_path / "mlx")
    assert config_of(tmp_path / "mlx")["num_nextn_predict_layers"] == 0
    assert not [key for key in tensors_of(tmp_path / "mlx") if ".layers.2." in key]
    assert "| left out | 2 tensors" in (tmp_path / "mlx" / "README.md").read_text()
    mlx_logits(tmp_path / "mlx")


def test_what_mlx_lm_takes_apart_is_written_dequantized(tiny: Callable[..., Tiny], tmp_path: Path) -> None:
    made = tiny("deepseek_v3", "3 bits")
    report = convert(made.folder, "mlx", tmp_path / "mlx")
    assert report.types["dequantized (mlx-lm takes it apart)"] == 2
    name = "model.layers.0.self_attn.kv_b_proj"
    assert torch.equal(tensors_of(tmp_path / "mlx")[f"{name}.weight"], made.model.get_parameter(f"{name}.weight"))


def test_the_configuration_names_every_module_that_is_not_as_most_are(
    tiny: Callable[..., Tiny], tmp_path: Path
) -> None:
    convert(tiny("qwen2_moe", "mixed").folder, "mlx", tmp_path / "mlx")
    values = config_of(tmp_path / "mlx")["quantization"]
    tensors = tensors_of(tmp_path / "mlx")
    for key, scales in tensors.items():
        path, _, leaf = key.rpartition(".")
        if leaf == "scales":
            said = values.get(path, values)
            columns = 32 * tensors[f"{path}.weight"].shape[-1] // said["bits"]
            assert columns == scales.shape[-1] * said["group_size"]
    assert values["model.layers.0.self_attn.q_proj"] is False


def test_linears_that_are_one_there_need_one_grid(tmp_path: Path) -> None:
    made = write_tiny_packed("ernie4_5_moe", tmp_path, lambda name: (8 if name.endswith("v_proj") else 4, 32, True))
    with pytest.raises(ValueError, match=r"v_proj is affine8 .*: they are one linear of mlx-lm's class"):
        convert(made.folder, "mlx", tmp_path / "mlx")


def test_transformers_refuses_the_folder(tiny: Callable[..., Tiny], tmp_path: Path) -> None:
    convert(tiny("qwen2_moe", "3 bits").folder, "mlx", tmp_path / "mlx")
    with pytest.raises(ValueError, match="quant_method"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "mlx")


def test_a_changed_bit_is_found(tiny: Callable[..., Tiny], tmp_path: Path) -> None:
    packed = tiny("qwen2_moe", "3 bits").folder
    convert(packed, "mlx", tmp_path / "mlx")
    for key, named in (
        ("model.layers.1.mlp.switch_mlp.up_proj.weight", r"layers\.1\.mlp\.experts\.0\.up_proj"),
        ("model.layers.1.input_layernorm.weight", r"layers\.1\.input_layernorm"),
    ):
        flip_a_bit(tmp_path / "mlx", key)
        with pytest.raises(ExportMismatchError, match=named):
            FORMAT.verify(open_packed(packed), tmp_path / "mlx", "exact", lambda blocks, label: blocks)
        flip_a_bit(tmp_path / "mlx", key)


@pytest.mark.parametrize(
    ("family", "overrides", "mixed", "message"),
    [
        ("qwen2_moe", {"norm_topk_prob": True}, False, "norm_topk_prob: True of qwen2_moe is not what mlx-lm computes"),
        ("mixtral", {"sliding_window": 64}, False, "sliding_window: 64 of mixtral"),
        ("qwen3_5_moe", {"layer_types": ["full_attention", "linear_attention"]}, False, "every so-manieth block"),
        ("granitemoehybrid", {"mamba_n_groups": 2}, False, "mamba_n_groups: 2 of granitemoehybrid"),
        ("glm_moe_dsa", {"indexer_types": ["full", "shared"]}, False, "blocks share what one has chosen"),
        ("mimo_v2_flash", {"rope_parameters": OTHER_SHARES}, False, "blocks with a window have another"),
        ("unlimited_ocr", {}, False, "mlx-lm is not known to read unlimited_ocr rightly"),
        (
            "jamba",
            {"mamba_dt_rank": 32},
            False,
            r"mlx-lm is not known to read jamba rightly \(it weights",
        ),
        ("ernie4_5_moe", {"moe_k": 1}, False, "the probability of a single expert as its weight"),
        ("ernie4_5_moe", {"use_bias": True}, False, "use_bias: True of ernie4_5_moe"),
        ("ernie4_5_moe", {"moe_layer_interval": 2}, False, "experts in every block from one on"),
        ("ernie4_5_moe", {"num_hidden_layers": 3, "moe_layer_end_index": 1}, False, "in every block from one on"),
        ("bailing_hybrid", {"layer_types": ["full_attention", "linear_attention"]}, False, "every so-manieth block"),
        ("bailing_hybrid", {"kda_safe_gate": False}, False, "kda_safe_gate: False of bailing_hybrid"),
        ("minimax_m3_vl", {}, False, "adds 1 to norms of minimax_m3_vl when it uses them, which bfloat16 rounds"),
        (
            "qwen3_moe",
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
            False,
            "rotary embeddings of type linear for qwen3_moe",
        ),
        ("olmoe", {}, True, r"experts\.3\.up_proj is affine8 .*: MLX holds all experts of a projection"),
    ],
)
def test_what_mlx_lm_computes_otherwise_is_refused_by_name(
    family: str, overrides: dict[str, Any], mixed: bool, message: str, tmp_path: Path
) -> None:
    made = write_tiny_packed(
        family, tmp_path, lambda name: (8 if mixed and name.endswith("3.up_proj") else 4, 32, True), **overrides
    )
    with pytest.raises(ValueError, match=message):
        convert(made.folder, "mlx", tmp_path / "mlx")
    assert {path.name for path in tmp_path.iterdir()} == {"source", "packed"}
