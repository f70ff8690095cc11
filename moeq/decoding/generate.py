"""Text generation after prompts: batched, greedy or sampled, each continuation stopping by itself.

Sampling draws from softmax(logits / temperature) restricted to the smallest set of likeliest tokens that holds
``top_p`` of it (nucleus sampling, Holtzman et al. 2020, arXiv 1904.09751).  Every continuation has random numbers of
its own, from the seed of its prompt and its number among the samples: it does not depend on its neighbours in a batch,
on how many samples are asked for or on what an earlier run had finished, up to rounding of the model.

Of the model's generation settings only the end-of-text tokens are read: no repetition penalty, no top-k.

Legend: R rows (continuations), S steps, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moeq.decoding.decode_attention import decoding as decode_attention
from moeq.decoding.decoders import Decoder, Decoding, make_decoder
from moeq.decoding.gumbel import draw_children, tempered
from moeq.decoding.stopping import Stopping, end_of_text_ids

# A step costs nearly as much with a few rows less, and dropping rows copies the cache.
_LEAST_FINISHED = 0.25
# Samples of one seed have these many numbers to themselves.
_MOST_SAMPLES = 1_000_003


class NonFiniteLogits(ValueError):
    """A model's logits are not finite; ``prompt`` is the number of the prompt."""

    def __init__(self, prompt: int, num_tokens: int, num_new: int) -> None:
        super().__init__(
            f"the logits after prompt {prompt} ({num_tokens} tokens) and {num_new} new tokens are not finite; "
            "look for the first block whose output is not"
        )
        self.prompt = prompt


class Continuation(NamedTuple):
    """One continuation: the number of its prompt and its number among the prompt's samples."""

    prompt: int
    sample: int


class TokenChoice(NamedTuple):
    """How a token is chosen; temperature 0 is the most likely one, of equal ones the first."""

    temperature: float
    top_p: float

    def choose(self, logits_RV: Tensor, uniform_R: Tensor) -> Tensor:
        """int64 token_R, on the CPU; ``uniform_R`` are random numbers in [0, 1), float64."""
        if self.temperature == 0:
            return logits_RV.argmax(-1).cpu()
        log_prob_RV = tempered(logits_RV.float().log_softmax(-1), self.temperature, self.top_p, 1)
        uniform_R12 = uniform_R.to(logits_RV.device)[:, None, None].expand(-1, 1, 2)
        nowhere_R = uniform_R12.new_zeros(len(uniform_R))
        return draw_children(log_prob_RV, nowhere_R, nowhere_R, uniform_R12).token_RC[:, 0].cpu()


def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    tokenizer: Any,
    stop: Sequence[str],
    max_new_tokens: int,
    seeds: Sequence[int],
    num_samples: int = 1,
    temperature: float = 0.0,
    top_p: float = 1.0,
    decoding: Decoding = Decoding(),  # noqa: B008  frozen
    max_rows: int = 256,
) -> list[list[str]]:
    """Continuations of each prompt, without the stop string that ended them.

    Args:
        model: A causal LM in eval mode.
        prompts: Token ids, none empty, in any order.
        tokenizer: Turns new tokens into text.
        stop: A continuation ends before the first of these strings, or at an end-of-text token.
        max_new_tokens: ... or after so many tokens.
        seeds: One per prompt; read where tokens are sampled.
        num_samples: Continuations of each prompt.
        temperature: 0 decodes greedily.
        top_p: Probability of the tokens that are sampled from.
        decoding: What ``moeq.decoding.decoders.examine`` says of the model.
        max_rows: Continuations that are decoded together at most.

    Raises:
        NonFiniteLogits: (A ValueError.) The model's logits are not finite.
        ValueError: An empty prompt, or settings that contradict each other.
    """
    _check(prompts, seeds, num_samples, temperature, top_p)
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens ({max_new_tokens}) must be positive; choose the task's own, such as 256")
    stopping = Stopping(tokenizer, stop, end_of_text_ids(model, tokenizer))
    sampler = TokenChoice(temperature, top_p)
    texts = [[""] * num_samples for _ in prompts]
    for rows in _batches(prompts, num_samples, decoding, max_rows):
        uniform_RS = _uniform(rows, seeds, max_new_tokens)
        with decode_attention(model):
            continuations = _continue(make_decoder(model, decoding), prompts, rows, sampler, uniform_RS, stopping)
        for row, new in zip(rows, continuations, strict=True):
            texts[row.prompt][row.sample] = stopping.text(new)
    return texts


