import pytest
import torch

from moeq.models.routed_rows import routed_tokens, sort_by_expert


@pytest.mark.parametrize("padded", [False, True])
def test_every_expert_has_the_choices_that_a_look_at_all_of_them_finds(padded: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    ids_TK = torch.rand(50, 9, generator=generator).topk(3, 1).indices  # 7 and 8 are on another rank
    keep_T = torch.rand(50, generator=generator) > 0.4 if padded else None
    found = {expert: (tokens.tolist(), slots.tolist()) for expert, tokens, slots in routed_tokens(ids_TK, 7, keep_T)}
    expected: dict[int, tuple[list[int], list[int]]] = {}
    for token, chosen in enumerate(ids_TK.tolist()):
        for slot, expert in enumerate(chosen):
            if expert < 7 and (keep_T is None or keep_T[token]):
                tokens, slots = expected.setdefault(expert, ([], []))
                tokens.append(token)
                slots.append(slot)
    assert found == expected
    assert list(found) == sorted(found)


def test_experts_that_nobody_chose_have_no_rows() -> None:
    rows = sort_by_expert(torch.tensor([[2], [2], [0]]), 4)
    assert rows.starts == [0, 1, 1, 3, 3]
    assert [expert for expert, _ in rows.parts()] == [0, 2]
    assert sort_by_expert(torch.zeros(3, 1, dtype=torch.int64), 2, torch.zeros(3, dtype=torch.bool)).starts == [0] * 3
