from dataclasses import replace

import pytest

from moeq.allocation.plan import uniform_plan
from moeq.allocation.runtime import RUNTIMES, check_runtime, find_runtime, shared_width_units
from moeq.quant.spec import GridSpec, WeightShape
from tests.allocation.toy import toy_weights

WEIGHTS = toy_weights(num_blocks=2, num_experts=3)
GRID = GridSpec(bits=4, group_size=32, symmetric=True)


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


@pytest.mark.parametrize("runtime", ["llama.cpp", "mlx"])
def test_llama_cpp_and_mlx_join_the_experts_of_one_projection_and_block(runtime: str) -> None:
    assert {unit for unit in units(runtime) if len(unit) > 1} == {
        frozenset(f"model.layers.{block}.mlp.experts.{e}.{leaf}" for e in range(3))
        for block in range(2)
        for leaf in ("gate_proj", "up_proj", "down_proj")
    }


@pytest.mark.parametrize("runtime", ["vllm", "sglang"])
def test_vllm_and_sglang_join_the_experts_of_a_block_and_the_linears_that_they_fuse(runtime: str) -> None:
    of_block_0 = {unit for unit in units(runtime) if all(".layers.0." in name for name in unit)}
    path = "model.layers.0"
    assert of_block_0 == {
        frozenset(w.name for w in WEIGHTS if w.block == 0 and w.kind == "routed"),
        frozenset(f"{path}.self_attn.{leaf}" for leaf in ("q_proj", "k_proj", "v_proj")),
        frozenset({f"{path}.self_attn.o_proj"}),
        frozenset(f"{path}.mlp.shared_expert.{leaf}" for leaf in ("gate_proj", "up_proj")),
        frozenset({f"{path}.mlp.shared_expert.down_proj"}),
    }
    assert len(units(runtime)) == 2 * len(of_block_0)


def test_vllm_joins_the_first_projections_of_latent_attention() -> None:
    leaves = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
    weights = [WeightShape(f"m.0.self_attn.{leaf}", "attention", 32, 32, 0, leaf) for leaf in leaves]
    assert {len(unit) for unit in units("vllm", weights)} == {1, 2}
    assert frozenset({"m.0.self_attn.q_a_proj", "m.0.self_attn.kv_a_proj_with_mqa"}) in units("vllm", weights)


@pytest.mark.parametrize(
    ("runtime", "name", "changes", "message"),
    [
        (
            "gptqmodel", "experts.1.up_proj", {"bits": 8},
            r"has 8g32 \(int8\), .*experts.1.gate_proj has 4g32 \(int4\): gptqmodel reads one type for these 3 weights",
        ),
        (
            "vllm", "experts.1.up_proj", {"bits": 8},
            "vllm reads one type for these 9 weights; make them equal, or use research",
        ),
        ("sglang", "experts.1.up_proj", {"bits": 8}, "sglang reads one type for these 9 weights"),
        ("vllm", "self_attn.k_proj", {"bits": 8}, r"k_proj has 8g32 \(int8\), .*q_proj has 4g32"),
        ("vllm", "self_attn.k_proj", {"group_size": 64}, r"k_proj has 4g64 \(int4\), .*q_proj has 4g32"),
        (
            "vllm", "self_attn.o_proj", {"bits": 8, "symmetric": False},
            r"o_proj: vllm cannot read 8g32: compressed-tensors has no type that holds 8 bits, groups of 32 \(exact\)",
        ),
        ("gptqmodel", "self_attn.o_proj", {"group_size": 8}, r"o_proj: gptqmodel cannot read 4g8: gptq has no type"),
        (
            "llama.cpp", "experts.1.up_proj", {"bits": 5},
            r"up_proj has 5g32 \(Q5_0\), .*0.up_proj has 4g32 \(Q4_0\): llama.cpp reads one type for these 3 weights",
        ),
        ("llama.cpp", "self_attn.o_proj", {"group_size": 16}, "o_proj: llama.cpp cannot read 4g16: gguf has no type"),
        ("mlx", "experts.1.up_proj", {"bits": 3}, r"has 3g32 \(affine3\), .* mlx reads one type for these 3 weights"),
        ("mlx", "self_attn.o_proj", {"group_size": 16}, "o_proj: mlx cannot read 4g16: mlx has no type that holds"),
    ],
)  # fmt: skip
def test_a_plan_that_a_runtime_cannot_read_is_refused_by_weight(
    runtime: str, name: str, changes: dict[str, int], message: str
) -> None:
    plan = uniform_plan(WEIGHTS, GRID)
    check_runtime(plan, WEIGHTS, find_runtime(runtime))
    changed = next(w.name for w in WEIGHTS if w.name.endswith(name))
    plan[changed] = replace(plan[changed], **changes)  # type: ignore[arg-type]
    check_runtime(plan, WEIGHTS, find_runtime("research"))
    with pytest.raises(ValueError, match=message):
        check_runtime(plan, WEIGHTS, find_runtime(runtime))


