from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from moeq.models.adapter import Adapter, Site
from moeq.models.observe import observe, observe_routing
from moeq.quant.spec import Routing
from tests.tiny import tiny_model

FAMILIES = ("qwen2_moe", "mixtral", "deepseek_v3")
Rows = dict[tuple[str, int], list[tuple[Tensor, Tensor]]]


def observed(model: nn.Module, ids: Tensor, mask: Tensor | None = None, routing: Routing = "routed") -> Rows:
    """Rows and affinities of every site of block 1, as the hooks hand them over."""
    adapter, rows = Adapter(model), {}

    def on_rows(site: Site, expert: int, x: Tensor, affinity: Tensor | None) -> None:
        rows.setdefault((site.name, expert), []).append((x, torch.ones(len(x)) if affinity is None else affinity))

    with observe(adapter, adapter.sites(1), on_rows, routing) as token_mask:
        token_mask.keep = None if mask is None else mask.flatten().bool()
        model(ids, attention_mask=mask)
    return rows


def hessian(rows: list[tuple[Tensor, Tensor]], power: float) -> Tensor:
    return sum((x.T * c**power) @ x for x, c in rows)


def record_inputs(model: nn.Module, ids: Tensor, path: str, mask: Tensor | None) -> tuple[Tensor, ...]:
    """Positional inputs of one module in a forward pass."""
    seen: list[tuple[Tensor, ...]] = []
    handle = model.get_submodule(path).register_forward_pre_hook(lambda _, args: seen.append(args))
    model(ids, attention_mask=mask)
    handle.remove()
    return seen[0]


