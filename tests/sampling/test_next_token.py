import pytest
import torch
from torch import Tensor, nn

from moeq.decoding.reorder import reorder_cache
from moeq.models.adapter import is_experts_module
from moeq.sampling.ebss import EBSSSpec, search
from moeq.sampling.next_token import ExpertCounter, ModelNextToken, score_sequences
from tests.tiny import MOE_FAMILIES, tiny_model


class UncachedNextToken:
    """The textbook way: every step runs whole sequences again, experts counted by a loop over modules."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.ids_NT = torch.empty(0, 0, dtype=torch.int64)

    def prefill(self, ids_NT: Tensor) -> tuple[Tensor, Tensor]:
        self.ids_NT = ids_NT
        log_prob_NV, chosen_NLTK = self._forward()
        return log_prob_NV, self._count(chosen_NLTK)

    def step(self, parent_N: Tensor, token_N: Tensor) -> tuple[Tensor, Tensor]:
        self.ids_NT = torch.cat([self.ids_NT[parent_N], token_N[:, None]], 1)
        log_prob_NV, chosen_NLTK = self._forward()
        return log_prob_NV, self._count(chosen_NLTK[:, :, -1:])

    def _forward(self) -> tuple[Tensor, Tensor]:
        chosen: list[Tensor] = []
        modules = [module for module in self.model.modules() if is_experts_module(module)]
        self.num_experts = modules[0].num_experts
        hooks = [m.register_forward_pre_hook(lambda _, args: chosen.append(args[1])) for m in modules]
        with torch.no_grad():
            logits = self.model(self.ids_NT, use_cache=False).logits
        for hook in hooks:
            hook.remove()
        rows = len(self.ids_NT)
        return logits[:, -1].float().log_softmax(-1), torch.stack([c.unflatten(0, (rows, -1)) for c in chosen], 1)

    def _count(self, chosen_NLTK: Tensor) -> Tensor:
        return torch.stack([(chosen_NLTK == e).sum((-1, -2)) for e in range(self.num_experts)], -1).int()


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def num_hooks(model: nn.Module) -> int:
    return sum(len(module._forward_pre_hooks) for module in model.modules())


def test_one_branch_without_balance_is_greedy_decoding() -> None:
    model = tiny_model("qwen2_moe")
    first = torch.tensor([5, 9, 60, 201, 33])
    spec = EBSSSpec(length=40, branches=1, mode="paper", balance=False)
    with ModelNextToken(model) as next_token:
        sampled = search(next_token, spec, first, seeded())
    greedy = model.generate(
        first[:, None],
        attention_mask=torch.ones(5, 1),
        do_sample=False,
        max_length=40,
        min_length=40,
        eos_token_id=None,
    )
    assert torch.equal(sampled.ids_NT, greedy)


@pytest.mark.parametrize("mode", ["paper", "stochastic"])
@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_the_cache_changes_nothing(family: str, mode: str) -> None:
    model = tiny_model(family)
    spec = EBSSSpec(length=20, branches=3, mode=mode)
    first = torch.tensor([7, 100, 250])
    with ModelNextToken(model) as next_token:
        cached = search(next_token, spec, first, seeded(1))
    uncached = search(UncachedNextToken(model), spec, first, seeded(1))
    assert torch.equal(cached.ids_NT, uncached.ids_NT)
    assert torch.equal(cached.counts_NLE, uncached.counts_NLE)
    assert torch.allclose(cached.nll_N, uncached.nll_N, atol=1e-3)
    nll_N, counts_NLE = score_sequences(model, cached.ids_NT, batch_size=2)
    assert torch.equal(counts_NLE, cached.counts_NLE)
    assert torch.allclose(nll_N, cached.nll_N, atol=1e-3)


def test_hooks_come_off_after_use_and_after_an_error() -> None:
    model = tiny_model("mixtral")
    with ModelNextToken(model) as next_token:
        next_token.prefill(torch.tensor([[1]]))
        assert num_hooks(model) == 2
    assert num_hooks(model) == 0
    with pytest.raises(RuntimeError, match="stop"), ModelNextToken(model):
        raise RuntimeError("stop")
    assert num_hooks(model) == 0


def test_unchanged_rows_leave_the_cache_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[int]] = []
    monkeypatch.setattr(
        "moeq.sampling.next_token.reorder_cache",
        lambda cache, index: (calls.append(index.tolist()), reorder_cache(cache, index)),
    )
    with ModelNextToken(tiny_model("olmoe")) as next_token:
        next_token.prefill(torch.tensor([[1], [2]]))
        for parents in ([0, 1], [0, 0, 1], [0, 1, 2], [0, 1]):
            next_token.step(torch.tensor(parents), torch.ones(len(parents), dtype=torch.int64))
    assert calls == [[0, 0, 1], [0, 1]]


def test_linear_attention_states_follow_the_rows() -> None:
    class Cache:
        linear_cache = [[], torch.arange(6.0).view(3, 2)]  # noqa: RUF012  as in MiniMaxCache: a list where none is

        def reorder_cache(self, index: Tensor) -> None:
            self.reordered = index

    cache = Cache()
    reorder_cache(cache, torch.tensor([2, 0]))
    assert cache.linear_cache[0] == []
    assert cache.linear_cache[1].tolist() == [[4.0, 5.0], [0.0, 1.0]]


def test_a_dense_model_is_refused() -> None:
    with pytest.raises(ValueError, match="no routed experts, whose balance is not defined"):
        ExpertCounter(tiny_model("llama"))
