"""The average bits that the heuristics give on the published models, to the digits that follow from the papers."""

from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from moeq.allocation.plan import plan_cost, uniform_plan
from moeq.allocation.rules import apply_rules, make_rule
from moeq.module import MoEQuantModule
from moeq.quant.spec import GridSpec, WeightShape

MIXTRAL = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2, "vocab_size": 64,
}  # fmt: skip
# DeepSeek-MoE-16B has code of its own; this Qwen2-MoE has its linears: block 0 dense, 64 routed and 2 shared experts.
DEEPSEEK = {
    "hidden_size": 2048, "intermediate_size": 10944, "num_hidden_layers": 28, "num_attention_heads": 16,
    "num_key_value_heads": 16, "num_experts": 64, "num_experts_per_tok": 6, "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 2816, "mlp_only_layers": [0], "vocab_size": 64,
}  # fmt: skip


def attention(bits: int) -> dict[str, Any]:
    return {"rule": "attention", "bits": bits}


def all_but_routed(bits: int) -> list[dict[str, Any]]:
    return [{"rule": kind, "bits": bits} for kind in ("attention", "shared", "dense")]


def experts(num: int, scope: str = "block") -> dict[str, Any]:
    return {"rule": "random_experts", "num": num, "seed": 0, "scope": scope, "bits": 4}


def first(num: int) -> dict[str, Any]:
    return {"rule": "first_blocks", "num": num, "bits": 4}


ROWS: list[tuple[str, list[dict[str, Any]], str]] = [
    ("mixtral", [attention(4)], "2.058"),
    ("mixtral", [attention(8)], "2.173"),
    ("mixtral", [attention(4), first(4)], "2.301"),
    ("mixtral", [attention(4), {"rule": "last_blocks", "num": 4, "bits": 4}], "2.301"),
    ("mixtral", [attention(4), {"rule": "random_blocks", "num": 4, "seed": 1, "bits": 4}], "2.301"),
    ("mixtral", [attention(4), experts(2)], "2.543"),
    ("mixtral", [attention(4), first(8)], "2.543"),
    ("mixtral", [attention(4), {"rule": "random_linears", "share": 0.25, "seed": 0, "bits": 4}], "2.543"),
    *[
        ("mixtral", [attention(4), {"rule": "linear", "linear": name, "bits": 4}], "2.705")
        for name in ("gate_proj", "up_proj", "down_proj")
    ],
    ("mixtral", [attention(4), experts(3)], "2.786"),
    ("mixtral", [attention(4), experts(4)], "3.029"),
    ("mixtral", [attention(4), first(16)], "3.029"),
    ("mixtral", [attention(4), first(24)], "3.514"),
    ("mixtral", [experts(8, "model")], "2.061"),
    ("mixtral", [attention(4), experts(126, "model")], "3.014"),
    ("deepseek", [attention(4), {"rule": "dense", "bits": 4}], "2.067"),
    ("deepseek", [attention(4), {"rule": "shared", "bits": 4}], "2.117"),
    ("deepseek", all_but_routed(4), "2.126"),
    ("deepseek", all_but_routed(8), "2.378"),
    *[
        ("deepseek", [*all_but_routed(4), experts(num)], bits)
        for num, bits in zip(
            (6, 10, 15, 20, 25, 30), ["2.302", "2.419", "2.565", "2.712", "2.858", "3.004"], strict=True
        )
    ],
    *[
        ("deepseek", [*all_but_routed(8), experts(num)], bits)
        for num, bits in zip(
            (6, 10, 15, 20, 25, 30), ["2.553", "2.671", "2.817", "2.963", "3.110", "3.256"], strict=True
        )
    ],
    ("deepseek", [attention(4), first(4)], "2.282"),
    ("deepseek", [attention(4), first(8)], "2.568"),
]


@pytest.fixture(scope="module")
def shapes() -> dict[str, list[WeightShape]]:
    """Weights of both models, found by the adapter on models without memory."""
    found = {}
    for name, family, overrides in (("mixtral", "mixtral", MIXTRAL), ("deepseek", "qwen2_moe", DEEPSEEK)):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**overrides))
        module = MoEQuantModule()
        module._models["model"] = model

        found[name] = module.weight_shapes()
    return found


@pytest.mark.parametrize(("model", "rules", "printed"), ROWS)
def test_average_bits_of_a_configuration_recompute_to_the_printed_digits(
    model: str, rules: list[dict[str, Any]], printed: str, shapes: dict[str, list[WeightShape]]
) -> None:
    weights = shapes[model]
    base = uniform_plan(weights, GridSpec(bits=2, group_size=64))
    _, effects = apply_rules(base, [make_rule(rule) for rule in rules], weights, None)
    assert f"{effects[-1].after.code_bits:.3f}" == printed


@pytest.mark.parametrize(
    ("model", "shares"),
    [
        ("mixtral", {"attention": 2.89, "routed": 97.11}),
        ("deepseek", {"attention": 2.94, "dense": 0.42, "routed": 93.71, "shared": 2.93}),
    ],
)
def test_shares_of_the_structures_are_those_of_the_published_models(
    model: str, shares: dict[str, float], shapes: dict[str, list[WeightShape]]
) -> None:
    weights = shapes[model]
    total = sum(w.numel for w in weights)
    found = {kind: 100 * sum(w.numel for w in weights if w.kind == kind) / total for kind in shares}
    assert {kind: round(value, 2) for kind, value in found.items()} == shares
    assert sum(found.values()) == pytest.approx(100)


def test_scales_and_zero_points_of_128_weights_cost_an_eighth_of_a_bit_and_the_zero_point(
    shapes: dict[str, list[WeightShape]],
) -> None:
    weights = shapes["mixtral"]
    for symmetric, overhead in ((True, 16 / 128), (False, (16 + 2) / 128)):
        cost = plan_cost(uniform_plan(weights, GridSpec(2, 128, symmetric)), weights)
        assert cost.average_bits - cost.code_bits == pytest.approx(overhead)


def test_active_weights_are_those_of_two_of_eight_experts(shapes: dict[str, list[WeightShape]]) -> None:
    weights = shapes["mixtral"]
    cost = plan_cost(uniform_plan(weights, GridSpec(2, 128), {"attention": 4}), weights)
    attention_numel = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024)
    active_experts = 32 * 2 * 3 * 4096 * 14336
    assert cost.active_code_bits == pytest.approx(
        (4 * attention_numel + 2 * active_experts) / (attention_numel + active_experts)
    )
    assert cost.active_bytes == pytest.approx(cost.active_average_bits * (attention_numel + active_experts) / 8)
