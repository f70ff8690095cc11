"""The LightningModule: forwards the hooks of Lightning to the walk of a fit, or to the validation of a model."""

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor
from typing_extensions import override

import moeq.strategy  # noqa: F401  registers --trainer.strategy moeq_ddp
from moeq.allocation.plan import uniform_plan
from moeq.checkpoint.free_memory import free_bytes
from moeq.checkpoint.loading import (
    DType,
    load_config,
    load_model,
    load_tokenizer,
    model_bytes,
    stream_model,
    working_bytes,
)
from moeq.checkpoint.placement import Asked, choose_placement, stream_obstacle
from moeq.checkpoint.source_options import source_options
from moeq.disk.identity import model_identity
from moeq.distributed import gather_lists
from moeq.evaluation.task_evaluation import TaskEvaluation
from moeq.evaluation.validation import ReferenceMode, start_validation
from moeq.fit.fingerprint import data_digest, run_fingerprint
from moeq.fit.resume import Resume, refuse_other_run
from moeq.fit.run import Run
from moeq.fit.schedule import Pass, Sequential
from moeq.fit.walk import Walk, WalkSpec
from moeq.forecast import data_shape, preflight_fit, write_forecast
from moeq.forecast_validation import preflight_validation, write_validation_forecast
from moeq.kernels.compute_dtype import ComputeDType
from moeq.models.adapter import Adapter
from moeq.models.shapes import weight_shapes
from moeq.preflight.meter import resident_bytes
from moeq.preflight.phases import Forecast
from moeq.quant.kinds import Kind
from moeq.quant.spec import GridSpec, Routing, SolveSpec, WeightShape, choose_grid
from moeq.report.task_report import task_scalars
from moeq.tasks.documents import Document
from moeq.trainer_options import numeric_switches, refuse_limit, refuse_trainer

if TYPE_CHECKING:
    from moeq.callback import Step


