"""A source that is quantized already is the plain checkpoint of its values."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moeq.checkpoint.dequantized import description_of, quantized_by
from moeq.checkpoint.loading import load_config, load_model, model_bytes, stream_model
from moeq.checkpoint.placement import stream_obstacle
from moeq.checkpoint.sources import raw_tensors, stored_in
from tests.quantized import KINDS, edit_config, save_quantized
from tests.tiny import save_tiny


@pytest.mark.parametrize("kind", KINDS)
def test_every_format_has_the_tensors_of_its_definition_in_both_placements(kind: str, tmp_path: Path) -> None:
    quantized, plain = save_quantized(kind, tmp_path)
    expected = load_file(plain / "model.safetensors")
    found = stored_in(quantized)
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert (found[key].dtype, found[key].shape) == (tensor.dtype, tuple(tensor.shape)), key
        assert torch.equal(found[key].read(), tensor), key
    ours, theirs = load_model(str(quantized)), load_model(str(plain))
    assert all(torch.equal(tensor, theirs.state_dict()[name]) for name, tensor in ours.state_dict().items())
    assert not hasattr(ours.config, "quantization_config")  # or saving would quantize again
    assert [str(c.source_patterns) for c in ours._weight_conversions] == [
        str(c.source_patterns) for c in theirs._weight_conversions
    ]
    model, stream = stream_model(str(quantized))
    with stream.resident(1):
        block = f"{stream.prefix}.1."
        assert all(torch.equal(t, theirs.state_dict()[n]) for n, t in model.state_dict().items() if n.startswith(block))


def test_each_dequantized_weight_names_the_tensors_that_it_is_made_of(tmp_path: Path) -> None:
    quantized, _ = save_quantized("gptq", tmp_path)
    weight = stored_in(quantized)["model.layers.0.mlp.experts.3.up_proj.weight"]
    owner = "model.layers.0.mlp.experts.3.up_proj"
    assert [part.name for part in weight.parts] == [
        f"{owner}.{leaf}" for leaf in ("qweight", "qzeros", "scales", "g_idx")
    ]
    used = {part.name for tensor in stored_in(quantized).values() for part in tensor.parts}
    assert used == raw_tensors(quantized).keys()


def test_its_size_in_memory_is_that_of_the_plain_model_and_it_can_be_streamed(tmp_path: Path) -> None:
    quantized, plain = save_quantized("packed_4", tmp_path)
    assert model_bytes(str(quantized)) == pytest.approx(model_bytes(str(plain)), rel=0.1)
    assert stream_obstacle(str(quantized)) is None


def test_a_weight_without_its_scales_is_named(tmp_path: Path) -> None:
    quantized, _ = save_quantized("fp8_blocks", tmp_path)
    path = quantized / "model.safetensors"
    content = load_file(path)
    content.pop("model.layers.0.mlp.up_proj.weight_scale_inv")
    save_file(content, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.up_proj\.weight is float8 and has no .*_scale_inv"):
        load_model(str(quantized))
    content["model.layers.0.mlp.up_proj.weight_scale_inv"] = torch.ones(5, 7)
    save_file(content, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"mlp\.up_proj\.weight has \[5, 7\] scales for \[64, 64\] weights"):
        stream_model(str(quantized))


@pytest.mark.parametrize(
    ("description", "named"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "quantized by bitsandbytes, which"),
        ({"quant_method": "awq", "version": "gemv", "bits": 4}, r"quantized by awq \(gemv, 4 bits\), which"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, r"quantized by gptq \(marlin\), which"),
        ({"format": "nvfp4-pack-quantized", "config_groups": {}}, r"by compressed-tensors \(nvfp4-pack-quantized\)"),
        (
            {"format": "int-quantized", "sparsity_config": {"format": "sparse-24-bitmask"}},
            r"by compressed-tensors \(sparse-24-bitmask\)",
        ),
    ],
)
def test_a_method_or_variant_that_is_not_read_is_named_before_any_file_is(
    description: dict[str, object], named: str, tmp_path: Path
) -> None:
    folder = save_tiny("qwen3_moe", tmp_path)
    edit_config(folder, quantization_config=description)
    with pytest.raises(ValueError, match=f"{named}.*give the original, or save it dequantized to bfloat16 first"):
        load_config(str(folder))


def test_tensors_of_another_format_than_the_described_one_are_refused(tmp_path: Path) -> None:
    quantized, _ = save_quantized("gptq", tmp_path)
    edit_config(quantized, quantization_config={"quant_method": "fp8"})
    with pytest.raises(ValueError, match=r"qweight is quantized in a way that fp8 does not describe"):
        load_model(str(quantized))


def test_an_old_key_and_the_text_model_of_a_wrapper_describe_a_source_too() -> None:
    said = {"format": "pack-quantized", "config_groups": {}}
    for config in ({"compression_config": said}, {"text_config": {"quantization_config": said}}):
        assert quantized_by(description_of(config)) == "compressed-tensors"
    assert description_of({"quantization_config": None}) is None
    assert quantized_by({"quant_method": "moeq"}) is None
