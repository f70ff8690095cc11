"""What a source's files hold and no parameter of the model is made of arrives in exports byte by byte."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, DeepseekV3ForCausalLM

from moeq.checkpoint.loading import load_model
from moeq.checkpoint.stream import open_stream
from moeq.export import layout, reopen
from moeq.export.carried import is_draft
from moeq.export.dense import write_dense
from moeq.export.finished import FinishedModel, HeldBlocks, held
from moeq.export.moeq_format import read_quantized, write_checkpoint
from moeq.export.origin import find_origin
from moeq.export.verify import verify_dense, verify_packed
from moeq.models.adapter import Adapter
from tests.export.rounding import round_model
from tests.quantized import save_quantized
from tests.tiny import save_tiny

IDS = torch.arange(24).view(2, 12)
# Draft layers under the names that families publish them with; "{n}" is the number of blocks.
DRAFT = {
    "deepseek_v3": ("model.layers.{n}", ("eh_proj.weight", "enorm.weight", "shared_head.head.weight")),
    "glm4_moe": ("model.layers.{n}", ("eh_proj.weight", "hnorm.weight")),
    "qwen3_next": ("mtp.layers.0", ("pre_fc_norm_hidden.weight",)),
    "ernie4_5_moe": ("model.mtp_block.0", ("mtp_linear_proj.0.weight",)),
    "qwen3_moe": ("model.mtp.layers.0", ("eh_proj.weight",)),
}


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def same_bytes(ours: Tensor, theirs: Tensor) -> bool:
    return ours.dtype == theirs.dtype and torch.equal(*(t.reshape(-1).view(torch.uint8) for t in (ours, theirs)))


def save_with_draft(family: str, folder: Path, **overrides: object) -> dict[str, Tensor]:
    """A source with a draft layer, a copy of its last block, partly in float8; returns what is added."""
    save_tiny(family, folder, **overrides)
    found = tensors(folder)
    path, more = DRAFT[family]
    num_blocks = json.loads((folder / "config.json").read_text())["num_hidden_layers"]
    draft = path.format(n=num_blocks)
    last = f"model.layers.{num_blocks - 1}"
    added = {key.replace(last, draft): tensor.clone() for key, tensor in found.items() if key.startswith(f"{last}.")}
    added |= {f"{draft}.{name}": torch.full((4, 6), 0.3, dtype=torch.bfloat16) for name in more}
    added |= {
        f"{draft}.scaled.weight": torch.randn(8, 8).to(torch.float8_e4m3fn),
        "vision_tower.scale": torch.tensor(2.0, dtype=torch.float64),
    }
    save_file(found | added, folder / "model.safetensors", metadata={"format": "pt"})
    return added


@pytest.mark.parametrize("family", DRAFT)
def test_draft_layers_travel_into_both_exports(family: str, tmp_path: Path) -> None:
    added = save_with_draft(family, tmp_path / "model")
    model = load_model(str(tmp_path / "model"))
    origin = find_origin(model)
    assert origin.carried.keys() == added.keys()
    assert origin.num_draft == len(added) - 1
    quantized = round_model(model)
    write_checkpoint(model, None, quantized, tmp_path / "packed", metadata={})
    write_dense(held(model), None, tmp_path / "dense")
    for kind in ("packed", "dense"):
        ours = tensors(tmp_path / kind)
        assert all(same_bytes(ours[key], tensor) for key, tensor in added.items()), kind
    packed = verify_packed(tmp_path / "packed", held(model, quantized), IDS)
    dense = verify_dense(tmp_path / "dense", held(model), IDS)
    assert packed.num_carried == dense.num_carried == len(added)
    assert packed.logits_equal
    assert dense.logits_equal
    assert read_quantized(tmp_path / "packed").keys() == quantized.keys()


def test_dropped_draft_layers_are_in_no_file_and_are_not_announced(tmp_path: Path) -> None:
    added = save_with_draft("deepseek_v3", tmp_path / "model", num_nextn_predict_layers=1)
    model = load_model(str(tmp_path / "model"))
    source = FinishedModel(Adapter(model), HeldBlocks("model.layers", {}), "drop")
    write_dense(source, None, tmp_path / "dense")
    assert tensors(tmp_path / "dense").keys() & added.keys() == {"vision_tower.scale"}
    assert json.loads((tmp_path / "dense/config.json").read_text())["num_nextn_predict_layers"] == 0
    assert verify_dense(tmp_path / "dense", source, IDS).num_carried == 1
    (report,) = source.origin.fallbacks()
    assert f"{len(added) - 1} tensors" in report.detail
    write_dense(held(model), None, tmp_path / "kept")
    assert json.loads((tmp_path / "kept/config.json").read_text())["num_nextn_predict_layers"] == 1


def test_a_streamed_source_gives_the_same_files_in_several_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout, "MAX_SHARD", "60KB")
    monkeypatch.setattr(reopen, "WHOLE_BYTES", 0)
    added = save_with_draft("deepseek_v3", tmp_path / "model")
    write_dense(held(load_model(str(tmp_path / "model"))), None, tmp_path / "memory")
    model, stream = open_stream(tmp_path / "model", None, lambda dtype: dtype)
    source = FinishedModel(Adapter(model, stream), HeldBlocks("model.layers", {}))
    write_dense(source, None, tmp_path / "stream")
    names = {path.name for path in (tmp_path / "memory").iterdir()} - {"moeq_manifest.json"}
    assert len(names) > 5
    assert [n for n in names if (tmp_path / "memory" / n).read_bytes() != (tmp_path / "stream" / n).read_bytes()] == []
    index = json.loads((tmp_path / "stream/model.safetensors.index.json").read_text())
    assert added.keys() <= index["weight_map"].keys()
    assert verify_dense(tmp_path / "stream", source, IDS).num_carried == len(added)


def test_draft_layers_of_a_quantized_source_stay_as_they_are_with_their_scales(tmp_path: Path) -> None:
    folder, _ = save_quantized("fp8_blocks", tmp_path)
    found = tensors(folder)
    draft = {
        k.replace("layers.1.", "layers.2."): t.clone() for k, t in found.items() if k.startswith("model.layers.1.")
    }
    save_file(found | draft, folder / "model.safetensors", metadata={"format": "pt"})
    assert {tensor.dtype for tensor in draft.values()} >= {torch.float8_e4m3fn, torch.float32}
    model = load_model(str(folder))
    origin = find_origin(model)
    assert origin.carried.keys() == draft.keys()
    assert origin.carried_bytes == sum(tensor.nbytes for tensor in draft.values())
    quantized = round_model(model)
    write_checkpoint(model, None, quantized, tmp_path / "packed", metadata={})
    write_dense(held(model), None, tmp_path / "dense")
    for kind in ("packed", "dense"):
        ours = tensors(tmp_path / kind)
        assert all(same_bytes(ours[key], tensor) for key, tensor in draft.items())
        assert {key for key, tensor in ours.items() if tensor.dtype == torch.float8_e4m3fn} <= draft.keys()
    assert "quantization_config" not in json.loads((tmp_path / "dense/config.json").read_text())
    assert verify_dense(tmp_path / "dense", held(model), IDS).num_carried == len(draft)
    assert verify_packed(tmp_path / "packed", held(model, quantized), IDS).num_carried == len(draft)


def test_a_carried_tensor_that_differs_is_named(tmp_path: Path) -> None:
    added = save_with_draft("qwen3_moe", tmp_path / "model")
    model = load_model(str(tmp_path / "model"))
    write_dense(held(model), None, tmp_path / "dense")
    (tmp_path / "dense/moeq_manifest.json").unlink()
    key = next(key for key in added if key.endswith("eh_proj.weight"))
    for change in ("value", "absent"):
        found = tensors(tmp_path / "dense")
        if change == "value":
            found[key][0, 0] += 1
        else:
            del found[key]
        save_file(found, tmp_path / "dense/model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=rf"{key} of .*dense is not that of .*model\.safetensors; export again"):
            verify_dense(tmp_path / "dense", held(model), IDS)


def test_what_a_model_computes_is_left_out_with_a_reason(tmp_path: Path) -> None:
    folder = save_tiny("olmoe", tmp_path / "model", num_hidden_layers=1)
    found = tensors(folder) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})
    origin = find_origin(load_model(str(folder)))
    assert not origin.carried
    assert list(origin.left_out) == ["model.layers.0.self_attn.rotary_emb.inv_freq"]
    assert "computes" in next(iter(origin.left_out.values()))


def test_a_source_is_taken_over_again_from_its_dense_export(tmp_path: Path) -> None:
    added = save_with_draft("qwen3_moe", tmp_path / "model")
    write_dense(held(load_model(str(tmp_path / "model"))), None, tmp_path / "once")
    write_dense(held(load_model(str(tmp_path / "once"))), None, tmp_path / "twice")
    once, twice = (tensors(tmp_path / name) for name in ("once", "twice"))
    assert added.keys() <= once.keys() == twice.keys()
    assert all(same_bytes(once[key], twice[key]) for key in once)


def test_transformers_drafts_from_a_dense_export_as_from_its_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # It knows draft layers by the number that they have in the published model.
    monkeypatch.setattr(DeepseekV3ForCausalLM, "_keys_to_ignore_on_load_unexpected", [r"model\.layers\.2.*"])
    folder = save_tiny("deepseek_v3", tmp_path / "model", num_nextn_predict_layers=1)
    found = tensors(folder)
    draft = {
        k.replace("layers.1.", "layers.2."): t.clone() for k, t in found.items() if k.startswith("model.layers.1.")
    }
    ones, wide = torch.ones(64, dtype=torch.bfloat16), torch.full((64, 128), 0.01, dtype=torch.bfloat16)
    draft |= {f"model.layers.2.{name}.weight": ones.clone() for name in ("enorm", "hnorm", "shared_head.norm")}
    draft |= {"model.layers.2.eh_proj.weight": wide}
    save_file(found | draft, folder / "model.safetensors", metadata={"format": "pt"})
    write_dense(held(load_model(str(folder))), None, tmp_path / "dense")
    prompt = torch.tensor([[5, 9, 200, 31]])
    written = [
        AutoModelForCausalLM.from_pretrained(each).generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, do_sample=False, use_mtp=True
        )
        for each in (folder, tmp_path / "dense")
    ]
    assert torch.equal(*written)


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("model.layers.61.mlp.experts.3.gate_proj.weight_scale_inv", True),
        ("model.layers.60.mlp.experts.3.gate_proj.weight", False),
        ("model.language_model.layers.61.enorm.weight", True),
        ("mtp.fc.weight", True),
        ("model.mtp_layers.0.enorm.weight", True),
        ("model.mtp_block.0.self_attn.q_proj.weight", True),
        ("model.mtp.layers.0.eh_proj.weight", True),
        ("visual.layers.70.attn.weight", False),
        ("model.empty_embeds", False),
    ],
)
def test_draft_layers_are_known_by_their_names(key: str, expected: bool) -> None:
    assert is_draft(key, 61) == expected
