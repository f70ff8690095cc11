"""The first module that gives a NaN or an infinity is named, whichever family it is in."""

import pytest
import torch
from torch import Tensor, nn

from moeq.models.experts import is_experts_module
from moeq.scoring.finite import NonFiniteError, check_finite, first_non_finite, non_finite_error
from tests.families import FAMILIES
from tests.tiny import tiny_model

FEW = ("qwen2_moe", "mixtral", "deepseek_v3", "gpt_oss", "olmoe")
IDS_BL = torch.arange(1, 41).view(2, 20)


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


def planted(family: str, where: str, value: float) -> tuple[nn.Module, str]:
    """A model with a NaN or an infinity in one parameter of block 1, and the path of the module that holds it."""
    model = tiny_model(family)
    for name, module in model.named_modules():
        is_there = {
            "experts": is_experts_module(module),
            "attention": name.endswith("o_proj"),
            "norm": name.endswith("post_attention_layernorm"),
        }[where]
        if name.startswith("model.layers.1.") and is_there:
            parameter = next(
                p for p in module.parameters() if p.ndim == {"experts": 3, "attention": 2, "norm": 1}[where]
            )
            # The same number in every expert: some of them is chosen.
            parameter[..., 0] = value
            return model, name
    raise AssertionError(f"{family} has no {where}")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["experts", "attention", "norm"])
@pytest.mark.parametrize("family", FEW)
def test_the_module_with_the_damage_is_named(family: str, where: str, value: float) -> None:
    model, name = planted(family, where, value)
    assert first_non_finite(model, lambda: model(input_ids=IDS_BL, use_cache=False)) == name
    assert hooks(model) == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_a_healthy_model_has_no_such_module(family: str) -> None:
    model = tiny_model(family)
    before = hooks(model)
    mask_BL = torch.ones_like(IDS_BL)
    mask_BL[0, :7] = 0
    assert first_non_finite(model, lambda: model(input_ids=IDS_BL, attention_mask=mask_BL, use_cache=False)) is None
    assert hooks(model) == before


@pytest.mark.parametrize(("path", "leaf"), [("model.embed_tokens", "weight"), ("lm_head", "weight")])
def test_damage_outside_of_the_blocks_is_named_too(path: str, leaf: str) -> None:
    model = tiny_model("qwen2_moe", tie_word_embeddings=False)
    getattr(model.get_submodule(path), leaf)[5] = float("nan")
    assert first_non_finite(model, lambda: model(input_ids=IDS_BL)) == path


def test_hooks_come_off_after_an_error_which_is_not_hidden() -> None:
    model = tiny_model("mixtral")

    def run() -> None:
        model(input_ids=IDS_BL)
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        first_non_finite(model, run)
    assert hooks(model) == 0


def logits_of(model: nn.Module) -> tuple[Tensor, Tensor]:
    logits_BLV = model(input_ids=IDS_BL, use_cache=False).logits
    return logits_BLV.flatten(0, 1), torch.tensor([17, 42]).repeat_interleave(20)


def test_the_error_names_task_document_module_and_counts() -> None:
    model = tiny_model("qwen3_moe")
    model.get_submodule("model.embed_tokens").weight[IDS_BL[1, 10]] = float("nan")  # type: ignore[index]
    logits_NV, owner_N = logits_of(model)
    calls: list[int] = []

    def run() -> None:
        calls.append(1)
        model(input_ids=IDS_BL, use_cache=False)

    num_bad = int((~logits_NV.isfinite()).sum())
    assert 0 < num_bad < logits_NV.numel()
    with pytest.raises(NonFiniteError) as error:
        check_finite(logits_NV, owner_N, model=model, run=run, task="piqa", whose="the reference model")
    said = f"the reference model gave {num_bad} non-finite logits of {logits_NV.numel()} on task piqa, document 42; "
    assert str(error.value).startswith(said + "the first NaN or infinity comes out of model.embed_tokens; check")
    assert calls == [1]
    check_finite(logits_NV[:20], owner_N[:20], model=model, run=run, task="piqa")
    assert calls == [1]


def test_several_documents_are_counted_and_a_device_that_errs_once_is_told_apart() -> None:
    model = tiny_model("mixtral")
    logits_NV, owner_N = logits_of(model)
    logits_NV[[3, 30], 0] = -float("inf")
    with pytest.raises(
        NonFiniteError, match=r"gave 2 .* document 17 and 1 others .* finite in every module: the device"
    ):
        check_finite(logits_NV, owner_N, model=model, run=lambda: logits_of(model), task="boolq")


def test_large_finite_logits_are_no_error() -> None:
    logits_NV = torch.full((2, 300), 3e38)
    check_finite(logits_NV, torch.zeros(2), model=nn.Identity(), run=pytest.fail, task="piqa")


def test_the_error_can_be_made_without_counts() -> None:
    error = non_finite_error("gsm8k", [3], "model.layers.0.mlp.experts")
    assert str(error).startswith("the model gave non-finite logits on task gsm8k, document 3; the first NaN")
