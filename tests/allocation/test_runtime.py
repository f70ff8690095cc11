from dataclasses import replace

import pytest

from moeq.allocation.plan import uniform_plan
from moeq.allocation.runtime import RUNTIMES, check_runtime, find_runtime, shared_width_units
from moeq.quant.spec import GridSpec, WeightShape
from tests.allocation.toy import toy_weights

WEIGHTS = toy_weights(num_blocks=2, num_experts=3)
GRID = GridSpec(bits=4, group_size=32)


def units(runtime: str, weights: list[WeightShape] = WEIGHTS) -> set[frozenset[str]]:
    return {frozenset(w.name for w in unit) for unit in shared_width_units(weights, find_runtime(runtime))}


def test_every_weight_is_in_exactly_one_unit_of_every_runtime() -> None:
    for runtime in RUNTIMES:
        names = [name for unit in units(runtime) for name in unit]
        assert sorted(names) == sorted(w.name for w in WEIGHTS)


def test_research_gives_every_weight_its_own_width() -> None:
    assert {len(unit) for unit in units("research")} == {1}


def test_gptqmodel_joins_the_linears_of_each_expert_only() -> None:
    joined = {unit for unit in units("gptqmodel") if len(unit) > 1}
    assert joined == {
        frozenset(f"model.layers.{block}.mlp.experts.{e}.{leaf}" for leaf in ("gate_proj", "up_proj", "down_proj"))
        for block in range(2)
        for e in range(3)
    }


def test_vllm_joins_the_experts_of_a_block_and_the_linears_that_it_fuses() -> None:
    of_block_0 = {unit for unit in units("vllm") if all(".layers.0." in name for name in unit)}
    path = "model.layers.0"
    assert of_block_0 == {
        frozenset(w.name for w in WEIGHTS if w.block == 0 and w.kind == "routed"),
        frozenset(f"{path}.self_attn.{leaf}" for leaf in ("q_proj", "k_proj", "v_proj")),
        frozenset({f"{path}.self_attn.o_proj"}),
        frozenset(f"{path}.mlp.shared_expert.{leaf}" for leaf in ("gate_proj", "up_proj")),
        frozenset({f"{path}.mlp.shared_expert.down_proj"}),
    }
    assert len(units("vllm")) == 2 * len(of_block_0)


def test_vllm_joins_the_first_projections_of_latent_attention() -> None:
    leaves = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
    weights = [WeightShape(f"m.0.self_attn.{leaf}", "attention", 32, 32, 0, leaf) for leaf in leaves]
    assert {len(unit) for unit in units("vllm", weights)} == {1, 2}
    assert frozenset({"m.0.self_attn.q_a_proj", "m.0.self_attn.kv_a_proj_with_mqa"}) in units("vllm", weights)


def test_uniform_experts_joins_all_experts_of_the_model_and_nothing_else() -> None:
    assert {unit for unit in units("uniform_experts") if len(unit) > 1} == {
        frozenset(w.name for w in WEIGHTS if w.kind == "routed")
    }


@pytest.mark.parametrize(
    ("runtime", "name", "bits", "message"),
    [
        (
            "gptqmodel",
            "experts.1.up_proj",
            8,
            r"has 8g32, .*experts.1.gate_proj has 4g32: gptqmodel reads one width for",
        ),
        ("vllm", "experts.1.up_proj", 8, r"vllm reads one width for these 9 weights; make them equal, or use research"),
        ("vllm", "self_attn.k_proj", 8, r"k_proj has 8g32, .*q_proj has 4g32"),
        (
            "vllm",
            "self_attn.o_proj",
            3,
            r"o_proj: vllm cannot read 3g32; it reads 2, 4, 8 bits in groups of 32, 64, 128",
        ),
        ("gptqmodel", "self_attn.o_proj", 5, "gptqmodel cannot read 5g32; it reads 2, 3, 4, 8 bits"),
        (
            "uniform_experts",
            "layers.1.mlp.experts.1.up_proj",
            8,
            "uniform_experts reads one width for these 18 weights",
        ),
    ],
)
def test_a_plan_that_a_runtime_cannot_read_is_refused_by_weight(
    runtime: str, name: str, bits: int, message: str
) -> None:
    plan = uniform_plan(WEIGHTS, GRID)
    check_runtime(plan, WEIGHTS, find_runtime(runtime))
    changed = next(w.name for w in WEIGHTS if w.name.endswith(name))
    plan[changed] = replace(plan[changed], bits=bits)
    check_runtime(plan, WEIGHTS, find_runtime("research"))
    with pytest.raises(ValueError, match=message):
        check_runtime(plan, WEIGHTS, find_runtime(runtime))


def test_group_sizes_that_a_runtime_cannot_read_are_refused() -> None:
    with pytest.raises(ValueError, match="vllm cannot read 4g16"):
        check_runtime(uniform_plan(WEIGHTS, replace(GRID, group_size=16)), WEIGHTS, find_runtime("vllm"))


def test_an_unknown_runtime_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"runtime \(tgi\) must be one of research, gptqmodel, vllm, uniform_experts"):
        find_runtime("tgi")
