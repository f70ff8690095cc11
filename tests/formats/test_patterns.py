import random
import re

import pytest

from moeq.formats.patterns import patterns

EXPERTS = [
    f"model.layers.{b}.mlp.experts.{e}.{leaf}" for b in range(12) for e in range(4) for leaf in ("gate", "up", "down")
]
OTHERS = [f"model.layers.{b}.self_attn.{leaf}" for b in range(12) for leaf in ("q", "k", "o")] + ["lm_head", "a.b"]


@pytest.mark.parametrize("seed", range(6))
def test_patterns_match_the_chosen_names_of_a_universe_and_no_others(seed: int) -> None:
    draw = random.Random(seed)
    universe = EXPERTS + OTHERS
    blocks = set(draw.sample(range(12), 5))
    chosen = [name for name in universe if draw.random() < 0.1 or any(f".{b}." in name for b in blocks)]
    found = patterns(chosen, universe)
    assert {name for name in universe if any(re.fullmatch(rule, name) for rule in found)} == set(chosen)


def test_a_whole_kind_of_weights_is_one_pattern_and_so_are_some_blocks_of_it() -> None:
    assert patterns(EXPERTS, EXPERTS + OTHERS) == [r"model\.layers\.\d+\.mlp\.experts\.\d+\.(down|gate|up)"]
    some = [name for name in EXPERTS if ".layers.3." in name or ".layers.11." in name]
    assert patterns(some, EXPERTS) == [r"model\.layers\.(3|11)\.mlp\.experts\.\d+\.(down|gate|up)"]


def test_single_experts_and_names_without_numbers_are_spelled_out() -> None:
    assert patterns(["model.layers.0.mlp.experts.2.up", "lm_head"], EXPERTS + OTHERS) == [
        "lm_head",
        r"model\.layers\.0\.mlp\.experts\.2\.up",
    ]
