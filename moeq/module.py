"""The LightningModule: loads a model, turns a run into passes, runs one block on one batch per training step."""

import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor
from typing_extensions import override

import moeq.strategy  # noqa: F401  registers --trainer.strategy moeq_ddp
from moeq.allocation.plan import uniform_plan
from moeq.checkpoint.loading import DType, load_config, load_model, load_tokenizer
from moeq.evaluation.start import ReferenceMode, start_validation
from moeq.evaluation.task_evaluation import TaskEvaluation
from moeq.fit.activations import ActivationStore, BlockBatch
from moeq.fit.memory import MemoryRow, memory_row
from moeq.fit.resume import Resume
from moeq.fit.run import Run
from moeq.fit.schedule import Pass, Sequential, build_schedule
from moeq.models.adapter import Adapter
from moeq.models.blocks import BlockCall, capture_calls, run_block, until_reached
from moeq.models.shapes import weight_shapes
from moeq.quant.spec import GridSpec, Routing, SolveSpec, WeightShape
from moeq.report.task_report import task_scalars
from moeq.tasks.documents import Document


class MoEQuantModule(L.LightningModule):
    """A model under quantization (fit) or evaluation (validate).

    The Hugging Face model is kept out of the module tree: Lightning neither moves it, nor puts it in train mode, nor
    writes it into checkpoints.

    Args:
        name: Hub id or folder of a Mixture-of-Experts causal LM, original or exported by moeq.
        dtype: Dtype to load the model in; auto is the one of its files.
        reference: Hub id or folder of the original, to compare with in validate.
        reference_mode: Where the original waits for the comparison: "memory" beside the model, "disk" runs it first and
            keeps its logits in the run folder; "auto" takes the disk where the two do not fit.
        bits: Bits per weight, 2 to 8.
        group_size: In-features that share a scale; null is one scale per output channel.
        symmetric: Symmetric grids, without zero points.
        clip_search: Search the clipping range of each group (2.4-norm).
        damping: GPTQ: fraction of the mean Hessian diagonal added to the diagonal; the papers have 0.01, and 0.1 holds
            better where the calibration data are few or of other domains.
        act_order: GPTQ: quantize columns by decreasing Hessian diagonal (static groups).
        affinity_power: Weight of a token in an expert's Hessian: affinity ** power. 1 is AGQ, 0 plain GPTQ.
        routing: Tokens of a routed expert's Hessian: "routed" takes those that chose it, with their affinity;
            "all_experts" all tokens, each with weight 1 (affinity_power then acts on shared experts alone).
        sequential: "stage" lets each linear see quantized inputs; "block" is one pass per block (faster).
        hessian_gib: Bound on the Hessians of a pass, in GiB; above it the experts of a block are calibrated in chunks,
            with one sweep of the data for each, and the same codes.
        restart: Start over in a run folder that holds finished blocks or documents.
        label: Name of this run in result tables; null is the name of the model.
    """

    def __init__(
        self,
        name: str = "assets/reference-moe",
        dtype: DType = "auto",
        reference: str | None = None,
        reference_mode: ReferenceMode = "auto",
        bits: int = 4,
        group_size: int | None = GridSpec.group_size,
        symmetric: bool = False,
        clip_search: bool = True,
        damping: float = SolveSpec.damping,
        act_order: bool = True,
        affinity_power: float = 1.0,
        routing: Routing = "routed",
        sequential: Sequential = "stage",
        hessian_gib: float = 16.0,
        restart: bool = False,
        label: str | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False
        self.grid = GridSpec(bits, group_size, symmetric, clip_search)
        self.solve_spec = SolveSpec(damping, act_order)
        if affinity_power < 0:
            raise ValueError(f"affinity_power ({affinity_power}) must not be negative; 1 is AGQ, 0 is plain GPTQ")
        self.run = Run()
        self.survey_requested = False
        self.originals_requested = False
        self.routers_requested = False
        self.schedule: tuple[Pass, ...] = ()
        self._models: dict[str, Any] = {}
        self._activations, self._originals = ActivationStore(), ActivationStore()
        self._calls: dict[int, tuple[BlockCall, Tensor]] = {}
        self._pass_start = 0.0

    # -- the model

    @override
    def configure_model(self) -> None:
        if self._models:
            return
        name = self.hparams["name"]
        if self._trainer is not None and self._trainer.state.fn == "validate":
            # Its models come later: after the data, and one after the other where both do not fit.
            self._models["config"] = load_config(name)
        else:
            self._models["model"] = load_model(name, self.hparams["dtype"])
        self._models["tokenizer"] = load_tokenizer(name)

    @property
    def model(self) -> Any:
        """The model that is quantized or evaluated."""
        return self._models["model"]

    @property
    def tokenizer(self) -> Any:
        """Its tokenizer."""
        return self._models["tokenizer"]

    @property
    def adapter(self) -> Adapter:
        """Where the weights of the model are (made in fit)."""
        adapter: Adapter = self._models["adapter"]
        return adapter

    @property
    def run_dir(self) -> Path:
        """Folder of this run: everything it writes is below."""
        return Path(self.trainer.default_root_dir)

    @override
    def configure_optimizers(self) -> None:
        """Nothing is trained."""

    # -- fit: one pass per epoch, one block on one batch per step

    @override
    def on_fit_start(self) -> None:
        """Runs after the callbacks' hooks of the same name: the plan exists, a survey may have been asked for."""
        # An evaluation inside fit would measure a half-quantized model; validate is its own command.
        self.trainer.limit_val_batches = 0
        self.prepare()
        self.run.fallbacks += self.adapter.kept()
        self.model.to(self.device)
        if not self.run.plan:
            self.run.plan = uniform_plan(self.weight_shapes(), self.grid)
        sites = [self.adapter.sites(block) for block in range(len(self.adapter.blocks))]
        start = time.perf_counter()
        self.resume = Resume(self, sites)  # asks for the calibration data, which may have to be sampled first
        self.run.seconds["calibration data"] = time.perf_counter() - start
        first_block = self.resume.load()
        if first_block:
            rank_zero_info(f"Resuming: blocks 0 to {first_block - 1} of {len(sites)} are finished in {self.run_dir}")
        if not self.originals_requested:
            self.resume.commit()
        self.schedule = build_schedule(
            sites, survey=self.survey_requested and first_block == 0,
            sequential=self.hparams["sequential"], first_block=first_block, hessian_gib=self.hparams["hessian_gib"],
            originals=self.originals_requested, routers=self.routers_requested, routing=self.hparams["routing"],
        )  # fmt: skip
        self.trainer.fit_loop.max_epochs = len(self.schedule)

    def prepare(self) -> None:
        """Find the weights of the model; callbacks that need them in ``on_fit_start`` call it first."""
        if "adapter" not in self._models:
            self._models["adapter"] = Adapter(self.model)

    def weight_shapes(self) -> list[WeightShape]:
        """Every quantizable weight with its shape, its place and the share of tokens that use it."""
        return weight_shapes(self.adapter)

    @property
    def current_pass(self) -> Pass:
        """What the current epoch sweeps."""
        return self.schedule[self.current_epoch]

    @override
    def on_train_epoch_start(self) -> None:
        self._pass_start = time.perf_counter()
        if self.current_epoch and self.schedule[self.current_epoch - 1].kind == "survey" != self.current_pass.kind:
            self._activations.clear()

    @override
    @torch.no_grad()
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> STEP_OUTPUT:
        calls = capture_calls(self.model, self.adapter.blocks, batch)
        current, blocks = self.current_pass, self.adapter.blocks
        if current.kind == "original":
            self._originals.advance(batch_idx, current.block + 1, calls, blocks)
            return None
        hidden = self._activations.advance(batch_idx, current.block, calls, blocks)
        if self.originals_requested:
            self._calls[batch_idx] = calls[current.block], _keep_BT(batch)
        entered, finished = self.adapter.observed_modules(current.observed)
        if current.kind == "router":
            entered = list(self.adapter.routers(current.block).values())
        # A pass ends with the last module it is for; a survey, which has none, runs the whole block.
        with until_reached(entered, finished):
            run_block(blocks[current.block], hidden, calls[current.block])
        return None

    def block_batches(self) -> list[BlockBatch]:
        """The current block's inputs and the original's outputs, where a step asked for them before the first pass."""
        return [
            BlockBatch(self._activations.latest(batch), self._originals.latest(batch), call, keep_BT)
            for batch, (call, keep_BT) in sorted(self._calls.items())
        ]

    @override
    def on_train_epoch_end(self) -> None:
        """Runs after the callbacks' hooks: the sites of this pass are quantized."""
        self.run.hessians.clear()
        for part in self.current_pass.parts:
            if part.is_last:
                self.run.pools.pop(part.site.name, None)
        seconds = time.perf_counter() - self._pass_start
        self.run.seconds[self.current_pass.label] = seconds
        self.log("fit/seconds_per_pass", seconds, rank_zero_only=True)
        if self.current_pass.ends_block:
            self.resume.save(self.current_pass.block)
        elif self.current_pass.kind == "original" and self.current_pass.block == self.resume.first_block - 1:
            self.resume.commit()  # the original blocks that come before were needed until now

    def memory_row(self, measured: int) -> MemoryRow:
        """Expected and measured memory of the current pass, in bytes."""
        waiting = sum(store.num_bytes(self.device) for store in (self._activations, self._originals))
        return memory_row(self.current_pass, self.model, waiting, measured)

    # -- validate

    @property
    def config(self) -> Any:
        """The configuration of the model, which validate has before the model."""
        return self._models["config"]

    @property
    def evaluations(self) -> list[TaskEvaluation]:
        """The tasks of validate."""
        found: list[TaskEvaluation] = self.trainer.datamodule.evaluations  # type: ignore[attr-defined]
        return found

    @override
    def on_validation_start(self) -> None:
        """The data are read by now: a mistake in them does not wait for a large model to load."""
        sampling = self.trainer.datamodule.sampling  # type: ignore[attr-defined]
        self.validation = start_validation(
            dict(self.hparams), self.tokenizer, self.evaluations, sampling, self.device, self.run_dir, rank_zero_info
        )
        self._models["model"] = self.validation.evaluator.scorer.model

    @override
    @torch.no_grad()
    def validation_step(self, batch: list[Document], batch_idx: int, dataloader_idx: int = 0) -> None:
        self.validation.step(batch, dataloader_idx)

    @override
    def on_validation_epoch_end(self) -> None:
        self.validation.finish()
        for name, value in task_scalars(self.validation.reports).items():
            self.log(name, value, sync_dist=False)


def _keep_BT(batch: dict[str, Tensor]) -> Tensor:
    """bool: which tokens of a batch are no padding."""
    mask_BT = batch.get("attention_mask")
    return torch.ones_like(batch["input_ids"], dtype=torch.bool) if mask_BT is None else mask_BT.bool()