@pytest.mark.parametrize("runtime", ["llama.cpp", "vllm", "sglang"])
def test_grids_of_one_unit_may_differ_where_one_type_holds_them(runtime: str) -> None:
    experts = [w for w in WEIGHTS if w.block == 0 and w.kind == "routed"]
    plan = {w.name: replace(GRID, bits=2 + (w.expert or 0)) for w in experts}
    check_runtime(plan, experts, find_runtime(runtime))
    with pytest.raises(ValueError, match="reads one type"):
        check_runtime(plan, experts, find_runtime("mlx"))


@pytest.mark.parametrize(
    ("runtime", "grid", "exact", "native"),
    [
        ("llama.cpp", GridSpec(2, 64, symmetric=True), 2, 2),
        ("llama.cpp", GridSpec(2, 32, symmetric=True), 4, 4),
        ("llama.cpp", GridSpec(4, 64, symmetric=False), 5, 4),
        ("vllm", GridSpec(2, 64, symmetric=True), 4, 2),
        ("vllm", GridSpec(3, 64, symmetric=True), 4, None),
        ("sglang", GridSpec(2, 64, symmetric=True), 4, None),
        ("sglang", GridSpec(6, 64, symmetric=True), 8, None),
        ("sglang", GridSpec(4, 256, symmetric=True), None, None),
        ("mlx", GridSpec(3, 64, symmetric=False), 4, 3),
        ("mlx", GridSpec(8, 64, symmetric=False), None, 8),
        ("gptqmodel", GridSpec(3, 64, symmetric=False), 3, 3),
        ("gptqmodel", GridSpec(5, 64, symmetric=False), 8, 8),
    ],
)
def test_width_of_the_type_that_a_runtime_reads(
    runtime: str, grid: GridSpec, exact: int | None, native: int | None
) -> None:
    found = find_runtime(runtime)
    for mode, bits in (("exact", exact), ("native", native)):
        assert found.holds(grid, 256, mode) == (bits is not None)  # type: ignore[arg-type]
        if bits is not None:
            assert found.carrier(grid, 256, mode).bits == bits  # type: ignore[arg-type]
        assert not found.holds(grid, 48, mode)  # type: ignore[arg-type]


def test_a_width_that_a_runtime_has_no_kernel_for_names_those_that_it_has() -> None:
    with pytest.raises(ValueError, match=r"compressed-tensors \(native\) has it in 2 bits, and sglang reads 4, 8"):
        find_runtime("sglang").carrier(GridSpec(2, 64, symmetric=True), 64, "native")


def test_keeping_a_part_of_what_a_runtime_reads_as_one_is_refused() -> None:
    plan = uniform_plan(WEIGHTS, GRID)
    del plan["model.layers.1.mlp.experts.2.up_proj"]
    check_runtime(plan, WEIGHTS, find_runtime("research"))
    with pytest.raises(ValueError, match=r"experts.2.up_proj is kept as it is, and mlx reads these 3 weights in one"):
        check_runtime(plan, WEIGHTS, find_runtime("mlx"))


def test_an_unknown_runtime_names_the_known_ones() -> None:
    with pytest.raises(
        ValueError, match=r"runtime \(tgi\) must be one of research, llama.cpp, vllm, sglang, mlx, gptqmodel"
    ):
        find_runtime("tgi")
