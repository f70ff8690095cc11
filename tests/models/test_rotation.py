"""A rotated model computes what it did before, or the rotation is refused with the reason."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from moeq.models.adapter import Adapter
from moeq.models.norms import norm_form, norm_weight
from moeq.models.rotation import RotationSpec, rotate
from moeq.quant.spec import Fallback
from tests.tiny import FAMILIES, tiny_model

SANDWICH, MEAN, FUNCTION = "weight per channel and is read by no linear", "subtracts the mean", "what block . adds"
# What keeps a family from being rotated; every other one that moeq quantizes is.
REFUSED = {
    "flex_olmo": SANDWICH, "afmoe": SANDWICH, "gemma4_text": SANDWICH, "kolibri1": SANDWICH, "beam": SANDWICH,
    "inkling_text": SANDWICH,  # a norm after the embeddings
    "phimoe": MEAN, "cohere2_moe": MEAN,
    "minimax": FUNCTION,  # adds to the output of the norm
    "axk1": FUNCTION, "axk2": FUNCTION,  # a norm at the end of the sparse block
    "zaya": FUNCTION,  # scales the residual stream channel by channel
    "deepseek_v4": "between its blocks|what block", "hy_v4": "between its blocks|what block",  # several streams
    "qwen4_exp_text": "between its blocks",
}  # fmt: skip
IDS = torch.arange(1, 65).reshape(2, 32)


def rotated(
    family: str, spec: RotationSpec | None = None, prepare: Callable[[Any], None] | None = None, **overrides: Any
) -> tuple[Any, Tensor, Tensor, list[Fallback]]:
    """A model after its rotation, logits before and after, and what was left out."""
    model = tiny_model(family, **overrides)
    adapter = Adapter(model)
    if prepare is not None:
        prepare(model)
    before = model(input_ids=IDS, use_cache=False).logits
    fallbacks = rotate(adapter, IDS, spec or RotationSpec())
    return model, before, model(input_ids=IDS, use_cache=False).logits, fallbacks


def relative(after: Tensor, before: Tensor) -> float:
    return float((after - before).detach().float().norm() / before.float().norm())


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_output_of_every_family_is_unchanged_or_it_is_refused(family: str) -> None:
    try:
        Adapter(tiny_model(family))
    except ValueError:
        pytest.skip("moeq does not quantize it")
    if family in REFUSED:
        with pytest.raises(
            ValueError, match=rf"{family} cannot be rotated: .*({REFUSED[family]}).*leave the callback Rotation out"
        ):
            rotated(family)
        return
    model, before, after, _ = rotated(family)
    assert relative(after, before) < 1e-5
    weights = model.state_dict()
    assert any(not torch.equal(weights[name], value) for name, value in tiny_model(family).state_dict().items())


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v3"])
def test_norms_of_the_stream_are_ones_and_values_of_all_heads_are_rotated(family: str) -> None:
    model, _, _, fallbacks = rotated(family)
    assert fallbacks == []
    norms = [m for m in model.modules() if norm_form(m) is not None and len(norm_weight(m)) == 64]
    inside = len(model.model.layers) if family == "olmoe" else 0  # those of all queries together
    unit = [bool((norm_weight(norm) == 1).all()) for norm in norms]
    assert unit.count(True) == 2 * len(model.model.layers) + 1
    assert unit.count(False) == inside


@pytest.mark.parametrize("hidden", [80, 96])
@pytest.mark.parametrize("family", ["qwen2_moe", "mixtral"])
def test_widths_that_are_no_powers_of_two(family: str, hidden: int) -> None:
    _, before, after, fallbacks = rotated(family, hidden_size=hidden)
    assert relative(after, before) < 1e-5
    assert fallbacks == []


def test_a_width_without_a_hadamard_matrix_is_refused_and_any_orthogonal_matrix_does() -> None:
    size = {"hidden_size": 92, "head_dim": 16}
    with pytest.raises(ValueError, match=r"no Hadamard matrix of size 92 .*choose kind: orthogonal"):
        rotated("mixtral", **size)
    _, before, after, _ = rotated("mixtral", RotationSpec(kind="orthogonal"), **size)
    assert relative(after, before) < 1e-5


def test_heads_of_a_size_without_a_hadamard_matrix_are_left_and_reported() -> None:
    _, before, after, fallbacks = rotated("mixtral", head_dim=46)
    assert relative(after, before) < 1e-5
    assert [f.detail for f in fallbacks] == ["no Hadamard matrix of the size of its heads (46) is known"] * 2


def test_tied_embeddings_are_untied_and_stay_so_in_a_file(tmp_path: Path) -> None:
    model, before, after, _ = rotated("qwen2_moe", tie_word_embeddings=True)
    assert relative(after, before) < 1e-5
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(reloaded.lm_head.weight, model.lm_head.weight)
    assert relative(reloaded(input_ids=IDS, use_cache=False).logits, after) < 1e-6


def test_multipliers_of_embeddings_residuals_and_logits_survive(monkeypatch: pytest.MonkeyPatch) -> None:
    granite = {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 32}
    multipliers = {"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "logits_scaling": 6.0}
    monkeypatch.setitem(FAMILIES, "granitemoe", granite | multipliers)
    _, before, after, _ = rotated("granitemoe")
    assert relative(after, before) < 1e-5


def test_a_bfloat16_model_changes_by_rounding_only() -> None:
    model, before, after, _ = rotated("qwen2_moe", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert 0 < relative(after, before) < 0.05


def test_rotation_spreads_an_outlier_channel() -> None:
    def enlarge(model: Any) -> None:
        for block in model.model.layers:
            block.input_layernorm.weight[3] *= 40

    plain = tiny_model("mixtral")
    enlarge(plain)
    model, *_ = rotated("mixtral", prepare=enlarge)

    def peak(weight: Tensor, multiplier: Tensor) -> float:
        product = weight * multiplier
        return float(product.abs().max() / product.square().mean().sqrt())

    name = "model.layers.0.self_attn.q_proj.weight"
    multiplier = plain.get_parameter("model.layers.0.input_layernorm.weight")
    assert peak(model.get_parameter(name), torch.ones(64)) < 0.6 * peak(plain.get_parameter(name), multiplier)


def test_a_gate_on_the_averaged_values_is_noticed_and_reported() -> None:
    def gate(model: Any) -> None:
        factor = 0.5 + torch.rand(64)
        model.model.layers[1].self_attn.o_proj.register_forward_pre_hook(lambda _, args: (args[0] * factor,))

    _, before, after, fallbacks = rotated("mixtral", prepare=gate)
    assert relative(after, before) < 1e-5
    (fallback,) = fallbacks
    assert fallback.weight == "model.layers.1"
    assert fallback.reason == "values not rotated"
    assert "not only an average of values" in fallback.detail


def test_values_are_left_alone_when_not_asked_for() -> None:
    with_values, *_ = rotated("mixtral")
    without, before, after, fallbacks = rotated("mixtral", RotationSpec(value_output=False))
    assert relative(after, before) < 1e-5
    assert fallbacks == []
    same = {n for n, p in without.named_parameters() if torch.equal(p, with_values.get_parameter(n))}
    changed = {name.split(".", 3)[-1] for name, _ in without.named_parameters() if name not in same}
    assert changed == {"self_attn.v_proj.weight", "self_attn.o_proj.weight"}


def test_a_reader_that_no_hook_sees_stops_the_rotation() -> None:
    def read_secretly(model: Any) -> None:
        attention = model.model.layers[0].self_attn
        forward = attention.forward

        def secret(hidden_states: Tensor, **kwargs: Any) -> Any:
            output, *rest = forward(hidden_states=hidden_states, **kwargs)
            return (output + 0.1 * hidden_states, *rest)

        attention.forward = secret

    with pytest.raises(ValueError, match="mixtral cannot be rotated: what block 0 adds changes by"):
        rotated("mixtral", prepare=read_secretly)


def test_something_before_the_blocks_that_depends_on_the_basis_stops_the_rotation() -> None:
    def shift(model: Any) -> None:
        offset = torch.rand(64)
        model.model.embed_tokens.register_forward_hook(lambda _module, _args, output: output + offset)

    with pytest.raises(ValueError, match="mixtral cannot be rotated: its logits change by"):
        rotated("mixtral", prepare=shift)


def test_the_same_seed_gives_the_same_model_and_another_one_another() -> None:
    one, again, other = (rotated("olmoe", RotationSpec(seed=seed))[0].lm_head.weight for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.allclose(one.abs(), other.abs())
