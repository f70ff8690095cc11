import pytest
import torch
from torch import Tensor, nn

from moeq.decoding.cache import GrowingLayer
from moeq.decoding.decode_attention import NAME, decode_attention, decoding
from moeq.sampling.ebss import EBSSSpec, search
from moeq.sampling.next_token import ModelNextToken
from tests.tiny import tiny_model

ROWS, HEADS, GROUPS, LENGTH, SIZE = 3, 2, 2, 70, 16


def reference_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """Each row and head by itself, in float64."""
    out = torch.empty(query.shape[0], 1, query.shape[1], value.shape[-1], dtype=torch.float64)
    for row in range(query.shape[0]):
        for head in range(query.shape[1]):
            keys, values = key[row, head // GROUPS].double(), value[row, head // GROUPS].double()
            out[row, 0, head] = (scaling * keys @ query[row, head, 0].double()).softmax(-1) @ values
    return out


def inputs(dtype: torch.dtype, num_queries: int = 1) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    keys, values = torch.randn(ROWS, HEADS, LENGTH, SIZE), torch.randn(ROWS, HEADS, LENGTH, 8)
    layer = GrowingLayer(keys[..., :-1, :].to(dtype), values[..., :-1, :].to(dtype))
    key, value = layer.update(keys[..., -1:, :].to(dtype), values[..., -1:, :].to(dtype))
    module = nn.Module()
    module.num_key_value_groups = GROUPS  # type: ignore[assignment]
    return module, torch.randn(ROWS, HEADS * GROUPS, num_queries, SIZE).to(dtype), key, value


def refuse(*_: object, **__: object) -> None:
    raise AssertionError("sdpa was called")


@pytest.mark.parametrize("scaling", [None, 0.3])
def test_one_bfloat16_query_per_row_is_attention(monkeypatch: pytest.MonkeyPatch, scaling: float | None) -> None:
    monkeypatch.setattr("moeq.decoding.decode_attention.sdpa_attention_forward", refuse)
    module, query, key, value = inputs(torch.bfloat16)
    out, weights = decode_attention(module, query, key, value, None, scaling=scaling)
    reference = reference_attention(query, key, value, SIZE**-0.5 if scaling is None else scaling)
    assert weights is None
    assert out.shape == reference.shape
    assert torch.allclose(out.double(), reference, atol=0.02)


def test_a_mask_hides_positions_of_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moeq.decoding.decode_attention.sdpa_attention_forward", refuse)
    module, query, key, value = inputs(torch.bfloat16)
    mask = torch.rand(ROWS, 1, 1, LENGTH) < 0.5
    out, _ = decode_attention(module, query, key, value, mask)
    for row in range(ROWS):
        seen_T = mask[row, 0, 0]
        one = [x[row : row + 1] for x in (query, key[:, :, seen_T], value[:, :, seen_T])]
        assert torch.allclose(out[row : row + 1].double(), reference_attention(*one, SIZE**-0.5), atol=0.02)


def test_attention_with_an_indexer_keeps_its_sparse_mask() -> None:
    model = tiny_model("deepseek_v32")  # chooses 4 tokens
    ids = torch.arange(1, 21)[None]
    expected = model(input_ids=ids, use_cache=False).logits
    with decoding(model):
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, expected)


@pytest.mark.parametrize("case", ["float32", "mask of heads", "prefill", "plain cache", "softcap"])
def test_everything_else_is_left_to_sdpa(monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    monkeypatch.setattr("moeq.decoding.decode_attention.sdpa_attention_forward", refuse)
    dtype = torch.float32 if case == "float32" else torch.bfloat16
    module, query, key, value = inputs(dtype, num_queries=2 if case == "prefill" else 1)
    mask = torch.ones(ROWS, HEADS * GROUPS, 1, LENGTH, dtype=torch.bool) if case == "mask of heads" else None
    key = key.clone() if case == "plain cache" else key
    with pytest.raises(AssertionError, match="sdpa was called"):
        decode_attention(module, query, key, value, mask, softcap=30.0 if case == "softcap" else None)


def test_the_attention_of_a_model_is_its_own_again_afterwards() -> None:
    model = tiny_model("qwen2_moe")
    with ModelNextToken(model):
        assert model.config._attn_implementation == NAME
    assert model.config._attn_implementation == "sdpa"
    with pytest.raises(RuntimeError, match="stop"), ModelNextToken(model):
        raise RuntimeError("stop")
    assert model.config._attn_implementation == "sdpa"


def test_a_model_that_cannot_use_sdpa_keeps_its_attention() -> None:
    model = tiny_model("gpt_oss")
    before = model.config._attn_implementation
    assert before != "sdpa"
    with decoding(model):
        assert model.config._attn_implementation == before


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3"])
def test_bfloat16_log_probabilities_are_those_of_eager_attention(family: str) -> None:
    model = tiny_model(family, dtype=torch.bfloat16)
    ids = torch.tensor([[5, 9, 60, 201, 33, 80, 3]])
    rows = []
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        with ModelNextToken(model) as next_token:
            next_token.prefill(ids[:, :1])
            rows.append([next_token.step(torch.tensor([0]), token)[0] for token in ids[0, 1:, None]])
    assert torch.allclose(torch.cat(rows[0]), torch.cat(rows[1]), atol=0.15)


def test_the_search_runs_in_bfloat16() -> None:
    with ModelNextToken(tiny_model("olmoe", dtype=torch.bfloat16)) as next_token:
        sampled = search(
            next_token, EBSSSpec(length=12, branches=2, mode="stochastic"), torch.tensor([4, 8]), torch.Generator()
        )
    assert sampled.counts_NLE.sum() == 2 * 2 * 2 * 12