class MoEQuantModule(L.LightningModule):
    """A model under quantization (fit) or evaluation (validate).

    The Hugging Face model is kept out of the module tree: Lightning neither moves it, nor puts it in train mode, nor
    writes it into checkpoints.

    Args:
        name: Hub id or folder of a Mixture-of-Experts causal LM, original or exported by moeq.
        revision: Branch, tag or commit of models at the hub, also of the reference; null is the main branch.
        trust_remote_code: Run code that comes with the model, also with the reference. Read it before.
        dtype: Dtype of the weights, scales and exports; auto is the one of the files.
        compute_dtype: Dtype of the parameters in memory, which hold the same values: "stored" is the dtype above,
            "float32" doubles the memory of 16-bit weights and hidden states; "auto" is float32 on a CPU without
            bfloat16 products, where "stored" takes 5 to 12 times as long, and for float16 on every CPU.
        reference: Hub id or folder of the original, to compare with in validate.
        reference_mode: Where the original waits for the comparison: "memory" beside the model, "disk" runs it first and
            keeps its logits in the run folder; "auto" takes the disk where the two do not fit.
        bits: Bits per weight, 1 to 8.
        group_size: In-features that share a scale; null is one scale per output channel.
        symmetric: Symmetric grids, without zero points.
        grid: "uniform" groups of the three options above; "full_range" for symmetric ones whose scales have a sign, so
            that no level is spare; or a grid of llama.cpp, from which the three follow: q2_k to q6_k (two levels of
            scales, rows in multiples of 256) or iq4_nl; or floats of 4 bits, mxfp4 and nvfp4 (levels by a table).
        clip_search: Search the clipping range of each group (2.4-norm).
        damping: GPTQ: fraction of the mean Hessian diagonal added to the diagonal; the papers have 0.01, and 0.1 holds
            better where the calibration data are few or of other domains.
        act_order: GPTQ: quantize columns by decreasing Hessian diagonal (static groups).
        affinity_power: Weight of a token in an expert's Hessian: affinity ** power. 1 is AGQ, 0 plain GPTQ.
        routing: Tokens of a routed expert's Hessian: "routed" takes those that chose it, with their affinity;
            "all_experts" all tokens, each with weight 1 (affinity_power then acts on shared experts alone).
        sequential: "stage" lets each linear see quantized inputs; "block" is one pass per block (faster).
        hessian_gib: Bound on the Hessians of a pass, in GiB; above it the experts of a block are calibrated in chunks,
            with one sweep of the data for each, and the same codes. "auto" takes what is free.
        hidden_gib: Bound on the hidden states that wait in memory between passes, in GiB; beyond it they wait in the
            run folder.
        placement: Where the weights are: "memory" is all of them on the device; "stream" reads the blocks from the
            model's files one at a time, with the same codes; "auto" is stream where the model does not fit.
        preflight: Stop after saying what the run is going to take: memory, disk and time.
        restart: Start over in a run folder that holds finished blocks or documents.
        label: Name of this run in result tables; null is the name of the model.
    """

    def __init__(
        self,
        name: str = "assets/reference-moe",
        revision: str | None = None,
        trust_remote_code: bool = False,
        dtype: DType = "auto",
        compute_dtype: ComputeDType = "auto",
        reference: str | None = None,
        reference_mode: ReferenceMode = "auto",
        bits: int = 4,
        group_size: int | None = GridSpec.group_size,
        symmetric: bool = False,
        grid: Kind = "uniform",
        clip_search: bool = True,
        damping: float = SolveSpec.damping,
        act_order: bool = True,
        affinity_power: float = 1.0,
        routing: Routing = "routed",
        sequential: Sequential = "stage",
        hessian_gib: float | Literal["auto"] = "auto",
        hidden_gib: float = WalkSpec.hidden_gib,
        placement: Asked = "auto",
        preflight: bool = False,
        restart: bool = False,
        label: str | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False
        self.grid = choose_grid(grid, bits, group_size, symmetric=symmetric, clip_search=clip_search)
        self.solve_spec = SolveSpec(damping, act_order)
        self.walk_spec = WalkSpec(sequential, routing, math.inf if hessian_gib == "auto" else hessian_gib, hidden_gib)
        if affinity_power < 0:
            raise ValueError(f"affinity_power ({affinity_power}) must not be negative; 1 is AGQ, 0 is plain GPTQ")
        self.run = Run()
        self.forecast: Forecast | None = None
        self.walk: Walk
        self._models: dict[str, Any] = {}

    # -- the model

    @override
    def setup(self, stage: str) -> None:
        """Before any work: what the Trainer does to the numbers of a run."""
        refuse_trainer(self.trainer)

    @override
    def configure_model(self) -> None:
        if self._models:
            return
        name = self.hparams["name"]
        if self._trainer is not None and self._trainer.state.fn == "validate":
            # Its models come later: after the data, and one after the other where both do not fit.
            self._models["config"] = load_config(name, **source_options(self.hparams))
        else:
            self._open_model(name)
        self._models["tokenizer"] = load_tokenizer(name, **source_options(self.hparams))

    def _open_model(self, name: str) -> None:
        """Where its weights are going to be is decided before any of them is read."""
        device = self._trainer.strategy.root_device if self._trainer is not None else torch.device("cpu")
        how = self.hparams["dtype"], self.hparams["compute_dtype"], device
        asked = source_options(self.hparams)
        need = model_bytes(name, *how, **asked) + working_bytes(name, self.hparams["dtype"], **asked)
        # The ranks of a machine share its memory; all ranks decide alike, by the least of them.
        host = free_bytes(torch.device("cpu")) // (self._trainer.num_devices if self._trainer is not None else 1)
        free = min(gather_lists([host if device.type == "cpu" else min(host, free_bytes(device))]))
        self.placement = choose_placement(self.hparams["placement"], name, need, free, stream_obstacle(name, **asked))
        if self.placement.kind == "stream":
            rank_zero_info(f"Placement: {self.placement.reason}")
        self.run.meter.device, self.run.meter.process_bytes = device, resident_bytes()
        with self.run.meter.phase("load model", "model"):
            if self.placement.kind == "stream":
                self._models["model"], self._models["residency"] = stream_model(name, *how, **asked)
            else:
                self._models["model"] = load_model(name, *how, **asked)

    @property
    def model(self) -> Any:
        """The model that is quantized or evaluated."""
        return self._models["model"]

    @property
    def config(self) -> Any:
        """Its configuration, which validate has before the model."""
        return self._models["config"]

    @property
    def tokenizer(self) -> Any:
        """Its tokenizer."""
        return self._models["tokenizer"]

    @property
    def adapter(self) -> Adapter:
        """Where its weights are; callbacks may ask from ``on_fit_start`` on."""
        if "adapter" not in self._models:
            self._models["adapter"] = Adapter(self.model, self._models.get("residency"))
        adapter: Adapter = self._models["adapter"]
        return adapter

    def weight_shapes(self) -> list[WeightShape]:
        """Every quantizable weight with its shape, its place and the share of tokens that use it."""
        return weight_shapes(self.adapter)

    @property
    def settings(self) -> Mapping[str, Any]:
        """Its options as given, by name."""
        return {key: value for key, value in self.hparams.items() if not key.startswith("_")}

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
        """Runs after the callbacks' hooks of the same name: the plan exists, and the run knows what it needs."""
        # An evaluation inside fit would measure a half-quantized model; validate is its own command.
        self.trainer.limit_val_batches = 0
        self.run.fallbacks += self.adapter.kept()
        self.adapter.residency.place(self.device)
        if not self.run.plan:
            self.run.plan = uniform_plan(self.weight_shapes(), self.grid)
        self.run.meter.folder = self.run_dir
        known, restart = self._fingerprint(), self.hparams["restart"]
        if not restart:
            refuse_other_run(self.run_dir, known)
        if (shape := data_shape(self.trainer)) is not None:
            refuse_limit(self.trainer.limit_train_batches, shape.num_batches // self.trainer.world_size)
        self.forecast = preflight_fit(self)
        resume = Resume(self.adapter, self.run, self.run_dir, known | self._set_key(), restart=restart)
        self.walk = Walk(self.adapter, self.run, resume, self.walk_spec, rank_zero_info)
        self.trainer.fit_loop.max_epochs = len(self.walk.schedule)
        for step in self._steps():
            step.check(self)
        # Last, as sampled data are new files of the run folder.
        resume.add_data(self._data_fingerprint())
        self._begin()

    def _steps(self) -> "list[Step]":
        from moeq.callback import Step

        callbacks: Any = self.trainer.callbacks  # type: ignore[attr-defined]
        return [step for step in callbacks if isinstance(step, Step)]

    def _begin(self) -> None:
        """The end of all refusals: only now what stands in the run folder changes."""
        trainer: Any = self.trainer
        self.walk.resume.begin()
        if self.forecast is not None:
            write_forecast(self, self.forecast)
        if (report := getattr(trainer.datamodule, "begin", None)) is not None:
            report()
        for step in self._steps():
            step.begin(self)

    @override
    def on_train_start(self) -> None:
        """Runs after the callbacks' hooks of the same name."""
        self.walk.start()

    def _fingerprint(self) -> dict[str, str]:
        """Of the configuration and the model."""
        trainer: Any = self.trainer
        batches = [trainer.limit_train_batches, getattr(trainer.datamodule, "batch_size", None)]
        settings = {**self.settings, "batches": batches, **numeric_switches()}
        if settings["grid"] == "uniform":  # fingerprints of runs without a two-level grid stay what they were
            del settings["grid"]
        identity = model_identity(settings["name"], settings["revision"])
        return run_fingerprint(settings, trainer.callbacks, identity, self.model.dtype)

    def _set_key(self) -> dict[str, str]:
        """Of calibration data that take long to make, before they are."""
        ask = getattr(self.trainer.datamodule, "data_key", None)  # type: ignore[attr-defined]
        key = "" if ask is None else ask()
        return {"calibration set": key} if key else {}

    def _data_fingerprint(self) -> dict[str, str]:
        """Of the calibration data, which may have to be sampled first."""
        trainer: Any = self.trainer
        start = time.perf_counter()
        with self.run.meter.phase("sampling", "calibration data"):
            data = data_digest(trainer.datamodule)
        self.run.seconds["calibration data"] = time.perf_counter() - start
        return {"data": data}

    @property
    def current_pass(self) -> Pass:
        """What the current epoch sweeps."""
        return self.walk.current_pass

    @override
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> STEP_OUTPUT:
        self.walk.step(batch, batch_idx)
        return None

    @override
    def on_train_epoch_end(self) -> None:
        """Runs after the callbacks' hooks: the sites of this pass are quantized."""
        self.log("fit/seconds_per_pass", self.walk.end_pass(), rank_zero_only=True)

    # -- validate

    @property
    def evaluations(self) -> list[TaskEvaluation]:
        """The tasks of validate."""
        found: list[TaskEvaluation] = self.trainer.datamodule.evaluations  # type: ignore[attr-defined]
        return found

    @override
    def on_validation_start(self) -> None:
        """The data are read by now: a mistake in them does not wait for a large model to load."""
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        meter = self.run.meter
        meter.device, meter.folder, meter.process_bytes = self.device, self.run_dir, resident_bytes()
        self.forecast = preflight_validation(self, data.places)
        self.validation = start_validation(
            dict(self.hparams), data.places, self.tokenizer, data.evaluations, data.sampling, self.device, self.run_dir,
            rank_zero_info, meter,
        )  # fmt: skip
        self._models["model"] = self.validation.evaluator.scorer.model
        barrier = self.trainer.strategy.barrier
        barrier("moeq_accepted")  # no rank is refused any more
        if self.trainer.is_global_zero:
            self.validation.begin()
        barrier("moeq_begun")  # no rank writes what another is about to delete
        if self.forecast is not None:
            write_validation_forecast(self, self.forecast)

    @override
    @torch.no_grad()
    def validation_step(self, batch: list[Document], batch_idx: int, dataloader_idx: int = 0) -> None:
        self.validation.step(batch, dataloader_idx)

    @override
    def on_validation_epoch_end(self) -> None:
        self.validation.finish()
        for name, value in task_scalars(self.validation.reports).items():
            self.log(name, value, sync_dist=False)
