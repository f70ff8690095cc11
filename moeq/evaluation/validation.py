"""What validate does between the hooks of Lightning: models in memory, batches through them.

The original of a comparison either runs beside the model on every batch ("memory"), or before it over all batches,
leaving its logits in the run folder ("disk"), so that only one of the two is ever held.
"""

import gc
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm

from moeq.checkpoint.free_memory import free_bytes
from moeq.checkpoint.loading import load_config, load_model, model_bytes
from moeq.checkpoint.packed import keep_dequantized
from moeq.decoding.decoders import Decoding, examine
from moeq.disk.identity import model_identity
from moeq.disk.versions import installed_versions
from moeq.evaluation.evaluator import Evaluator, Original, ask_checked, plan_documents
from moeq.evaluation.reference_logits import LiveOriginal, StoredOriginal, choose_mode, num_bytes
from moeq.evaluation.result_digest import result_digest
from moeq.evaluation.task_evaluation import Sampling, TaskEvaluation
from moeq.kernels.compute_dtype import compute_dtype
from moeq.programs.sandbox import protections
from moeq.report.task_report import TaskReport, task_report
from moeq.scoring.likelihood import Scorer
from moeq.tasks.documents import Document
from moeq.tasks.task import Code, Generation

ReferenceMode = Literal["auto", "memory", "disk"]


def result_fingerprint(settings: Mapping[str, Any], sampling: Sampling, device: torch.device) -> str:
    """What the result of a document depends on besides the document.

    Args:
        settings: Hyper-parameters of the module.
        sampling: How text is generated.
        device: Where the model runs.
    """
    name, reference, dtype = (settings[key] for key in ("name", "reference", "dtype"))
    return result_digest(
        model=model_identity(name), dtype=dtype, reference=reference and model_identity(reference),
        settings=asdict(sampling) | {"compute_dtype": computed_in(settings, name, device)},
        versions=installed_versions(),
    )  # fmt: skip


def computed_in(settings: Mapping[str, Any], name: str, device: torch.device) -> str:
    """Name of the dtype that a model is going to compute in, before it is loaded."""
    stored = settings["dtype"] if settings["dtype"] != "auto" else load_config(name).dtype or torch.bfloat16
    stored = getattr(torch, str(stored).removeprefix("torch."))
    return str(compute_dtype(settings["compute_dtype"], stored, device)).removeprefix("torch.")


class Validation:
    """The evaluations of a run and what evaluates them.

    Args:
        evaluations: One per task, in the order of the loaders.
        evaluator: Runs batches.
    """

    def __init__(self, evaluations: Sequence[TaskEvaluation], evaluator: Evaluator) -> None:
        self.evaluations, self.evaluator = evaluations, evaluator
        self.reports: list[TaskReport] = []
        for evaluation in evaluations:
            evaluation.metrics.to(evaluator.scorer.model.device)

    def step(self, documents: Sequence[Document], index: int) -> None:
        """Evaluate one batch of the task of loader ``index``; an empty batch is a rank without documents."""
        if not documents:
            return
        evaluation, start = self.evaluations[index], time.perf_counter()
        results = self.evaluator.run(evaluation.task, documents)
        evaluation.add(results, time.perf_counter() - start)

    def finish(self) -> None:
        """Reduce the metrics over the ranks, all of which must call it."""
        for evaluation in self.evaluations:
            reasons = self.evaluator.scorer.fallbacks
            if isinstance(evaluation.task, Generation) and self.evaluator.decoding.reason:
                reasons = [*reasons, f"decoding: {self.evaluator.decoding.reason}"]
            evaluation.fallbacks = dict.fromkeys(reasons, len(evaluation.batches))
        self.reports = [task_report(evaluation) for evaluation in self.evaluations]


