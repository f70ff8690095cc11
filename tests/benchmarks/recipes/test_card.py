"""The card of the reference model says what the saved model does."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks.recipes.reference_model import card, measure, save, texts
from benchmarks.recipes.reference_model.train import ReferenceMoE
from moeq.tasks.arithmetic import Sum
from tests.tiny import tiny_model, tiny_tokenizer


def reference_loss(model: Any, windows_NT: Tensor) -> float:
    """Mean negative log-likelihood, one window and one token at a time."""
    nll = []
    for ids_T in windows_NT:
        log_prob_TV = model(ids_T[None]).logits[0].double().log_softmax(-1)
        nll += [-float(log_prob_TV[i, ids_T[i + 1]]) for i in range(len(ids_T) - 1)]
    return sum(nll) / len(nll)


def reference_counts(model: Any, ids_T: Tensor) -> Tensor:
    """Slots of every expert from the router weights and the inputs of each MoE block."""
    counts = []
    inputs: dict[int, Tensor] = {}
    for i, block in enumerate(model.model.layers):
        block.mlp.register_forward_pre_hook(lambda module, args, i=i: inputs.update({i: args[0][0]}))
    model(ids_T[None])
    for i, block in enumerate(model.model.layers):
        logits_TE = inputs[i] @ block.mlp.gate.weight.T
        chosen = [int(e) for row in logits_TE for e in row.topk(2).indices]
        counts.append([chosen.count(e) for e in range(logits_TE.shape[1])])
    return torch.tensor(counts)


def test_losses_and_slots_equal_a_loop_over_tokens(generator: torch.Generator) -> None:
    model = tiny_model("qwen2_moe")
    windows_NT = torch.randint(264, (3, 20), generator=generator)
    result, counts_LE = measure.measure_windows(model, windows_NT, batch_size=2)
    assert result["num_tokens"] == 3 * 19
    assert result["nats_per_token"] == pytest.approx(reference_loss(model, windows_NT), abs=1e-4)
    assert torch.equal(counts_LE, sum(reference_counts(model, ids_T) for ids_T in windows_NT))


def test_no_hook_stays_on_the_model() -> None:
    model = tiny_model("qwen2_moe")
    with pytest.raises(ZeroDivisionError), measure.slot_counts(model):
        raise ZeroDivisionError
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_exact_match_accepts_the_right_integer_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tiny_tokenizer()
    replies = {"1 + 2 =": " 3\n9 + ", "30 + 41 =": " 71 + 1", "5 + 5 =": " 11\n1 ", "7 + 1 =": " 8\n    "}

    def reply(model: Any, prompts: list[list[int]], *, stop: tuple[str, ...], **settings: Any) -> list[list[str]]:
        return [[replies[tokenizer.decode(ids)].split(*stop)[0]] for ids in prompts]

    monkeypatch.setattr(measure, "generate", reply)
    problems = [Sum(*pair) for pair in [("1 + 2 =", "3"), ("30 + 41 =", "71"), ("5 + 5 =", "10"), ("7 + 1 =", "8")]]
    assert measure.exact_match(tiny_model("qwen2_moe"), tokenizer, problems, batch_size=3) == 0.5


def test_a_random_model_answers_no_sum() -> None:
    problems = [Sum("1 + 2 =", "3"), Sum("30 + 41 =", "71")]
    assert measure.exact_match(tiny_model("qwen2_moe"), tiny_tokenizer(), problems) == 0.0


def test_usage_report_finds_the_expert_that_no_domain_uses() -> None:
    counts = {"a": torch.tensor([[60, 40, 0, 0]]), "b": torch.tensor([[0, 10, 89, 1]])}
    report = measure.usage_report(counts)
    assert report["threshold"] == 1 / 16
    assert report["unused"] == [[0, 3]]
    assert report["largest_share"] == [[0.6, 0.4, 0.89, 0.01]]
    assert report["share"]["b"] == [[0.0, 0.1, 0.89, 0.01]]
    mean, values = 0.25, (0.6, 0.4, 0.0, 0.0)
    expected = (sum((value - mean) ** 2 for value in values) / 4) ** 0.5 / mean
    assert report["coefficient_of_variation"]["a"] == pytest.approx(expected, abs=1e-4)


def test_the_asset_opens_without_the_recipe_and_gives_its_logits(tmp_path: Path) -> None:
    module = ReferenceMoE(num_steps=1)
    for parameter in module.parameters():
        parameter.data = parameter.data.bfloat16().float()
    checkpoint = {"hyper_parameters": {**module.hparams, "_instantiator": "x"}, "state_dict": module.state_dict()}
    save.save_model(checkpoint, tiny_tokenizer(), tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.dtype == torch.bfloat16
    assert model.config.architectures == ["Qwen2MoeForCausalLM"]
    assert model.config.use_cache
    assert model.generation_config.use_cache
    assert "routed_swiglu" not in (tmp_path / "config.json").read_text()
    assert card.asset_facts(model, tmp_path)["bytes"] < 24e6
    for name, parameter in AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).named_parameters():
        assert torch.equal(parameter, module.model.get_parameter(name)), name


def test_the_card_states_losses_matches_and_unused_experts() -> None:
    model, tokenizer = tiny_model("qwen2_moe"), tiny_tokenizer()
    documents = {name: ["".join(chr(97 + (i * 7) % 26) for i in range(600))] for name in card.NAMES}
    numbers = card.measure(model, tokenizer, documents)
    checkpoint = {
        "global_step": 4000,
        "hyper_parameters": {"num_steps": 4000},
        "datamodule_hyper_parameters": {"batch_size": 8, "length": 512},
    }
    recipe = {"seed_everything": 0, "trainer": {"devices": 2}}
    asset = {
        "parameters": 9_000_000, "bytes": 18_000_000, "sha256": "0" * 64, "hidden_size": 256, "blocks": 2, "experts": 8,
        "experts_per_token": 2, "vocabulary": 4096,
    }  # fmt: skip
    training = card.training_facts(checkpoint, recipe, Path("nowhere"))
    text = card.render({"asset": asset, "training": training, **numbers})
    assert training["tokens"] == 4000 * 2 * 8 * 512
    assert "32.8M tokens" in text
    assert "not recorded" in text
    assert f"| {numbers['loss']['gsm8k']['nats_per_token']:.3f} |" in text
    assert text.count("| 0 | prose |") == 1
    assert "{" not in text
    assert card._unused([[1, 2]]) == "1 experts are used by no domain: expert 2 of block 1"


def test_evaluation_texts_are_whole_held_out_files_and_distinct_sums() -> None:
    rows = [{"path": f"encodings/t{i}.py" if i % 5 == 0 else f"m{i}.py", "text": "x" * (10 + i)} for i in range(50)]
    kept = texts.whole_files(rows, 600)
    assert kept == sorted(kept, key=lambda row: row["path"])
    assert all(row in rows for row in kept)
    assert 540 < sum(len(row["text"]) for row in kept) <= 600
    assert not any(row["path"].startswith("encodings") for row in kept)
    article = " = Title = \n text \n"
    assert texts.whole_articles(article * 3, 2 * len(article)) == article * 2
    sums = texts.distinct_sums(400, seed=1)
    assert len(set(sums)) == 400
    for line in random.Random(0).sample(sums, 50):
        left, answer = line.split(" = ")
        a, b = left.split(" + ")
        assert int(a) + int(b) == int(answer)
        assert max(int(a), int(b)) < 100
