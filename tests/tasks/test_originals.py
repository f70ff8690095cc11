"""Per-document divergence and agreement with the original equal slow sums, and the original may come from disk."""

import math

import pytest
import torch
from torch import Tensor

from moeq.tasks.divergence import kl_sum_and_agreement
from moeq.tasks.originals import CHUNK_POSITIONS, choose_mode, compare
from moeq.tasks.spec import Values
from moeq.tasks.stored import Said


def said(generator: torch.Generator, num_positions: int = 12, dtype: torch.dtype = torch.float32) -> Said:
    def routing() -> Tensor:
        return torch.rand(20, 4, generator=generator).argsort(-1)[:, :2]

    logits_NV = (3 * torch.randn(num_positions, 11, generator=generator)).to(dtype)
    return Said(logits_NV, {"a": routing(), "b": routing()})


def reference_compare(reference: Said, other: Said, owner_N: list[int], owner_T: list[int]) -> dict[int, Values]:
    """The same in scalars."""
    values: dict[int, dict[str, list[float]]] = {}

    def add(owner: int, name: str, total: float) -> None:
        entry = values.setdefault(owner, {}).setdefault(name, [0.0, 0.0])
        entry[0] += total
        entry[1] += 1

    def log_softmax(logits: list[float]) -> list[float]:
        top = max(logits)
        total = top + math.log(sum(math.exp(x - top) for x in logits))
        return [x - total for x in logits]

    for owner, p, q in zip(owner_N, reference.logits_NV.tolist(), other.logits_NV.tolist(), strict=True):
        if owner >= 0:
            log_p, log_q = log_softmax(p), log_softmax(q)
            add(owner, "kl", sum(math.exp(a) * (a - b) for a, b in zip(log_p, log_q, strict=True)))
            add(owner, "top1_agreement", float(p.index(max(p)) == q.index(max(q))))
    for name, ids_TK in other.routing.items():
        for owner, a, b in zip(owner_T, ids_TK.tolist(), reference.routing[name].tolist(), strict=True):
            if owner >= 0:
                add(owner, "router_agreement", float(set(a) == set(b)))
    return {owner: {name: (t, w) for name, (t, w) in entry.items()} for owner, entry in values.items()}


@pytest.mark.parametrize("num_positions", [1, 12, CHUNK_POSITIONS, 2 * CHUNK_POSITIONS + 3])
def test_values_by_document_equal_slow_sums(num_positions: int, generator: torch.Generator) -> None:
    reference, other = said(generator, num_positions), said(generator, num_positions)
    owner_N = torch.randint(-1, 3, (num_positions,), generator=generator)
    owner_T = torch.randint(-1, 5, (20,), generator=generator)
    values = compare(reference, other, owner_N, {"a": owner_T, "b": owner_T})
    expected = reference_compare(reference, other, owner_N.tolist(), owner_T.tolist())
    assert values.keys() == expected.keys()
    for owner, entry in expected.items():
        assert values[owner].keys() == entry.keys()
        for name, pair in entry.items():
            assert values[owner][name] == pytest.approx(pair, rel=1e-5, abs=1e-6), (owner, name)


def test_a_model_equals_itself_in_small_dtypes_too(generator: torch.Generator) -> None:
    one = said(generator, dtype=torch.bfloat16)
    small = Said(one.logits_NV, {name: ids_TK.to(torch.uint8).flip(-1) for name, ids_TK in one.routing.items()})
    owners = {"a": torch.zeros(20, dtype=torch.int64), "b": torch.full((20,), -1)}
    assert compare(small, one, torch.full((12,), 4), owners) == {
        4: {"kl": (0.0, 12.0), "top1_agreement": (12.0, 12.0)},
        0: {"router_agreement": (20.0, 20.0)},
    }


def test_the_sum_over_documents_is_the_divergence_of_the_batch(generator: torch.Generator) -> None:
    reference, other = said(generator), said(generator)
    owners = {name: torch.arange(20) % 3 for name in "ab"}
    values = compare(reference, other, torch.arange(12) % 3, owners)
    kl, same, count = kl_sum_and_agreement(reference.logits_NV[None], other.logits_NV[None])
    assert sum(entry["kl"][0] for entry in values.values()) == pytest.approx(float(kl), rel=1e-6)
    assert sum(entry["top1_agreement"][0] for entry in values.values()) == int(same)
    assert sum(entry["top1_agreement"][1] for entry in values.values()) == int(count)


def test_models_that_do_not_belong_together_are_refused(generator: torch.Generator) -> None:
    one, owner_N = said(generator), torch.zeros(12, dtype=torch.int64)
    owners = {name: torch.zeros(20, dtype=torch.int64) for name in "ab"}
    with pytest.raises(ValueError, match=r"\(12, 11\) must have the reference's \(12, 10\)"):
        compare(one._replace(logits_NV=one.logits_NV[:, :10]), one, owner_N, owners)
    with pytest.raises(ValueError, match=r"do not share the experts modules \['b'\]"):
        compare(one._replace(routing={"a": one.routing["a"]}), one, owner_N, owners)


@pytest.mark.parametrize(
    ("requested", "free", "mode"),
    [
        ("auto", 115, "memory"),
        ("auto", 114, "disk"),
        ("memory", 100, "memory"),
        ("disk", 1000, "disk"),
        ("disk", 1, "disk"),
    ],
)
def test_the_original_stays_in_memory_where_both_fit(requested: str, free: int, mode: str) -> None:
    assert choose_mode(requested, 30, 70, free) == mode  # type: ignore[arg-type]


def test_memory_that_both_cannot_have_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"model \(15.0 GB\) and its original \(61.0 GB\) do not both fit into 75.0 GB"
    ):
        choose_mode("memory", 15 * 10**9, 61 * 10**9, 75 * 10**9)
