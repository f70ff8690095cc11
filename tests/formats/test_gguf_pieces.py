"""Pieces of weights are the same of codes as of values."""

import pytest
import torch

from moeq.formats.gguf_pieces import Piece, halves, turned_keys, turned_queries
from moeq.formats.gguf_recurrent import QWEN3_5, grouped_projection
from tests.export.rounding import real_weight, round_weight
from tests.tiny import tiny_config

ROWS, COLUMNS = 48, 64


@pytest.mark.parametrize("grid", [(4, 16, True), (3, 32, False), (4, None, False)])
@pytest.mark.parametrize(
    "piece",
    [
        Piece("a"),
        Piece("a", torch.randperm(ROWS)[:20]),
        Piece("a", columns=torch.arange(COLUMNS).view(2, 32).flip(0).flatten()),
        Piece("a", torch.arange(ROWS).flip(0), columns=torch.arange(COLUMNS).view(2, 32).flip(0).flatten()),
    ],
)
def test_rows_and_columns_of_codes_have_their_scales(piece: Piece, grid: tuple[int, int | None, bool]) -> None:
    weight = round_weight(torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0)).bfloat16(), *grid)
    piece.check_groups(grid[1])
    assert torch.equal(real_weight(piece.of_codes(weight)), piece.of_values(real_weight(weight)))


def test_columns_that_take_groups_apart_are_refused() -> None:
    piece = Piece("a", columns=torch.arange(COLUMNS).view(4, 16).flip(0).flatten())
    piece.check_groups(16)
    piece.check_groups(None)
    with pytest.raises(ValueError, match="takes groups of 32 apart"):
        piece.check_groups(32)


def test_neighbours_turn_as_halves_turned() -> None:
    config = tiny_config("mixtral")  # 4 heads of 16, two of which share keys
    for make, heads in ((turned_queries("q"), 4), (turned_keys("k"), 2)):
        (piece,) = make(config, (16 * heads, 64))
        assert piece.rows is not None
        for head, row in ((0, 0), (heads - 1, 5)):
            pair = piece.rows[16 * head + 2 * row : 16 * head + 2 * row + 2].tolist()
            assert pair == [16 * head + row, 16 * head + row + 8]


def test_a_projection_by_heads_is_taken_apart_by_what_it_holds() -> None:
    config = tiny_config("qwen3_next")  # 2 heads of keys, 4 of values, all of 16
    mixed, gate = grouped_projection(config, (192, 64))
    assert mixed.rows is not None
    assert gate.rows is not None
    assert mixed.rows[:32].tolist() == [*range(16), *range(96, 112)]  # queries of both heads
    assert gate.rows.tolist() == [*range(64, 96), *range(160, 192)]
    assert sorted(torch.cat([mixed.rows, gate.rows]).tolist()) == list(range(192))


def test_values_of_the_delta_rule_stand_by_their_place_under_a_head_of_keys() -> None:
    config = tiny_config("qwen3_5_moe_text")  # heads 0, 1 of values share head 0 of keys
    (piece,) = QWEN3_5["linear_attn.in_proj_b"](config, (4, 64))
    assert piece.rows is not None
    assert piece.rows.tolist() == [0, 2, 1, 3]


def test_two_projections_in_one_are_cut_in_the_middle() -> None:
    first, second = halves("gate", "up")(None, (6, 4))
    values = torch.arange(24).view(6, 4)
    assert torch.equal(first.of_values(values), values[:3])
    assert torch.equal(second.of_values(values), values[3:])
