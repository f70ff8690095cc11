"""Evaluation tasks as Lightning validation loaders: one per task, each batch a list of documents."""

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import lightning as L
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

from moeq.evaluation.batches import CPU_PASS_TOKENS, batches
from moeq.evaluation.placing import Places, choose_places
from moeq.evaluation.records import Records
from moeq.evaluation.task_evaluation import Sampling, TaskEvaluation, metric_kinds
from moeq.evaluation.validation import result_fingerprint
from moeq.programs.sandbox import check_permission
from moeq.tasks.documents import Document
from moeq.tasks.domains import domain_task
from moeq.tasks.encode import Encoder, window_of
from moeq.tasks.registry import expand
from moeq.tasks.rows import load_rows
from moeq.tasks.task import Code, Task


class EvaluationDataModule(L.LightningDataModule):
    """The tasks of validate.

    Args:
        tasks: Names of tasks or of groups of them (docs/tasks.md lists all), or your own as package.module.
        domains: Perplexity of any text: a name, and a .txt or .jsonl file (also .gz) in data_dir.
        data_dir: Folder with one folder of files per data set; null reads the hub.
        num_documents: Evaluate only this many documents of each task, evenly spread; marked as partial in the results.
        num_shots: Few-shot examples by task, where they differ from the task's own: {"mmlu": 0}.
        window_length: Tokens of a window of the domains (tasks with a protocol have their own).
        num_windows: Windows per domain, evenly spread over its text; null is all of them.
        max_length: Longest input in tokens; null is the model's own. Longer documents are cut on the left, as the
            harness does, and counted.
        batch_tokens: Tokens per forward pass, padding included; lower it when memory runs out.
        sampling: How text is generated: greedily, or several samples at a temperature.
        execute_code: Run the programs that the model writes (HumanEval, MBPP); see docs/code_execution.md.
    """

    def __init__(
        self,
        tasks: list[str] | None = None,
        domains: dict[str, str] | None = None,
        data_dir: str | None = None,
        num_documents: int | None = None,
        num_shots: dict[str, int] | None = None,
        window_length: int = 2048,
        num_windows: int | None = None,
        max_length: int | None = None,
        batch_tokens: int = 8192,
        sampling: Sampling | None = None,
        execute_code: bool = False,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)
        _check_positive(
            num_documents=num_documents, window_length=window_length, num_windows=num_windows, max_length=max_length,
            batch_tokens=batch_tokens,
        )  # fmt: skip
        if window_length < 2:
            raise ValueError(f"window_length ({window_length}) must be at least 2, since token 1 is not scored")
        if not tasks and not domains:
            raise ValueError("tasks and domains are both empty: nothing to evaluate; name a task (docs/tasks.md)")
        self.tasks = [
            *(domain_task(name, file, window_length, num_windows) for name, file in (domains or {}).items()),
            *expand(tasks or []),
        ]
        names = [task.name for task in self.tasks]
        if doubled := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"{doubled} are named more than once among tasks and domains; rename the domain")
        if unknown := sorted((num_shots or {}).keys() - set(names)):
            raise ValueError(f"num_shots names {unknown}, which are not among the tasks {names}; correct the names")
        self.tasks = [replace(task, num_shots=(num_shots or {}).get(task.name, task.num_shots)) for task in self.tasks]
        for task in self.tasks:
            if isinstance(task, Code):
                check_permission(execute_code, task.name)
        self.data_dir = None if data_dir is None else Path(data_dir)
        self.num_documents, self.window_length = num_documents, window_length
        self.max_length, self.batch_tokens = max_length, batch_tokens
        self.sampling = sampling or Sampling()
        self.evaluations: list[TaskEvaluation] = []
        self.places: Places

    @override
    def val_dataloader(self) -> list[DataLoader[Any]]:
        """One loader per task; under several ranks each sees its share, without duplicates.

        Documents that an interrupted run has finished are left out of the batches.

        Raises:
            ValueError: A missing or malformed file, or a text shorter than the windows asked for.
        """
        assert self.trainer is not None, "the loaders are built by a Trainer"
        module = cast(Any, self.trainer.lightning_module)
        encoder = Encoder(module.tokenizer, self.max_length or window_of(module.config, module.tokenizer))
        device = self.trainer.strategy.root_device
        # Batches are cut for the passes that they are going to run in, which a streamed model decides.
        self.places = choose_places(module.hparams, device)
        fingerprint = result_fingerprint(module.hparams, self.sampling, device)
        self.evaluations = [self._open(task, encoder, fingerprint) for task in self.tasks]
        # Every rank has read what is finished before any of them adds to it.
        self.trainer.strategy.barrier("moeq_evaluation")
        return [_loader(evaluation.batches) for evaluation in self.evaluations]

    @property
    def batch_costs(self) -> list[list[tuple[int, float]]]:
        """Documents and tokens of each batch of each loader, for the progress bar."""
        return [
            [(len(documents), float(sum(d.num_tokens for d in documents))) for documents in evaluation.batches or [[]]]
            for evaluation in self.evaluations
        ]

    @override
    def transfer_batch_to_device(self, batch: Any, device: Any, dataloader_idx: int) -> Any:
        """Documents are plain data: scoring makes its tensors on the device of the model."""
        return batch

    def _open(self, task: Task, encoder: Encoder, fingerprint: str) -> TaskEvaluation:
        """Read a task's data, turn its rows into documents, leave out those that are finished, batch the others."""
        assert self.trainer is not None
        trainer, module = self.trainer, cast(Any, self.trainer.lightning_module)
        rows = load_rows(task.source, self.data_dir)
        try:
            encoded = encoder.documents(task, rows, window_length=self.window_length, num_documents=self.num_documents)
        except (KeyError, ValueError) as error:
            lacking = "a row lacks the field " if isinstance(error, KeyError) else ""
            raise ValueError(f"task {task.name} ({rows.origin}): {lacking}{error}") from error
        restart = bool(module.hparams["restart"])
        records = Records(module.run_dir, task.name, fingerprint, trainer.global_rank, restart=restart)
        kinds = metric_kinds(task, self.sampling, compared=module.hparams["reference"] is not None)
        evaluation = TaskEvaluation(task, rows, *encoded, kinds, records, trainer.global_rank)
        evaluation.limit = trainer.limit_val_batches
        on_cpu = trainer.strategy.root_device.type == "cpu"
        evaluation.batches = batches(
            evaluation.unfinished, self.batch_tokens, trainer.global_rank, trainer.world_size,
            CPU_PASS_TOKENS if on_cpu else None, self.places.without,
        )  # fmt: skip
        return evaluation


def _loader(dataset: list[list[Document]]) -> DataLoader[Any]:
    # A rank without documents has one empty batch: Lightning does not validate at all where there is none.
    return DataLoader(cast(Dataset[Any], dataset or [[]]), batch_size=None, collate_fn=list)


def _check_positive(**settings: int | None) -> None:
    for name, value in settings.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} ({value}) must be positive; leave it out for the usual value")
