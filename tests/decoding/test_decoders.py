"""Logits of rows that are decoded together are those of each row alone, whatever cache the family has."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moeq.decoding.decoders import CachedDecoder, Decoding, examine, make_decoder
from tests.tiny import tiny_model

# The way each kind of cache allows.  A sparse choice of 64 tokens is none at these lengths: with fewer, a family that
# has an indexer does not even agree with itself on a text and the beginning of it.
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2_moe": ("padding behind", {}),
    "deepseek_v3": ("padding behind", {}),
    "gpt_oss": ("padding in front", {}),
    "qwen3_next": ("padding in front", {}),
    "jamba": ("padding in front", {}),
    "lfm2_moe": ("padding in front", {}),
    "nemotron_h": ("padding in front", {}),
    "kimi_linear": ("padding in front", {}),
    "zaya": ("padding in front", {}),
    "deepseek_v4": ("padding in front", {}),
    "deepseek_v32": ("padding in front", {"index_topk": 64}),
    "minimax": ("equal lengths", {}),
    "axk2": ("no cache", {"index_topk": 64}),
    "qwen4_exp_text": ("no cache", {}),
}


def prompts(*lengths: int, seed: int = 0, shared: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    head = torch.randint(1, 250, (shared,), generator=generator).tolist()
    return [head + torch.randint(1, 250, (n,), generator=generator).tolist() for n in lengths]


@torch.no_grad()
def reference_logits(model: nn.Module, rows: list[list[int]]) -> Tensor:
    """Each row by itself, without a cache."""
    return torch.stack([model(input_ids=torch.tensor([row]), use_cache=False).logits[0, -1] for row in rows])


@pytest.mark.parametrize("family", WAYS)
def test_the_way_that_is_found_gives_the_logits_of_each_row_alone(family: str) -> None:
    way, overrides = WAYS[family]
    model = tiny_model(family, **overrides)
    decoding = examine(model, prompts(20, 30, 25, seed=1))
    assert decoding.way == way
    assert bool(decoding.reason) == (way in ("equal lengths", "no cache"))
    rows = prompts(*((3, 17, 1, 9) if decoding.any_lengths else (7, 7, 7, 7)), shared=18)
    decoder = make_decoder(model, decoding)
    found, expected = [decoder.start(rows)], [reference_logits(model, rows)]
    for index in ([2, 0, 0, 1, 3], [4, 1, 0], [0, 1, 2]):
        decoder.select(torch.tensor(index))
        rows = [rows[i] + [10 * place + 5] for place, i in enumerate(index)]
        found.append(decoder.step(torch.tensor([row[-1] for row in rows])))
        expected.append(reference_logits(model, rows))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


def test_tokens_that_all_prompts_begin_with_are_computed_once() -> None:
    model = tiny_model("qwen2_moe")
    seen: list[tuple[int, ...]] = []
    model.get_input_embeddings().register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape)))
    decoder = CachedDecoder(model, padding_behind=True)
    decoder.start(prompts(3, 9, shared=40))
    assert seen == [(1, 40), (2, 8), (2, 1)]
    seen.clear()
    decoder.start(prompts(3, 9, shared=4))  # too few to pay
    assert seen == [(2, 12), (2, 1)]
    seen.clear()
    decoder.start([[5] * 30] * 3)
    assert seen == [(1, 29), (3, 1)]
    seen.clear()
    decoder.start([[5]])
    assert seen == [(1, 1)]


def test_a_cache_that_forgets_which_rows_it_holds_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("olmoe")
    monkeypatch.setattr("moeq.decoding.decoders.reorder_cache", lambda cache, index: None)
    decoding = examine(model, prompts(20, 20, 20))
    assert decoding.way == "no cache"
    assert "its cache with equal lengths gives other logits" in decoding.reason


def test_a_family_whose_cache_raises_says_so() -> None:
    reason = examine(tiny_model("axk2", index_topk=64), prompts(20)).reason
    assert reason.startswith("its cache with padding in front raises ValueError: Cannot call `update_indexer`")


@pytest.mark.parametrize("family", ["qwen2_moe", "nemotron_h"])
def test_rounding_of_a_coarse_model_is_no_disagreement(family: str) -> None:
    assert not examine(tiny_model(family, dtype=torch.bfloat16), prompts(9, 1, 5)).reason


def test_prompts_of_one_token_can_be_examined() -> None:
    assert examine(tiny_model("mixtral"), [[5]]) == Decoding("padding behind")
