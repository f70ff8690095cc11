"""A source without all the tensors of its model is refused before any value is read."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import moeq.disk.tensor_file
from moeq.checkpoint.loading import load_model, stream_model
from moeq.export.moeq_format import write_checkpoint
from tests.export.rounding import round_model
from tests.tiny import save_tiny, tiny_model

Tensors = dict[str, Tensor]


def change(folder: Path, how: Callable[[Tensors], Tensors]) -> Path:
    path = folder / "model.safetensors"
    save_file(how(load_file(path)), path, metadata={"format": "pt"})
    return folder


def without(pattern: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key: value for key, value in tensors.items() if not re.search(pattern, key)}


def renamed(tensors: Tensors) -> Tensors:
    return {f"transformer.{key.removeprefix('model.')}": value for key, value in tensors.items()}


def cut(tensors: Tensors) -> Tensors:
    return tensors | {"model.layers.1.self_attn.q_proj.weight": torch.zeros(64, 63, dtype=torch.bfloat16)}


CASES = {
    "the down projections of a block": (
        without(r"layers\.1\.mlp\.experts\.\d+\.down_proj"),
        r"lacks 8 tensors of the model, first model\.layers\.1\.mlp\.experts\.0\.down_proj\.weight; download",
    ),
    "a norm": (
        without(r"0\.self_attn\.q_norm"),
        r"lacks 1 tensors of the model, first model\.layers\.0\.self_attn\.q_norm\.weight",
    ),
    "one expert": (
        without(r"layers\.1\.mlp\.experts\.7\."),
        r"lacks 3 tensors of the model, first model\.layers\.1\.mlp\.experts\.7\.down_proj\.weight",
    ),
    "a matrix of one expert": (
        without(r"layers\.1\.mlp\.experts\.2\.up_proj"),
        r"lacks 1 tensors of the model, first model\.layers\.1\.mlp\.experts\.2\.up_proj\.weight",
    ),
    "all under other names": (renamed, r"lacks \d+ tensors of the model, first lm_head\.weight"),
    "a matrix of another shape": (
        cut, r"q_proj\.weight has shape \(64, 63\) in the files, the model needs \(64, 64\); download",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_is_missing_is_named_by_its_first_key_before_any_value_is_read(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    how, message = CASES[case]
    folder = change(save_tiny("qwen3_moe", tmp_path), how)

    def no_value(self: object) -> Tensor:
        raise AssertionError("a value was read")

    monkeypatch.setattr(moeq.disk.tensor_file.StoredTensor, "read", no_value)
    for open_model in (load_model, stream_model):
        with pytest.raises(ValueError, match=message):
            open_model(str(folder))


@pytest.mark.parametrize("kept", ["embed_tokens", "lm_head"])
def test_of_tied_weights_one_is_enough(kept: str, tmp_path: Path) -> None:
    folder = save_tiny("qwen3_moe", tmp_path, tie_word_embeddings=True)
    if kept == "lm_head":
        change(folder, lambda t: {("lm_head.weight" if "embed" in k else k): v for k, v in t.items()})
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict()
    for model in (load_model(str(folder)), stream_model(str(folder))[0]):
        assert torch.equal(model.lm_head.weight, expected["lm_head.weight"])
        assert model.lm_head.weight is model.model.embed_tokens.weight
    change(folder, without("embed_tokens|lm_head"))
    with pytest.raises(ValueError, match=r"lacks 2 tensors of the model, first lm_head\.weight"):
        load_model(str(folder))


def test_weights_that_differ_in_the_files_are_not_tied(tmp_path: Path) -> None:
    folder = save_tiny("qwen3_moe", tmp_path, tie_word_embeddings=True)
    head = torch.randn(264, 64).bfloat16()
    change(folder, lambda tensors: tensors | {"lm_head.weight": head})
    for model in (load_model(str(folder)), stream_model(str(folder))[0]):
        assert torch.equal(model.lm_head.weight, head)
        assert not torch.equal(model.model.embed_tokens.weight, head)


@torch.no_grad()
def test_what_transformers_lets_a_checkpoint_leave_out_starts_as_there(tmp_path: Path) -> None:
    folder = change(save_tiny("axk1", tmp_path), without("e_score_correction_bias"))
    expected = dict(AutoModelForCausalLM.from_pretrained(folder, dtype="auto").named_buffers())
    model, stream = stream_model(str(folder))
    name = next(name for name in expected if name.endswith("e_score_correction_bias"))
    assert torch.equal(dict(load_model(str(folder)).named_buffers())[name], expected[name])
    for _ in range(2):  # it leaves with its block, and comes again
        with stream.resident(int(name.split(".")[2])):
            assert torch.equal(dict(model.named_buffers())[name], expected[name])


def test_a_packed_export_that_lacks_a_tensor_is_refused(tmp_path: Path) -> None:
    model: nn.Module = tiny_model("qwen3_moe", dtype=torch.bfloat16)
    write_checkpoint(model, None, round_model(model), tmp_path / "packed", metadata={})
    (tmp_path / "packed" / "moeq_manifest.json").unlink()
    change(tmp_path / "packed", without(r"layers\.1\.mlp\.experts\.7\.down_proj\.weight_scale"))
    with pytest.raises(ValueError, match=r"lacks 1 tensors .*, first model\.layers\.1\.mlp\.experts\.7\.down_proj"):
        load_model(str(tmp_path / "packed"))
