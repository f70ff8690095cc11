import importlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoModelForCausalLM, pipeline
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

from moeq.checkpoint import quantizer
from moeq.checkpoint.packed import IMPLEMENTATION, PackedExperts, PackedLinear
from moeq.checkpoint.packed_weight import PackedFormat
from moeq.checkpoint.quantizer import MoEQConfig, MoEQuantizer
from moeq.export.moeq_format import write_checkpoint
from moeq.export.reopen import reopen
from tests.export.rounding import round_model
from tests.tiny import tiny_model

THREE, FOUR = PackedFormat(3, 64, False), PackedFormat(4, None, True)


def describe(grids: dict[str, PackedFormat], candidates: list[str]) -> MoEQConfig:
    return MoEQConfig.from_grids(
        grids, candidates, weight_dtype=torch.bfloat16, expert_leaves={"up_proj": "w3"}, metadata={"seed": 1}
    )


def test_a_grid_that_most_weights_share_is_described_once() -> None:
    names = [f"model.layers.{b}.mlp.experts.{e}.up_proj" for b in range(3) for e in range(8)]
    grids = dict.fromkeys(names, THREE)
    grids[names[5]] = FOUR
    del grids[names[7]]
    config = describe(grids, [*names, "lm_head"])
    assert list(config.templates) == ["model.layers.*.mlp.experts.*.up_proj"]
    assert list(config.exceptions) == [names[5], names[7]]
    assert {name: grid for name in [*names, "lm_head"] if (grid := config.grid(name))} == grids


def test_the_description_survives_json() -> None:
    config = describe({"model.layers.0.up_proj": THREE}, ["model.layers.0.up_proj", "model.layers.1.up_proj"])
    again = MoEQConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again.to_dict() == config.to_dict()
    assert again.grid("model.layers.0.up_proj") == THREE
    assert again.grid("model.layers.1.up_proj") is None
    assert again.scale_dtype == torch.bfloat16


def test_a_description_of_a_newer_version_is_refused() -> None:
    config = describe({"a.0.b": THREE}, ["a.0.b"]).to_dict()
    with pytest.raises(ValueError, match=r"moeq format 3 \(unknown keys: \['codebook'\]\).*reads formats up to 2"):
        MoEQConfig.from_dict({**config, "format_version": 3, "codebook": []})


@pytest.fixture
def imported_again(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The module after it was imported a second time, as notebooks do; afterwards what it was."""
    before = dict(vars(quantizer))
    for mapping in (AUTO_QUANTIZER_MAPPING, AUTO_QUANTIZATION_CONFIG_MAPPING):
        monkeypatch.setitem(mapping, "moeq", mapping["moeq"])
    yield importlib.reload(quantizer)
    vars(quantizer).update(before)


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny_model("mixtral", dtype=torch.bfloat16)
    folder = tmp_path_factory.mktemp("quantizer") / "export"
    write_checkpoint(model, None, round_model(model), folder, metadata={})
    return folder


def test_importing_again_registers_again(imported_again: ModuleType) -> None:
    assert AUTO_QUANTIZER_MAPPING["moeq"] is imported_again.MoEQuantizer is not MoEQuantizer
    assert AUTO_QUANTIZATION_CONFIG_MAPPING["moeq"] is imported_again.MoEQConfig is not MoEQConfig


@pytest.mark.usefixtures("imported_again")
def test_exports_are_read_back_after_importing_again(export: Path) -> None:
    reopened = reopen(export, tiny_model("mixtral", dtype=torch.bfloat16))
    assert not reopened.unexpected


def test_from_pretrained_keeps_weights_packed(export: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(export)
    experts = model.model.layers[0].mlp.experts
    assert isinstance(experts, PackedExperts)
    assert isinstance(model.model.layers[0].self_attn.k_proj, PackedLinear)
    packed = [module for module in model.modules() if isinstance(module, PackedLinear)]
    assert {layer.weight_packed.dtype for layer in packed} == {torch.int32}
    assert {layer.grid.bits for layer in packed} == {1, 2, 3, 4, 8}
    assert not any(parameter.requires_grad for layer in packed for parameter in layer.parameters())


def test_from_pretrained_prepares_where_it_is_asked_for(export: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(export, experts_implementation=IMPLEMENTATION)
    packed = [module for module in model.modules() if isinstance(module, PackedLinear)]
    assert all(layer.form is not None for layer in packed)
    prompt = torch.tensor([[5, 9, 200, 31]])
    text = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=3, do_sample=False)
    assert text.shape == (1, 7)


@pytest.fixture
def without_moeq(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers as it is where nobody imported moeq."""
    for mapping in (AUTO_QUANTIZER_MAPPING, AUTO_QUANTIZATION_CONFIG_MAPPING):
        monkeypatch.delitem(mapping, "moeq")


@pytest.mark.usefixtures("without_moeq")
def test_transformers_alone_refuses_a_packed_checkpoint_and_says_what_to_do(export: Path) -> None:
    with pytest.raises(ValueError, match=r"install moeq and run `import moeq\.checkpoint\.quantizer` before"):
        AutoModelForCausalLM.from_pretrained(export)
    with pytest.raises(ValueError, match=r"import moeq\.checkpoint\.quantizer"):
        pipeline("text-generation", str(export))


def test_a_checkpoint_of_before_the_refusal_opens_all_the_same(export: Path, tmp_path: Path) -> None:
    shutil.copytree(export, tmp_path / "old")
    config = json.loads((export / "config.json").read_text())
    del config["transformers_weights"]
    (tmp_path / "old/config.json").write_text(json.dumps(config))
    old, new = (AutoModelForCausalLM.from_pretrained(each) for each in (tmp_path / "old", export))
    assert all(torch.equal(a, b) for a, b in zip(old.parameters(), new.parameters(), strict=True))


def test_a_packed_model_generates_what_the_dense_model_generates(export: Path) -> None:
    dense = tiny_model("mixtral", dtype=torch.bfloat16)
    round_model(dense)
    dense.set_experts_implementation("eager")
    packed = AutoModelForCausalLM.from_pretrained(export)
    prompt = torch.tensor([[5, 9, 200, 31]])
    tokens = [
        model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False)
        for model in (dense, packed)
    ]
    assert torch.equal(*tokens)


def test_weights_do_not_depend_on_the_dtype_a_checkpoint_is_opened_in(export: Path) -> None:
    stored, wide = (AutoModelForCausalLM.from_pretrained(export, dtype=d) for d in (torch.bfloat16, torch.float32))
    assert wide.lm_head.weight.dtype == torch.float32
    assert torch.equal(wide.lm_head.weight, stored.lm_head.weight.float())
    for name, layer in stored.named_modules():
        if isinstance(layer, PackedLinear):
            assert torch.equal(wide.get_submodule(name).weight, layer.weight)
    assert wide(torch.tensor([[1, 2, 3]])).logits.dtype == torch.float32
