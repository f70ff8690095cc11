"""Survey the original model before anything is quantized: costs and scores for bit allocation."""

import logging
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from tqdm import tqdm

from moeq.allocation.evidence import Promise, read_evidence
from moeq.allocation.plan import DEFAULT_CHOICES, parse_choices
from moeq.callback import Step, module_of
from moeq.disk.atomic import write_json
from moeq.disk.waiting import WaitingStates
from moeq.fit.preflight import FitWork
from moeq.fit.schedule import GIB
from moeq.module import MoEQuantModule
from moeq.preflight.phases import Phase
from moeq.survey.preflight import survey_phases
from moeq.survey.survey_spec import SurveyOptions, SurveySpec
from moeq.survey.surveyor import Surveyor


class Survey(Step):
    """Writes survey.json and sets ``run.evidence``; put it before BitAllocation.

    Args:
        choices: What a weight may get: bits (groups of ``--model.group_size``), or labels such as "4g128", "4g0"
            (no groups) and "q3_k" (a two-level grid of llama.cpp).
        **settings: Those of ``SurveyOptions``.
    """

    def __init__(self, choices: Sequence[int | str] = DEFAULT_CHOICES, **settings: Any) -> None:
        self.choices = tuple(choices)
        self.options = SurveyOptions(**settings)
        # A mistake in the configuration shows before a model is loaded.
        SurveySpec(**vars(self.options), choices=parse_choices(self.choices, None))
        self._surveyor: Surveyor | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ask for the passes of a survey, and say what it will hold."""
        module = module_of(pl_module)
        grid = module.grid
        self._spec = SurveySpec(
            choices=parse_choices(self.choices, grid.group_size), grid=grid, solve=module.solve_spec,
            affinity_power=float(module.hparams["affinity_power"]), **vars(self.options),
        )  # fmt: skip
        for choice in self._spec.choices:
            choice.grid(grid)  # raises for widths that no grid has
        Surveyor(module.adapter, self._spec, self._waiting(module))  # raises where no choice fits a weight
        module.run.needs.survey = True
        spec = self._spec
        module.run.promise = Promise(spec.costs, spec.scores, spec.choices, spec.predictor)

    def expected(self, module: MoEQuantModule, work: FitWork) -> Sequence[Phase]:
        """Its passes."""
        return survey_phases(work, self._spec)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sweep ahead of the first pass; a resumed run makes no survey: it reads the one of its first part."""
        module = module_of(pl_module)
        run, path = module.run, module.run_dir / "survey.json"
        if any(each.kind == "survey" for each in module.walk.schedule):
            if not run.needs.evidence and trainer.is_global_zero:
                logging.getLogger(__name__).warning(
                    f"No step of this run needs its survey; {path} can serve another run (survey of BitAllocation)"
                )
            self._surveyor = Surveyor(module.adapter, self._spec, self._waiting(module), module.device)
            self._sweep_ahead(trainer, module, self._surveyor)
        elif path.exists():
            run.evidence = read_evidence(path, module.weight_shapes())

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach to the block of a survey pass."""
        if self._surveyor is not None:
            self._surveyor.open_block(module_of(pl_module).current_pass.block)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Padding does not count."""
        if self._surveyor is not None:
            self._surveyor.start_batch(batch_idx, _inputs(batch))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finish a block; after the last one write what was found."""
        module = module_of(pl_module)
        if self._surveyor is None:
            return
        self._surveyor.finish_block()
        if module.current_pass.block + 1 < len(module.adapter.blocks):
            return
        evidence = module.run.evidence = self._surveyor.evidence()
        self._surveyor = None
        found = [*evidence.costs, *evidence.scores, *(["predictor"] if self._spec.predictor else [])]
        rank_zero_info(f"Survey: {', '.join(found) or 'expert usage and similarity'}")
        if trainer.is_global_zero:
            write_json(module.run_dir / "survey.json", evidence.to_json())

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Hooks come off whatever happens."""
        if self._surveyor is not None:
            self._surveyor.close()

    def _waiting(self, module: MoEQuantModule) -> WaitingStates:
        """As much as the module's hidden states may take, which do not wait yet while the sweeps are made."""
        return WaitingStates(int(module.walk_spec.hidden_gib * GIB), module.run_dir)

    def _sweep_ahead(self, trainer: Trainer, module: MoEQuantModule, surveyor: Surveyor) -> None:
        num_batches = min(surveyor.num_ahead, trainer.num_training_batches)
        loader: Any = trainer.train_dataloader
        batches = [
            _inputs(trainer.strategy.batch_to_device(batch, module.device))
            for batch in (islice(loader, int(num_batches)) if num_batches else ())
        ]

        def show(blocks: Iterable[int], sweep: str) -> Iterable[int]:
            hidden = trainer.progress_bar_callback is None or not trainer.is_global_zero
            return tqdm(blocks, f"survey {sweep}", total=len(module.adapter.blocks), unit="block", disable=hidden)

        # Not into run.seconds, where the first pass counts it already.
        surveyor.sweep_ahead(batches, show)


def _inputs(batch: Any) -> dict[str, Tensor]:
    return {key: batch[key] for key in ("input_ids", "attention_mask") if batch.get(key) is not None}
