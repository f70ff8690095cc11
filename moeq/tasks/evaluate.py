"""All metrics of one evaluation set: forward passes and bookkeeping around the functions of this package."""

import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from moeq.tasks.arithmetic import greedy_continuations, parse_answer
from moeq.tasks.divergence import kl_sum_and_agreement
from moeq.tasks.documents import Result
from moeq.tasks.metrics import COMPARISONS, TaskMetrics
from moeq.tasks.perplexity import nll_sum_and_count
from moeq.tasks.routing import count_same_routing, record_routing
from moeq.tasks.spec import Kind, Source, Task


class SetMetrics(nn.Module):
    """Metrics of one evaluation set.

    A batch with ``input_ids`` [B, L] is windows of text: perplexity and, against a reference model, KL divergence,
    top-1 agreement and router agreement.  A batch with ``prompt_ids`` [B, P], ``attention_mask`` [B, P] and ``answers``
    is arithmetic: exact match by greedy generation.

    Args:
        name: Name of the set, for messages.
        tokenizer: Decodes generated answers; only generation batches need it.
    """

    def __init__(self, name: str, tokenizer: Any = None) -> None:
        super().__init__()
        self.name = name
        self.tokenizer = tokenizer
        self.num_batches = 0
        metrics: dict[str, Kind] = {"perplexity": "perplexity", "exact_match": "mean"}
        self.task = Task(name=name, source=Source(folder="", hub=None, splits=("text",)), metrics=metrics)
        self.metrics = TaskMetrics(name, {**metrics, **COMPARISONS})
        self._start, self._num_tokens = time.perf_counter(), 0

    @torch.no_grad()
    def update(self, model: Any, reference: Any, batch: Mapping[str, Any]) -> None:
        """Run the model (and the reference, where one is given) on a batch and add to the metrics.

        Args:
            model: The causal LM under evaluation.
            reference: The original model, or None: then only perplexity and exact match are measured.
            batch: See the class.

        Raises:
            ValueError: Logits are not finite, or the two models do not fit together.
        """
        if "prompt_ids" in batch:
            self._update_exact_match(model, batch)
        else:
            self._update_windows(model, reference, batch["input_ids"])
        self.num_batches += 1

    def compute(self) -> dict[str, float]:
        """Every metric that saw data on any rank, by name; all ranks must call this, and all get the same numbers."""
        return {name: found.value for name, found in self.metrics.compute().get("", {}).items()}

    def description(self) -> Any:
        """What this rank measured."""
        count = max((found.num_documents for found in self.metrics.compute().get("", {}).values()), default=0)
        return {
            "split": "text", "origin": "", "sha256": "", "num_shots": 0, "num_documents": count,
            "num_available": count, "num_tokens": self._num_tokens, "num_truncated": 0, "partial": None,
            "fallbacks": {}, "seconds": time.perf_counter() - self._start,
        }  # fmt: skip

    def reset(self) -> None:
        """Forget all batches."""
        self.num_batches = 0
        self.metrics.reset()

    def _add(self, **values: tuple[Any, Any]) -> None:
        floats = {name: (float(total), float(weight)) for name, (total, weight) in values.items()}
        self.metrics.add(Result(0, "", (), floats))

    def _update_windows(self, model: Any, reference: Any, input_ids_BL: Tensor) -> None:
        with record_routing(model) as routing:
            logits_BLV = model(input_ids=input_ids_BL, use_cache=False).logits
        self._check_finite(logits_BLV, "the model")
        self._num_tokens += input_ids_BL.numel()
        for logits_LV, ids_L in zip(logits_BLV, input_ids_BL, strict=True):
            self._add(perplexity=nll_sum_and_count(logits_LV[None], ids_L[None]))
        if reference is None:
            return
        with record_routing(reference) as reference_routing:
            reference_logits_BLV = reference(input_ids=input_ids_BL, use_cache=False).logits
        self._check_finite(reference_logits_BLV, "the reference model")
        for logits_LV, reference_logits_LV in zip(logits_BLV, reference_logits_BLV, strict=True):
            kl_sum, num_same, num_positions = kl_sum_and_agreement(reference_logits_LV[None], logits_LV[None])
            self._add(kl=(kl_sum, num_positions), top1_agreement=(num_same, num_positions))
        self._add(router_agreement=count_same_routing(routing, reference_routing))

    def _update_exact_match(self, model: Any, batch: Mapping[str, Any]) -> None:
        if self.tokenizer is None:
            raise ValueError(f"set {self.name} has generation batches but no tokenizer; give SetMetrics one")
        answers: list[str] = batch["answers"]
        pad = self.tokenizer.pad_token_id
        new_ids_BN, logits_BNV = greedy_continuations(
            model,
            batch["prompt_ids"],
            batch["attention_mask"],
            # A space, the digits at one token each, and one more token to see that the number has ended.
            max_new_tokens=max(map(len, answers)) + 2,
            pad_token_id=0 if pad is None else pad,
        )
        self._check_finite(logits_BNV, "the model")
        texts = [self.tokenizer.decode(ids_N, skip_special_tokens=True) for ids_N in new_ids_BN.tolist()]
        for text, answer in zip(texts, answers, strict=True):
            self._add(exact_match=(parse_answer(text) == answer, 1))

    def _check_finite(self, logits: Tensor, whose: str) -> None:
        if not logits.isfinite().all():
            bad = int((~logits.isfinite()).sum())
            raise ValueError(
                f"{whose} gave {bad} non-finite logits of {logits.numel()} on set {self.name}, "
                f"batch {self.num_batches}; check its weights, or load it in bfloat16 or float32 instead of float16"
            )