def _continue(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    rows: Sequence[Continuation],
    sampler: TokenChoice,
    uniform_RS: Tensor,
    stopping: Stopping,
) -> list[list[int]]:
    """New tokens of each row, up to and including what ended it, at most S."""
    new: list[list[int]] = [[] for _ in rows]
    finished = [False] * len(rows)
    held = list(range(len(rows)))  # the rows that the decoder still holds, in its order
    logits_RV = _start(decoder, prompts, rows)
    num_steps = uniform_RS.shape[1]
    for step in range(num_steps):
        for row, finite in zip(held, logits_RV.amax(-1).isfinite().tolist(), strict=True):
            if not finite and not finished[row]:
                raise NonFiniteLogits(rows[row].prompt, len(prompts[rows[row].prompt]), step)
        token_R = sampler.choose(logits_RV, uniform_RS[held, step])
        for row, token in zip(held, token_R.tolist(), strict=True):
            if not finished[row]:
                new[row].append(token)
                finished[row] = stopping.reached(new[row])
        places = [place for place, row in enumerate(held) if not finished[row]]
        if not places or step + 1 == num_steps:
            break
        if len(places) <= (1 - _LEAST_FINISHED) * len(held):
            decoder.select(torch.tensor(places))
            token_R, held = token_R[places], [held[place] for place in places]
        logits_RV = decoder.step(token_R)
    return new


def _start(decoder: Decoder, prompts: Sequence[Sequence[int]], rows: Sequence[Continuation]) -> Tensor:
    """Logits_RV after the prompts of the rows, each prompt computed once."""
    used = sorted({row.prompt for row in rows})
    logits_RV = decoder.start([prompts[index] for index in used])
    if len(used) == len(rows):
        return logits_RV
    index_R = torch.tensor([used.index(row.prompt) for row in rows])
    decoder.select(index_R)
    return logits_RV[index_R.to(logits_RV.device)]


def _batches(
    prompts: Sequence[Sequence[int]], num_samples: int, decoding: Decoding, max_rows: int
) -> Iterator[list[Continuation]]:
    """Rows that are decoded together, in order: of one length of prompt where the model needs that."""
    groups: dict[int, list[Continuation]] = {}
    for number, prompt in enumerate(prompts):
        group = groups.setdefault(0 if decoding.any_lengths else len(prompt), [])
        group.extend(Continuation(number, sample) for sample in range(num_samples))
    for rows in groups.values():
        yield from (rows[start : start + max_rows] for start in range(0, len(rows), max_rows))


def _uniform(rows: Sequence[Continuation], seeds: Sequence[int], num_steps: int) -> Tensor:
    """Random numbers of each row in [0, 1): float64 uniform_RS."""
    generator = torch.Generator()
    drawn = []
    for row in rows:
        generator.manual_seed((seeds[row.prompt] * _MOST_SAMPLES + row.sample) % 2**63)
        drawn.append(torch.rand(num_steps, generator=generator, dtype=torch.float64))
    return torch.stack(drawn)


def _check(
    prompts: Sequence[Sequence[int]], seeds: Sequence[int], num_samples: int, temperature: float, top_p: float
) -> None:
    for number, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompt {number} is empty; begin it with the begin- or end-of-text token")
    if len(seeds) != len(prompts):
        raise ValueError(f"there are {len(seeds)} seeds for {len(prompts)} prompts; give one for each")
    if temperature < 0 or not 0 < top_p <= 1:
        raise ValueError(
            f"temperature ({temperature}) must not be negative and top_p ({top_p}) must be above 0 and at most 1; "
            "choose temperature 0 for greedy decoding"
        )
    if temperature == 0 and num_samples != 1:
        raise ValueError(
            f"num_samples ({num_samples}) must be 1 at temperature 0, which writes the same text each time; "
            "choose a temperature such as 0.8"
        )
    if not 1 <= num_samples <= _MOST_SAMPLES:
        raise ValueError(f"num_samples ({num_samples}) must be from 1 to {_MOST_SAMPLES}; choose 1")
