"""Rows of heads that llama.cpp turns by neighbours, and keys of blocks with several streams."""

import torch

from moeq.formats.gguf_streams import HY_V4, deepseek_v4
from tests.tiny import tiny_config


def test_the_last_rows_of_each_head_are_put_in_turn() -> None:
    config = tiny_config("hy_v4", qk_nope_head_dim=8, qk_rope_head_dim=6)
    weight_OI = torch.arange(4 * 14).unsqueeze(1)
    (piece,) = HY_V4["self_attn.q_b_proj"](config, tuple(weight_OI.shape))
    order = [0, 1, 2, 3, 4, 5, 6, 7, 8, 11, 9, 12, 10, 13]
    assert piece.of_values(weight_OI).flatten().tolist() == [14 * head + row for head in range(4) for row in order]


def test_keys_and_norms_of_an_indexer_have_one_order() -> None:
    config = tiny_config("hy_v4")
    size = config.index_head_dim
    shapes = {"wk": (size, 64), "k_norm.weight": (size,), "k_norm.bias": (size,)}
    orders = [HY_V4[f"self_attn.indexer.{name}"](config, shape)[0].rows for name, shape in shapes.items()]
    assert all(rows is not None and torch.equal(rows, torch.cat(orders[:1])) for rows in orders)


def test_blocks_are_told_by_how_many_tokens_a_key_is_made_of() -> None:
    kinds = ["sliding_attention", "heavily_compressed_attention", "compressed_sparse_attention"]
    found = deepseek_v4(
        tiny_config("deepseek_v4", num_hidden_layers=3, layer_types=kinds, mlp_layer_types=["hash_moe", "moe", "moe"])
    )
    assert (found["attention.compress_ratios"], found["hash_layer_count"]) == ([0, 128, 4], 1)
    assert (found["rope.freq_base"], found["attention.compress_rope_freq_base"]) == (1e4, 16e4)
