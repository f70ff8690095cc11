"""What the card of the reference model states: held-out losses, exact match on sums, and who uses which expert.

Losses are mean nats per token over windows of 512 tokens of documents that are each followed by ``<|endoftext|>`` (the
protocol of ``moeq.scoring.perplexity``; a last partial window is left out).  Usage of an expert by a domain is its
share of the routed slots (tokens times top-k) of that domain in its block.

Shapes: D domains, L blocks, E experts, N windows, T tokens, K experts per token.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moeq.decoding.generate import generate
from moeq.models.adapter import is_experts_module
from moeq.scoring.perplexity import nll_sum_and_count
from moeq.tasks.arithmetic import Sum, parse_answer

WINDOW = 512
# A domain uses an expert where it gives it at least a quarter of the slots of a perfectly even routing.
USED = 0.25
# Space, up to three digits and the newline.
ANSWER_TOKENS = 6


@contextmanager
def slot_counts(model: nn.Module) -> Iterator[Tensor]:
    """Count the routed slots of every expert while the model runs; yields counts_LE, filled in place."""
    modules = [module for module in model.modules() if is_experts_module(module)]
    counts_LE = torch.zeros(len(modules), int(modules[0].num_experts), dtype=torch.int64)

    def hook(block: int) -> Any:
        def count(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            counts_LE[block] += inputs[1].flatten().bincount(minlength=counts_LE.shape[1])

        return count

    handles = [module.register_forward_pre_hook(hook(block)) for block, module in enumerate(modules)]
    try:
        yield counts_LE
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def measure_windows(model: nn.Module, windows_NT: Tensor, batch_size: int = 8) -> tuple[dict[str, Any], Tensor]:
    """Loss over windows and the slots they use: ``{"nats_per_token", "num_tokens"}`` and counts_LE."""
    total, scored = 0.0, 0
    with slot_counts(model) as counts_LE:
        for batch in windows_NT.split(batch_size):
            nll_sum, num_tokens = nll_sum_and_count(model(batch).logits, batch)
            total, scored = total + float(nll_sum), scored + int(num_tokens)
    return {"nats_per_token": round(total / scored, 4), "num_tokens": scored}, counts_LE


def exact_match(model: nn.Module, tokenizer: Any, problems: Sequence[Sum], batch_size: int = 100) -> float:
    """Share of problems that greedy decoding answers exactly."""
    correct = 0
    for start in range(0, len(problems), batch_size):
        batch = problems[start : start + batch_size]
        prompts = [tokenizer.encode(problem.prompt, add_special_tokens=False) for problem in batch]
        texts = generate(
            model, prompts, tokenizer=tokenizer, stop=("\n",), max_new_tokens=ANSWER_TOKENS, seeds=[0] * len(prompts)
        )
        correct += sum(parse_answer(text) == problem.answer for (text,), problem in zip(texts, batch, strict=True))
    return correct / len(problems)


def usage_report(counts: dict[str, Tensor]) -> dict[str, Any]:
    """Shares of slots, their spread, and whether every expert is used by some domain.

    Args:
        counts: counts_LE of each domain.

    Returns:
        ``share``: by domain and block, the share of slots of each expert.  ``coefficient_of_variation``: by domain,
        standard deviation over mean of the shares of a block, averaged over blocks.  ``largest_share``: by block and
        expert, the largest share over domains.  ``threshold``: share from which a domain uses an expert.
        ``unused``: (block, expert) that no domain uses.
    """
    share = {domain: counts_LE / counts_LE.sum(1, keepdim=True) for domain, counts_LE in counts.items()}
    largest_LE = torch.stack(list(share.values())).amax(0)
    threshold = USED / largest_LE.shape[1]
    spread = {domain: share_LE.std(1, correction=0) / share_LE.mean(1) for domain, share_LE in share.items()}
    return {
        "share": {domain: _rounded(share_LE) for domain, share_LE in share.items()},
        "coefficient_of_variation": {domain: round(float(cv_L.mean()), 4) for domain, cv_L in spread.items()},
        "largest_share": _rounded(largest_LE),
        "threshold": round(threshold, 6),
        "unused": (largest_LE < threshold).nonzero().tolist(),
    }


def _rounded(values_LE: Tensor) -> list[list[float]]:
    return [[round(value, 5) for value in row] for row in values_LE.tolist()]
