from typing import Any

import pytest
import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from moeq.decoding.cache import CHUNK, STORE, GrowingCache, GrowingLayer, grow_in_place
from moeq.sampling.next_token import ModelNextToken
from tests.tiny import MOE_FAMILIES, tiny_model


def prefilled(rows: int, length: int, layers: int = 2) -> DynamicCache:
    """A cache whose values have another head size than its keys, as in MLA."""
    cache = DynamicCache()
    for layer in range(layers):
        cache.update(torch.randn(rows, 2, length, 3), torch.randn(rows, 2, length, 4), layer)
    return cache


def append(caches: list[Any], rows: int) -> None:
    for layer in range(2):
        keys, values = torch.randn(rows, 2, 1, 3), torch.randn(rows, 2, 1, 4)
        held = [cache.update(keys, values, layer) for cache in caches]
        assert all(torch.equal(one, held[0][part]) for pair in held for part, one in enumerate(pair))


@pytest.mark.parametrize("likely", [0.05, 0.5])
def test_growing_and_reordering_give_what_the_cache_of_transformers_gives(likely: float) -> None:
    torch.manual_seed(0)
    theirs = prefilled(3, 2)
    ours = grow_in_place(theirs, 3)
    assert isinstance(ours, GrowingCache)
    assert ours.num_in_place == 2
    reference = DynamicCache()
    for layer in range(2):
        reference.update(theirs.layers[layer].keys, theirs.layers[layer].values, layer)
    rows = 3
    for step in range(2 * CHUNK + 5):
        index = torch.arange(rows)
        if step in (4, 90):  # another number of rows
            index = torch.arange(3).repeat_interleave(2) if step == 4 else torch.tensor([5, 0, 3])
        else:
            changed = torch.rand(rows) < likely
            index[changed] = torch.randint(rows, (rows,))[changed]
        rows = len(index)
        for cache in (ours, reference):
            cache.reorder_cache(index)
        append([ours, reference], rows)
    assert ours.get_seq_length() == reference.get_seq_length() == 2 * CHUNK + 7


def test_a_row_taken_over_by_a_sister_costs_the_tokens_since_they_parted(monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[list[int]] = []
    copy = GrowingLayer.copy_positions

    def recording(layer: GrowingLayer, to_P: torch.Tensor, from_P: torch.Tensor, position_P: torch.Tensor) -> None:
        copied.append(position_P.tolist())
        copy(layer, to_P, from_P, position_P)

    monkeypatch.setattr(GrowingLayer, "copy_positions", recording)
    cache = grow_in_place(prefilled(1, 20), 1)
    cache.reorder_cache(torch.tensor([0, 0, 0]))
    for index in ([0, 1, 2], [1, 1, 2], [1, 1, 2], [0, 2, 2]):
        cache.reorder_cache(torch.tensor(index))
        append([cache], 3)
    # Rows 0 and 1 had parted at 20, and again at 21; row 1 takes over row 2, from which it parted at 20.
    assert copied[2:] == [[20]] * 2 + [[21]] * 2 + [[20, 21, 22]] * 2


def test_only_plain_layers_are_replaced() -> None:
    cache = prefilled(2, 3)
    cache.layers.append(DynamicSlidingWindowLayer(8))
    cache.layers.append(DynamicLayer())  # never used: shares the keys of another one
    grown = grow_in_place(cache, 2)
    assert [type(layer) for layer in grown.layers] == [
        GrowingLayer, GrowingLayer, DynamicSlidingWindowLayer, DynamicLayer
    ]  # fmt: skip

    class FamilyCache(DynamicCache):
        pass

    special = FamilyCache()
    assert grow_in_place(special, 2) is special
    empty = DynamicCache()
    assert grow_in_place(empty, 2) is empty


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_layers_in_place_are_those_without_a_window(family: str) -> None:
    with ModelNextToken(tiny_model(family)) as next_token:
        assert next_token.layers_in_place == 0
        next_token.prefill(torch.tensor([[1], [2]]))
        assert next_token.layers_in_place == (1 if family == "gpt_oss" else 2)


def test_room_is_added_by_the_chunk_and_holds_finite_numbers() -> None:
    layer = GrowingLayer(torch.ones(1, 1, CHUNK - 1, 2), torch.ones(1, 1, CHUNK - 1, 2))
    for room in (CHUNK, 2 * CHUNK):
        keys, _ = layer.update(torch.ones(1, 1, 1, 2), torch.ones(1, 1, 1, 2))
        store = getattr(keys, STORE)
        assert store.shape[2] == room
        assert torch.equal(store[:, :, keys.shape[2] :], torch.zeros(1, 1, room - keys.shape[2], 2))