def reference_expert_hessians(
    model: nn.Module, ids: Tensor, mask: Tensor | None, power: float
) -> dict[tuple[str, int], Tensor]:
    """Token by token, slot by slot, in Python: x x^T of every routed pair, weighted by its own affinity."""
    path = "model.layers.1.mlp.experts"
    experts = model.get_submodule(path)
    hidden, ids_TK, weights_TK = record_inputs(model, ids, path, mask)
    keep = torch.ones(len(hidden)) if mask is None else mask.flatten()
    result: dict[tuple[str, int], Tensor] = {}
    for token in range(len(hidden)):
        if not keep[token]:
            continue
        for slot in range(ids_TK.shape[1]):
            expert, c, x = int(ids_TK[token, slot]), float(weights_TK[token, slot]), hidden[token]
            gate, up = (experts.gate_up_proj[expert] @ x).chunk(2)
            inner = torch.nn.functional.silu(gate) * up
            for name, row in ((f"{path}.gate_proj+up_proj", x), (f"{path}.down_proj", inner)):
                key = (name, expert)
                result[key] = result.get(key, torch.zeros(len(row), len(row))) + c**power * torch.outer(row, row)
    return result


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_with_all_experts_each_expert_sees_every_token_and_the_output_stays(family: str, padded: bool) -> None:
    model = tiny_model(family)
    ids = torch.randint(1, 257, (3, 17))
    mask = torch.ones_like(ids)
    mask[0, 12:] = 0 if padded else 1
    path, experts = "model.layers.1.mlp.experts", model.get_submodule("model.layers.1.mlp.experts")
    rows = {key: value for key, value in observed(model, ids, mask, "all_experts").items() if path in key[0]}
    # The inputs of gate and up, which all experts share, once.
    assert set(rows) == {(f"{path}.gate_proj+up_proj", 0), *((f"{path}.down_proj", e) for e in range(8))}
    hidden = record_inputs(model, ids, path, mask)[0].reshape(-1, 64)[mask.flatten().bool()]
    for (name, expert), ((x, affinity),) in rows.items():
        gate, up = (experts.gate_up_proj[expert] @ hidden.T).T.chunk(2, dim=-1)
        expected = hidden if "gate" in name else torch.nn.functional.silu(gate) * up
        torch.testing.assert_close(x, expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(affinity, torch.ones(len(hidden)))
    plain = model(ids, attention_mask=mask).logits
    with observe(adapter := Adapter(model), adapter.sites(1), lambda *_: None, "all_experts"):
        torch.testing.assert_close(model(ids, attention_mask=mask).logits, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("power", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_hessian_of_every_expert_equals_a_loop_over_tokens(family: str, padded: bool, power: float) -> None:
    model = tiny_model(family)
    ids = torch.randint(1, 257, (3, 17))
    mask = torch.ones_like(ids)
    if padded:
        mask[0, 12:] = 0
        mask[2, 5:] = 0
    given = mask if padded else None
    rows = observed(model, ids, given)
    expected = reference_expert_hessians(model, ids, given, power)
    routed = {key for key in rows if ".experts." in key[0] and sum(len(x) for x, _ in rows[key])}
    assert routed == set(expected)
    for key, reference in expected.items():
        torch.testing.assert_close(hessian(rows[key], power), reference, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("family", [*FAMILIES, "gpt_oss"])
def test_experts_observed_together_show_the_rows_of_each_and_compute_the_same(family: str, padded: bool) -> None:
    model = tiny_model(family)
    ids = torch.randint(1, 257, (3, 17))
    mask = torch.ones_like(ids)
    mask[0, 12:] = 0 if padded else 1
    given = mask if padded else None
    expected = {key: rows[0] for key, rows in observed(model, ids, given).items() if ".experts." in key[0]}
    plain = model(ids, attention_mask=given).logits
    adapter, found = Adapter(model), {}

    def on_groups(site: Site, x_NI: Tensor, affinity_N: Tensor, starts: list[int]) -> None:
        for expert, (start, stop) in enumerate(pairwise(starts)):
            if stop > start:
                found[site.name, expert] = x_NI[start:stop], affinity_N[start:stop]

    with observe(adapter, adapter.sites(1), lambda *_: None, on_groups=on_groups) as token_mask:
        token_mask.keep = mask.flatten().bool() if padded else None
        torch.testing.assert_close(model(ids, attention_mask=given).logits, plain, rtol=1e-4, atol=1e-4)
    shown = {key: rows for key, rows in expected.items() if len(rows[0])}
    assert found.keys() == shown.keys()
    for key, (x_NI, affinity_N) in shown.items():
        torch.testing.assert_close(found[key][0], x_NI, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found[key][1], affinity_N, rtol=1e-5, atol=1e-6)


def test_shared_expert_rows_carry_the_sigmoid_of_their_own_gate() -> None:
    model = tiny_model("qwen2_moe")
    ids = torch.randint(1, 257, (2, 9))
    rows = observed(model, ids)
    hidden = record_inputs(model, ids, "model.layers.1.mlp.shared_expert", None)[0].reshape(-1, 64)
    gate = model.get_submodule("model.layers.1.mlp.shared_expert_gate")
    for leaf in ("gate_proj", "down_proj"):
        ((_, affinity),) = rows[f"model.layers.1.mlp.shared_expert.{leaf}", 0]
        torch.testing.assert_close(affinity, gate(hidden).sigmoid()[:, 0])


def test_attention_and_ungated_shared_experts_have_no_affinity() -> None:
    model = tiny_model("deepseek_v3")
    rows = observed(model, torch.randint(1, 257, (1, 8)))
    for name in ("self_attn.q_a_proj", "self_attn.o_proj", "mlp.shared_experts.down_proj"):
        ((x, affinity),) = rows[f"model.layers.1.{name}", 0]
        assert len(x) == 8
        assert torch.equal(affinity, torch.ones(8))


@pytest.mark.parametrize("family", FAMILIES)
def test_observing_changes_no_logit_and_leaves_no_hook(family: str) -> None:
    model = tiny_model(family)
    ids = torch.randint(1, 257, (2, 7))
    before = model(ids).logits
    adapter = Adapter(model)
    with observe(adapter, adapter.sites(1), lambda *_: None):
        torch.testing.assert_close(model(ids).logits, before, rtol=1e-4, atol=1e-5)
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert torch.equal(model(ids).logits, before)


def test_hooks_come_off_when_the_forward_fails() -> None:
    model = tiny_model("qwen2_moe")
    adapter = Adapter(model)

    def fail(*_: object) -> None:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"), observe(adapter, adapter.sites(1), fail):
        model(torch.ones(1, 4, dtype=torch.long))
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert not any(hasattr(module, "moeq_observer") for module in model.modules())


def test_linears_with_different_inputs_may_not_share_a_hessian() -> None:
    model = tiny_model("qwen3_moe")
    attention = model.get_submodule("model.layers.1.self_attn")
    adapter = Adapter(model)
    attention.v_proj.register_forward_pre_hook(lambda _, args: (args[0] + 1,))
    with (
        pytest.raises(ValueError, match="do not read the same input"),
        observe(adapter, adapter.sites(1), lambda *_: None),
    ):
        model(torch.ones(1, 4, dtype=torch.long))


def test_routing_is_reported_by_path() -> None:
    model = tiny_model("mixtral")
    seen = {}
    with observe_routing(
        Adapter(model).expert_modules(), lambda path, ids, weights: seen.update({path: (ids, weights)})
    ):
        model(torch.ones(1, 5, dtype=torch.long))
    assert list(seen) == [f"model.layers.{block}.mlp.experts" for block in (0, 1)]
    assert all(ids.shape == weights.shape == (5, 2) for ids, weights in seen.values())
