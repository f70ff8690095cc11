"""Generated text: equal to decoding each prompt by itself without a cache, and to ``generate`` of transformers."""

import math

import pytest
import torch
from torch import nn

from moeq.decoding.decoders import CachedDecoder, Decoding, examine
from moeq.decoding.generate import NonFiniteLogits, TokenChoice, generate
from tests.decoding.test_decoders import WAYS, prompts
from tests.tiny import tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
PROMPTS = prompts(5, 14, 1, 9, 9)
STOP = ["ab", *"cdefghijklmn"]


@torch.no_grad()
def reference_text(model: nn.Module, prompt: list[int], stop: list[str], max_new_tokens: int) -> str:
    """The textbook way: the whole text again for every token, the whole continuation decoded for every token."""
    new: list[int] = []
    while len(new) < max_new_tokens:
        logits = model(input_ids=torch.tensor([prompt + new]), use_cache=False).logits[0, -1]
        new.append(int(logits.argmax()))
        if new[-1] == TOKENIZER.eos_token_id or any(s in TOKENIZER.decode(new) for s in stop):
            break
    text = str(TOKENIZER.decode(new, skip_special_tokens=True))
    return text[: min([text.find(s) for s in stop if s in text], default=len(text))]


def written(model: nn.Module, texts: list[list[int]], **options: object) -> list[str]:
    settings = {"stop": STOP, "max_new_tokens": 8, "seeds": range(len(texts)), **options}
    return [text for (text,) in generate(model, texts, tokenizer=TOKENIZER, **settings)]


@pytest.mark.parametrize("family", WAYS)
def test_a_batch_is_written_as_each_of_its_prompts_alone(family: str) -> None:
    model = tiny_model(family, **WAYS[family][1])
    decoding = examine(model, PROMPTS)
    expected = [reference_text(model, prompt, STOP, 8) for prompt in PROMPTS]
    assert written(model, PROMPTS, decoding=decoding) == expected
    order = [3, 0, 4, 1, 2]
    assert written(model, [PROMPTS[i] for i in order], decoding=decoding) == [expected[i] for i in order]
    assert written(model, PROMPTS, decoding=decoding, max_rows=2) == expected


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "qwen3_next", "deepseek_v3"])
def test_greedy_text_is_that_of_transformers(family: str) -> None:
    model = tiny_model(family)
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        new = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=20)[0]
        expected = TOKENIZER.decode(new[len(prompt) :], skip_special_tokens=True)
        assert written(model, [prompt], stop=[], max_new_tokens=20) == [expected]


@pytest.mark.parametrize("way", ["padding in front", "padding behind"])
def test_finished_rows_leave_the_batch(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    model = tiny_model("qwen2_moe")
    texts = prompts(*range(1, 17), seed=3)
    sizes: list[int] = []
    step = CachedDecoder.step
    monkeypatch.setattr(CachedDecoder, "step", lambda self, ids: (sizes.append(len(ids)), step(self, ids))[1])
    options = {"stop": [chr(c) for c in range(32, 80)], "max_new_tokens": 40}
    together = written(model, texts, decoding=Decoding(way), **options)
    assert together == [reference_text(model, text, **options) for text in texts]
    lengths = [len(text.encode()) for text in together]
    assert len(set(lengths)) > 4
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) > 3
    assert sizes[-1] <= 2


def test_a_text_ends_at_the_token_of_the_end() -> None:
    model = tiny_model("qwen2_moe")
    free = written(model, PROMPTS, stop=[])
    third = TOKENIZER(free[0])["input_ids"][2]
    model.generation_config.eos_token_id = [third]
    (ended,) = written(model, PROMPTS[:1], stop=[])
    assert ended == TOKENIZER.decode(TOKENIZER(free[0])["input_ids"][:3])


def test_samples_depend_on_their_seed_and_number_alone() -> None:
    model = tiny_model("qwen2_moe")
    options = {"tokenizer": TOKENIZER, "stop": STOP, "max_new_tokens": 10, "temperature": 0.8, "top_p": 0.95}
    all_texts = generate(model, PROMPTS, num_samples=5, seeds=[7, 8, 9, 10, 11], **options)
    assert len({text for texts in all_texts for text in texts}) > 20
    alone = generate(model, PROMPTS[3:4], num_samples=2, seeds=[10], **options)
    assert alone == [all_texts[3][:2]]
    in_parts = generate(model, PROMPTS[::-1], num_samples=5, seeds=[11, 10, 9, 8, 7], max_rows=3, **options)
    assert in_parts == all_texts[::-1]
    assert generate(model, PROMPTS[3:4], num_samples=2, seeds=[3], **options) != alone


def test_the_prompt_of_several_samples_is_computed_once() -> None:
    model = tiny_model("jamba")
    seen: list[int] = []
    model.get_input_embeddings().register_forward_pre_hook(lambda _, args: seen.append(args[0].numel()))
    options = {"tokenizer": TOKENIZER, "stop": [], "max_new_tokens": 2, "temperature": 1.0}
    generate(model, PROMPTS[1:2], num_samples=6, seeds=[0], **options)
    assert seen[0] == 14
    assert seen[1] <= 6


def test_tokens_are_drawn_from_the_nucleus_at_the_temperature() -> None:
    logits = torch.tensor([2.0, 0.5, 1.0, -3.0, 1.5]).log_softmax(-1)
    weights = {i: math.exp(x / 0.7) for i, x in enumerate(logits.tolist())}
    total, nucleus = sum(weights.values()), []
    for token in sorted(weights, key=weights.__getitem__, reverse=True):
        nucleus.append(token)
        if sum(weights[i] for i in nucleus) / total >= 0.9:
            break
    assert len(nucleus) == 3
    num = 10_000
    uniform = (torch.arange(num, dtype=torch.float64) + 0.5) / num
    drawn = TokenChoice(0.7, 0.9).choose(logits.expand(num, -1), uniform).bincount(minlength=5) / num
    held = sum(weights[i] for i in nucleus)
    for token in range(5):
        assert drawn[token] == pytest.approx(weights[token] / held if token in nucleus else 0.0, abs=2e-4)


def test_logits_that_are_not_finite_are_refused_with_their_prompt() -> None:
    model = tiny_model("qwen2_moe")
    model.get_input_embeddings().weight[77] = torch.nan
    texts = [[1, 2, 3], [4, 77], [5]]
    with pytest.raises(NonFiniteLogits, match=r"after prompt 1 \(2 tokens\) and 0 new tokens are not finite") as error:
        written(model, texts)
    assert error.value.prompt == 1
    with pytest.raises(ValueError, match="not finite"):
        written(model, texts, temperature=0.5)


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        ([[1], []], {}, "prompt 1 is empty"),
        ([[1]], {"seeds": [1, 2]}, "2 seeds for 1 prompts"),
        ([[1]], {"num_samples": 3}, r"num_samples \(3\) must be 1 at temperature 0"),
        ([[1]], {"num_samples": 0, "temperature": 1.0}, r"num_samples \(0\) must be from 1"),
        ([[1]], {"temperature": -1.0}, r"temperature \(-1.0\) must not be negative"),
        ([[1]], {"top_p": 0.0}, r"top_p \(0.0\) must be above 0"),
        ([[1]], {"max_new_tokens": 0}, r"max_new_tokens \(0\) must be positive"),
    ],
)
def test_what_cannot_be_written_is_refused(texts: list[list[int]], options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        written(tiny_model("qwen2_moe"), texts, **options)


def test_no_prompts_give_no_texts() -> None:
    assert written(tiny_model("qwen2_moe"), []) == []
