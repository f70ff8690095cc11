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
from moeq.distributed import rank_and_world
from moeq.fit.preflight import FitWork
from moeq.fit.schedule import GIB
from moeq.forecast import data_shape
from moeq.module import MoEQuantModule
from moeq.preflight.phases import Phase
from moeq.survey.judge import SurveyJudge, check_apart, open_judge
from moeq.survey.preflight import survey_phases
from moeq.survey.remembered import RememberingJudge, survey_mark
from moeq.survey.survey_spec import SurveyOptions, SurveySpec
from moeq.survey.surveyor import Surveyor
from moeq.survey.sweeps import Show


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
        self._judge: SurveyJudge | None = None

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

    def check(self, module: MoEQuantModule) -> None:
        """Batches that are kept apart must leave others."""
        shape = data_shape(module.trainer)
        if shape is not None:
            check_apart(module.run.needs.batches_apart, shape.num_batches)

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
            self._open(trainer, module)
        elif path.exists():
            run.evidence = read_evidence(path, module.weight_shapes())

    def _open(self, trainer: Trainer, module: MoEQuantModule) -> None:
        """A surveyor, whose sweeps ahead are made; and a judge of plans, where a step wants one."""
        adapter, spec, device = module.adapter, self._spec, module.device
        if module.run.needs.batches_apart:
            apart, show = self._apart(trainer, module), self._shown(trainer, module)
            self._judge = open_judge(adapter, spec, apart, self._waiting(module), device, show)
        self._surveyor = Surveyor(adapter, spec, self._waiting(module), device, self._judge)
        num_batches = min(self._surveyor.num_ahead, int(trainer.num_training_batches))
        # Not into run.seconds, where the first pass counts it already.
        self._surveyor.sweep_ahead(self._batches(trainer, module, num_batches), self._shown(trainer, module))

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
        if self._judge is not None:
            module.run.judge = RememberingJudge(self._judge, module.run_dir / "search.json", survey_mark(evidence))
        self._surveyor = self._judge = None
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

    def _batches(self, trainer: Trainer, module: MoEQuantModule, num: int) -> list[dict[str, Tensor]]:
        """The first batches of this rank."""
        loader: Any = trainer.train_dataloader
        batches = islice(loader, num) if num else ()
        return [_inputs(trainer.strategy.batch_to_device(batch, module.device)) for batch in batches]

    def _apart(self, trainer: Trainer, module: MoEQuantModule) -> dict[int, dict[str, Tensor]]:
        """This rank's batches of those that the survey keeps apart, by number: the last ones of the whole set."""
        rank, world = rank_and_world()
        num = int(trainer.num_training_batches)
        first = num * world - module.run.needs.batches_apart
        check_apart(module.run.needs.batches_apart, num * world)
        every = self._batches(trainer, module, num)
        numbered = {index * world + rank: inputs for index, inputs in enumerate(every)}
        return {number: inputs for number, inputs in numbered.items() if number >= first}

    def _shown(self, trainer: Trainer, module: MoEQuantModule) -> Show:
        hidden = trainer.progress_bar_callback is None or not trainer.is_global_zero

        def show(blocks: Iterable[int], sweep: str) -> Iterable[int]:
            return tqdm(blocks, f"survey {sweep}", total=len(module.adapter.blocks), unit="block", disable=hidden)

        return show


def _inputs(batch: Any) -> dict[str, Tensor]:
    return {key: batch[key] for key in ("input_ids", "attention_mask") if batch.get(key) is not None}