def start_validation(
    settings: dict[str, Any],
    tokenizer: Any,
    evaluations: Sequence[TaskEvaluation],
    sampling: Sampling,
    device: torch.device,
    run_dir: Path,
    announce: Callable[[str], None],
) -> Validation:
    """Load what is evaluated, and what it is compared with.

    Args:
        settings: Hyper-parameters of the module.
        tokenizer: Of the model.
        evaluations: The tasks, with this rank's batches.
        sampling: How text is generated.
        device: Where models run.
        run_dir: Folder of the run.
        announce: Tells the user something, once for all ranks.

    Raises:
        ValueError: A model cannot be read, or the disk has no room for the original's logits.
    """
    name, reference = settings["name"], settings["reference"]
    how = settings["dtype"], settings["compute_dtype"], device
    original: Original | None = None
    if reference is not None:
        check_vocabulary(name, reference)
        sizes = model_bytes(name, *how), model_bytes(reference, *how)
        if choose_mode(settings["reference_mode"], *sizes, free_bytes(device)) == "disk":
            original = run_original(settings, evaluations, device, run_dir / "original", announce)
        else:
            original = LiveOriginal(Scorer(load_model(reference, *how).to(device)))
    model = load_model(name, *how).to(device)
    prompts = [d.requests[0].context for e in evaluations if isinstance(e.task, Generation) for d in e.unfinished[:8]]
    decoding = examine(model, prompts[:8]) if prompts else Decoding()
    # Half of what is free: passes need the rest.
    keep_dequantized(model, free_bytes(device) / 2)
    confine(evaluations, announce)
    workers = max(1, (os.cpu_count() or 1) - 1)
    evaluator = Evaluator(Scorer(model), tokenizer, original, sampling, decoding, num_workers=workers)
    return Validation(evaluations, evaluator)


def check_vocabulary(name: str, reference: str) -> None:
    """Refuse an original of another vocabulary, before either model is loaded."""
    sizes = [load_config(each).get_text_config().vocab_size for each in (name, reference)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"{name} has a vocabulary of {sizes[0]} tokens, and the original {reference} one of {sizes[1]}; give "
            "--model.reference the model that it was made from, or --model.reference null for no comparison"
        )


def run_original(
    settings: dict[str, Any],
    evaluations: Sequence[TaskEvaluation],
    device: torch.device,
    folder: Path,
    announce: Callable[[str], None],
) -> StoredOriginal:
    """Let the original run over all batches that it has not run over yet, and release it."""
    reference, dtype = settings["reference"], settings["dtype"]
    computed = {"compute_dtype": computed_in(settings, reference, device)}
    identity = result_digest(
        model=model_identity(reference), dtype=dtype, reference=None, settings=computed, versions=installed_versions()
    )
    stored = StoredOriginal(folder, identity)
    missing = [
        (evaluation.task, documents, plan)
        for evaluation in evaluations
        for documents in evaluation.batches
        if documents and not stored.has(plan := plan_documents(documents))
    ]
    if not missing:
        return stored
    model = load_model(reference, dtype, settings["compute_dtype"], device).to(device)
    stored.check_room(
        sum(num_bytes(plan, model.config.get_text_config().vocab_size, model.dtype) for *_, plan in missing)
    )
    announce(f"The original {reference} runs first, as both models do not fit: its logits go to {folder}")
    scorer = Scorer(model)
    with torch.no_grad():
        for task, documents, plan in tqdm(missing, desc="original", unit="batch", disable=None):
            stored.store(ask_checked(scorer, plan, task, documents, whose="the original"))
    del model, scorer
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return stored


def confine(evaluations: Sequence[TaskEvaluation], announce: Callable[[str], None]) -> None:
    """Find out what confines model-written programs here, for the report, and say what nothing prevents."""
    coding = [evaluation for evaluation in evaluations if isinstance(evaluation.task, Code)]
    if not coding:
        return
    given = protections()
    for evaluation in coding:
        evaluation.protections = (*given.layers, *(f"nothing against: {missing}" for missing in given.missing))
    if given.missing:
        announce(f"Programs that the model writes can, on this system: {'; '.join(given.missing)}")
