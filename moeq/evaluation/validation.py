"""What validate does between the hooks of Lightning: models in memory or streamed, batches through them.

The original of a comparison either runs beside the model on every batch ("memory"), or before it over all batches,
leaving its logits in the run folder ("disk"), so that only one of the two is ever held.  Of a model that is streamed
only a block is held (``moeq.evaluation.placing``).
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
from moeq.checkpoint.loading import load_config
from moeq.checkpoint.packed import keep_dequantized
from moeq.checkpoint.placement import Placement
from moeq.checkpoint.prepare import prepare
from moeq.checkpoint.source_options import source_options
from moeq.decoding.decoders import Decoding, examine
from moeq.disk.identity import model_identity
from moeq.disk.versions import installed_versions
from moeq.evaluation.evaluator import Evaluator, Original, ask_checked, plan_documents
from moeq.evaluation.open_models import check_files, computed_in, open_scorer
from moeq.evaluation.placing import Places, refuse_generation
from moeq.evaluation.reference_logits import LiveOriginal, StoredOriginal, num_bytes
from moeq.evaluation.result_digest import result_digest
from moeq.evaluation.task_evaluation import Sampling, TaskEvaluation
from moeq.preflight.meter import Meter
from moeq.programs.sandbox import protections
from moeq.report.task_report import TaskReport, task_report
from moeq.scoring.forward_plan import Plan
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
    revision = settings["revision"]
    return result_digest(
        model=model_identity(name, revision), dtype=dtype,
        reference=reference and model_identity(reference, revision),
        settings=asdict(sampling) | {"compute_dtype": computed_in(settings, name, device)},
        versions=installed_versions(),
    )  # fmt: skip


class Validation:
    """The evaluations of a run and what evaluates them.

    Args:
        evaluations: One per task, in the order of the loaders.
        evaluator: Runs batches.
        placements: Where its models are: "model" and, where it is compared with one, "reference".
    """

    def __init__(
        self, evaluations: Sequence[TaskEvaluation], evaluator: Evaluator, placements: Mapping[str, Placement]
    ) -> None:
        self.evaluations, self.evaluator, self.placements = evaluations, evaluator, placements
        self.reports: list[TaskReport] = []
        for evaluation in evaluations:
            evaluation.metrics.to(evaluator.scorer.device)
        self._begun: set[int] = set()

    def begin(self) -> None:
        """Delete the results that are to be started over, by one rank, before any other adds to them."""
        for evaluation in self.evaluations:
            evaluation.records.begin()

    def step(self, documents: Sequence[Document], index: int) -> None:
        """Evaluate one batch of the task of loader ``index``; an empty batch is a rank without documents."""
        if not documents:
            return
        evaluation, start = self.evaluations[index], time.perf_counter()
        if index not in self._begun:
            self._begun.add(index)
            self.evaluator.scorer.expect(evaluation.task.name, map(plan_documents, evaluation.expected))
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
    places: Places,
    tokenizer: Any,
    evaluations: Sequence[TaskEvaluation],
    sampling: Sampling,
    device: torch.device,
    run_dir: Path,
    announce: Callable[[str], None],
    meter: Meter | None = None,
) -> Validation:
    """Load what is evaluated, and what it is compared with.

    Args:
        settings: Hyper-parameters of the module.
        places: Where the models go.
        tokenizer: Of the model.
        evaluations: The tasks, with this rank's batches.
        sampling: How text is generated.
        device: Where models run.
        run_dir: Folder of the run.
        announce: Tells the user something, once for all ranks.
        meter: Measures what models take.

    Nothing that stands in the run folder is changed: what refuses a run is found here, or before.

    Raises:
        ValueError: A model cannot be read, a streamed one would have to write text, or the disk has no room for the
            original's logits.
    """
    name, reference = settings["name"], settings["reference"]
    refuse_generation(places.model, evaluations)
    for placement in places.streamed:
        announce(placement.reason)
    original: Original | None = None
    if reference is not None:
        check_vocabulary(name, reference, settings)
    meter = meter or Meter()
    if places.mode == "disk":
        check_files(settings, name)
        with meter.phase("original", "original"):
            original = run_original(settings, places, evaluations, device, run_dir / "original", announce)
    with meter.phase("load model", "model"):
        if places.mode != "disk" and places.original is not None:
            original = LiveOriginal(open_scorer(settings, reference, places.original, places.without, device, run_dir))
        scorer = open_scorer(settings, name, places.model, places.without, device, run_dir)
    model = scorer.model
    prompts = [d.requests[0].context for e in evaluations if isinstance(e.task, Generation) for d in e.unfinished[:8]]
    decoding = examine(model, prompts[:8]) if prompts else Decoding()
    # Half of what is free: passes need the rest.
    room_bytes = free_bytes(device) / 2
    if not keep_dequantized(model, room_bytes) and (prepared := prepare(model, room_bytes)).any:
        announce(prepared.line())
    confine(evaluations, announce)
    workers = max(1, (os.cpu_count() or 1) - 1)
    evaluator = Evaluator(scorer, tokenizer, original, sampling, decoding, num_workers=workers)
    return Validation(evaluations, evaluator, places.by_role)


def check_vocabulary(name: str, reference: str, settings: Mapping[str, Any]) -> None:
    """Refuse an original of another vocabulary, before either model is loaded."""
    sizes = [load_config(each, **source_options(settings)).get_text_config().vocab_size for each in (name, reference)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"{name} has a vocabulary of {sizes[0]} tokens, and the original {reference} one of {sizes[1]}; give "
            "--model.reference the model that it was made from, or --model.reference null for no comparison"
        )


def run_original(
    settings: dict[str, Any],
    places: Places,
    evaluations: Sequence[TaskEvaluation],
    device: torch.device,
    folder: Path,
    announce: Callable[[str], None],
) -> StoredOriginal:
    """Let the original run over all batches that it has not run over yet, and release it."""
    reference, dtype = settings["reference"], settings["dtype"]
    computed = computed_in(settings, reference, device)
    identity = result_digest(
        model=model_identity(reference, settings["revision"]), dtype=dtype, reference=None,
        settings={"compute_dtype": computed}, versions=installed_versions(),
    )  # fmt: skip
    stored = StoredOriginal(folder, identity)
    missing = [_not_stored(evaluation, stored, places) for evaluation in evaluations]
    plans = [plan for batches in missing for _, plan in batches]
    if not plans:
        return stored
    vocab_size = load_config(reference, **source_options(settings)).get_text_config().vocab_size
    needed = sum(num_bytes(plan, vocab_size, getattr(torch, computed)) for plan in plans)
    stored.check_room(needed)
    announce(f"The original {reference} runs before the model: its logits go to {folder}")
    assert places.original is not None
    scorer = open_scorer(settings, reference, places.original, places.without, device, folder, needed)
    with torch.no_grad(), tqdm(total=len(plans), desc="original", unit="batch", disable=None) as bar:
        for evaluation, batches in zip(evaluations, missing, strict=True):
            scorer.expect(f"original, {evaluation.task.name}", [plan for _, plan in batches])
            for documents, plan in batches:
                stored.store(ask_checked(scorer, plan, evaluation.task, documents, whose="the original"))
                bar.update()
    del scorer
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return stored


def _not_stored(
    evaluation: TaskEvaluation, stored: StoredOriginal, places: Places
) -> list[tuple[Sequence[Document], Plan]]:
    """The batches of a task over which the original has not run, and the passes that it would run."""
    plans = [(documents, plan_documents(documents, places.without)) for documents in evaluation.expected]
    return [(documents, plan) for documents, plan in plans if not stored.has(plan)]


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
