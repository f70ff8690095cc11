"""The metrics of an evaluation set, on tiny random models and on stubs that answer right or wrong."""

import copy
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moeq.tasks.arithmetic import left_pad
from moeq.tasks.evaluate import SetMetrics
from tests.tiny import tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()


class Uniform(nn.Module):
    """Every token is as likely as any other."""

    def forward(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 264))


class Answers(nn.Module):
    """Continues each prompt with the text that was given for its row, and ends there."""

    def __init__(self, texts: list[str]) -> None:
        super().__init__()
        self.texts = texts

    def generate(self, input_ids: Tensor, max_new_tokens: int, **_: Any) -> SimpleNamespace:
        new = [TOKENIZER.encode(text)[:max_new_tokens] for text in self.texts]
        new_ids_BN = torch.tensor([ids + [0] * (max_new_tokens - len(ids)) for ids in new])
        logits = tuple(torch.zeros(len(new), 264) for _ in range(max_new_tokens))
        return SimpleNamespace(sequences=torch.cat([input_ids, new_ids_BN], dim=1), logits=logits)


def windows(generator: torch.Generator, batch: int = 2, length: int = 24) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(0, 264, (batch, length), generator=generator)}


def problems(answers: list[str]) -> dict[str, Any]:
    prompts = [TOKENIZER.encode(f"{'1' * (row + 1)} + 1 =") for row in range(len(answers))]
    prompt_ids_BP, attention_mask_BP = left_pad(prompts, 0)
    return {"prompt_ids": prompt_ids_BP, "attention_mask": attention_mask_BP, "answers": answers}


def perturbed(model: nn.Module, generator: torch.Generator) -> nn.Module:
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return other


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary(generator: torch.Generator) -> None:
    metrics = SetMetrics("prose")
    metrics.update(Uniform(), None, windows(generator))
    assert metrics.compute() == {"perplexity": pytest.approx(264, rel=1e-6)}


def test_a_model_equals_itself(generator: torch.Generator) -> None:
    model, metrics = tiny_model("qwen2_moe"), SetMetrics("prose")
    metrics.update(model, tiny_model("qwen2_moe"), windows(generator))
    values = metrics.compute()
    perplexity = values.pop("perplexity")
    assert values == {"kl": 0.0, "top1_agreement": 1.0, "router_agreement": 1.0}
    assert math.isfinite(perplexity)


def test_perplexity_is_the_exponential_of_the_loss_of_the_library(generator: torch.Generator) -> None:
    model, metrics, batch = tiny_model("mixtral"), SetMetrics("prose"), windows(generator)
    metrics.update(model, None, batch)
    loss = model(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss
    assert metrics.compute()["perplexity"] == pytest.approx(math.exp(float(loss)), rel=1e-5)


def test_batches_of_any_size_give_the_same_metrics(generator: torch.Generator) -> None:
    reference = tiny_model("qwen2_moe")
    model, batch = perturbed(reference, generator), windows(generator, batch=5)
    whole, split = SetMetrics("prose"), SetMetrics("prose")
    whole.update(model, reference, batch)
    for rows in (slice(0, 2), slice(2, 5)):
        split.update(model, reference, {"input_ids": batch["input_ids"][rows]})
    assert split.compute() == {name: pytest.approx(value, rel=1e-5) for name, value in whole.compute().items()}
    assert set(whole.compute()) == {"perplexity", "kl", "top1_agreement", "router_agreement"}
    assert 0 < whole.compute()["router_agreement"] < 1


def test_exact_match_counts_right_answers_only() -> None:
    metrics = SetMetrics("arithmetic", TOKENIZER)
    metrics.update(Answers([" 95\n1", "12\n", " 7"]), None, problems(["95", "12", "7"]))
    metrics.update(Answers([" 94\n", " 951\n", " 9", "\n95", "x95\n"]), None, problems(["95"] * 5))
    assert metrics.compute() == {"exact_match": 3 / 8}


def test_exact_match_of_a_real_model_is_that_of_its_own_continuation() -> None:
    model, metrics = tiny_model("qwen2_moe"), SetMetrics("arithmetic", TOKENIZER)
    metrics.update(model, None, problems(["12", "112", "1112"]))
    assert metrics.compute() == {"exact_match": 0.0}


def test_reset_forgets_everything(generator: torch.Generator) -> None:
    metrics = SetMetrics("prose")
    metrics.update(Uniform(), None, windows(generator))
    metrics.reset()
    assert metrics.compute() == {}


def test_nothing_seen_is_no_metric_and_no_warning() -> None:
    assert SetMetrics("prose").compute() == {}


def test_non_finite_logits_name_the_set_and_the_batch(generator: torch.Generator) -> None:
    model, metrics = tiny_model("qwen2_moe"), SetMetrics("python", TOKENIZER)
    metrics.update(model, None, windows(generator))
    model.get_parameter("model.norm.weight")[3] = float("nan")
    with pytest.raises(ValueError, match=r"the model gave \d+ non-finite logits of \d+ on set python, batch 1"):
        metrics.update(model, None, windows(generator))
    with pytest.raises(ValueError, match="the reference model gave"):
        metrics.update(tiny_model("qwen2_moe"), model, windows(generator))
    with pytest.raises(ValueError, match="non-finite logits"):
        metrics.update(model, None, problems(["12"]))


def test_generation_without_a_tokenizer_is_refused() -> None:
    with pytest.raises(ValueError, match="no tokenizer"):
        SetMetrics("arithmetic").update(Answers([" 95\n"]), None, problems(["95"]))
