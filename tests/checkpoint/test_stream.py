"""A streamed model is the loaded one, a block at a time."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import moeq.checkpoint.stream
from moeq.checkpoint.loading import align, load_model, stream_model
from moeq.models.adapter import Adapter
from moeq.models.blocks import visiting
from moeq.models.storage import storage_dtype
from tests.families import FAMILIES, SUPPORTED_WRAPPERS
from tests.tiny import save_tiny, tiny_model

IDS = torch.arange(3, 21).reshape(2, 9)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny("qwen3_moe", tmp_path / "model")


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers, those that no file holds included."""
    return {**model.state_dict(), **dict(model.named_buffers())}


@pytest.mark.parametrize(
    "family", [*FAMILIES, *(pytest.param(family, marks=pytest.mark.slow) for family in SUPPORTED_WRAPPERS)]
)
@torch.no_grad()
def test_every_family_has_the_tensors_and_logits_of_the_loaded_model(family: str, tmp_path: Path) -> None:
    original: Any = tiny_model(family, dtype=torch.bfloat16)
    original.save_pretrained(tmp_path, max_shard_size="100KB")
    loaded = type(original).from_pretrained(tmp_path, dtype="auto")
    align(loaded)
    model, stream = stream_model(str(tmp_path))
    with visiting(stream.blocks, stream.resident):
        assert torch.equal(model(IDS, use_cache=False).logits, loaded(IDS, use_cache=False).logits)
    with ExitStack() as stack:
        for block in range(len(stream.blocks)):
            stack.enter_context(stream.resident(block))
        ours, theirs = tensors(model), tensors(loaded)
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert ours[name].dtype == tensor.dtype, name
            assert torch.equal(ours[name], tensor), name
    assert all(parameter.is_meta for parameter in stream.blocks.parameters())
    used = [[str(each.source_patterns) for each in one._weight_conversions] for one in (model, loaded)]
    assert used[0] == used[1]  # so that an export has the keys of the source
    whole = tensors(load_model(str(tmp_path)))
    assert whole.keys() == theirs.keys()
    assert all(
        torch.equal(whole[name], tensor) and whole[name].dtype == tensor.dtype for name, tensor in theirs.items()
    )


def test_a_block_that_left_forgets_what_was_written_into_it(folder: Path) -> None:
    model, stream = stream_model(str(folder))
    weight = f"{stream.prefix}.1.self_attn.q_proj.weight"
    with stream.resident(1):
        before = model.get_parameter(weight).clone()
        model.get_parameter(weight).zero_()
        with stream.resident(1):
            assert not model.get_parameter(weight).any()
        assert not model.get_parameter(weight).any()
    assert model.get_parameter(weight).is_meta
    with stream.resident(1):
        assert torch.equal(model.get_parameter(weight), before)
    assert stream.num_loads == 2


def test_changes_that_belong_to_the_model_are_made_at_every_load_in_their_order(folder: Path) -> None:
    model, stream = stream_model(str(folder))
    norm = f"{stream.prefix}.0.input_layernorm.weight"

    def change(block: int, factor: float, term: float) -> None:
        if block == 0:
            model.get_parameter(norm).mul_(factor).add_(term)

    with stream.resident(0):
        original = model.get_parameter(norm).clone()
        stream.change_blocks(lambda block: change(block, 2.0, 0.0))
        assert torch.equal(model.get_parameter(norm), 2 * original)
    stream.change_blocks(lambda block: change(block, 1.0, 1.0))
    for _ in range(2):
        with stream.resident(0):
            assert torch.equal(model.get_parameter(norm), 2 * original + 1)


def test_in_float32_a_streamed_model_keeps_the_dtype_of_its_files_in_mind(folder: Path) -> None:
    model, stream = stream_model(str(folder), compute="float32")
    loaded = load_model(str(folder), compute="float32")
    with stream.resident(0):
        for name, parameter in model.get_submodule(f"{stream.prefix}.0").named_parameters():
            path = f"{stream.prefix}.0.{name}"
            assert parameter.dtype == torch.float32
            assert storage_dtype(model, path) == torch.bfloat16
            assert torch.equal(parameter, loaded.get_parameter(path))


def test_a_file_in_a_wider_dtype_is_rounded_as_loading_rounds_it(tmp_path: Path) -> None:
    tiny_model("mixtral").save_pretrained(tmp_path)
    for dtype in ("bfloat16", "float32"):
        model, stream = stream_model(str(tmp_path), dtype, "float32")
        loaded = load_model(str(tmp_path), dtype, "float32")
        with stream.resident(0):
            name = f"{stream.prefix}.0.self_attn.q_proj.weight"
            assert torch.equal(model.get_parameter(name), loaded.get_parameter(name))


def test_the_sites_of_a_model_without_weights_are_those_of_the_loaded_one(folder: Path) -> None:
    model, stream = stream_model(str(folder))
    assert Adapter(model, stream).all_sites() == Adapter(load_model(str(folder))).all_sites()


def test_reading_ahead_changes_nothing(folder: Path) -> None:
    _, stream = stream_model(str(folder))
    for block in range(len(stream.blocks) + 1):
        stream.read_ahead(block)
    assert stream.num_loads == 0


def test_a_weight_that_is_no_number_is_named_when_its_block_comes(folder: Path) -> None:
    path = folder / "model.safetensors"
    content = load_file(path)
    content["model.layers.1.self_attn.q_proj.weight"][0, 0] = torch.nan
    save_file(content, path, metadata={"format": "pt"})
    _, stream = stream_model(str(folder))
    with stream.resident(0):
        pass
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.q_proj\.weight has 1 of"), stream.resident(1):
        pass


def test_a_truncated_file_is_refused_with_a_remedy(folder: Path) -> None:
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="is truncated; export or copy it again"):
        stream_model(str(folder))


def test_a_stream_that_is_asked_for_sizes_only_leaves_the_memory_of_the_process_as_it_is(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    for name in ("map_large_tensors", "keep_fewer_kernels"):
        monkeypatch.setattr(moeq.checkpoint.stream, name, lambda name=name: calls.append(name))
    _, stream = stream_model(str(folder))
    assert stream.block_bytes(0) > 0
    assert not calls
    stream.place("cpu")
    assert calls == ["map_large_tensors", "keep_fewer_kernels"]
