"""Many quantizations of one model in one process, for studies: fit without export, divergence from the original.

Runs the callbacks of ``main.py fit`` (calibration and GPTQ) on given token ids; the logits and the routing of the
original are computed once and kept.  Weights are those that an export would hold: codes and scales are dequantized in
the model's dtype before the next block is calibrated.

Legend: N windows, L tokens of a window, V vocabulary.
"""

import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from torch import Tensor

from callbacks.bit_allocation import BitAllocation
from callbacks.gptq import GPTQ
from callbacks.hessian_calibration import HessianCalibration
from datamodules.calibration import CalibrationDataModule
from moeq.checkpoint.loading import load_model, load_tokenizer
from moeq.disk.texts import read_documents, token_stream
from moeq.fit.solve import Unit
from moeq.models.adapter import Adapter, Site
from moeq.models.observe import observe
from moeq.module import MoEQuantModule
from moeq.quant.gptq import gptq_solve
from moeq.quant.grid import QParams, choose_qparams
from moeq.quant.hessian import accumulate, empty_state, mean_hessian
from moeq.quant.solution import Solution
from moeq.quant.spec import GridSpec
from moeq.scoring.divergence import kl_sum_and_agreement
from moeq.scoring.perplexity import nll_sum_and_count
from moeq.scoring.routing import count_same_routing, record_routing
from moeq.tasks.windows import consecutive_windows, spread

BATCH = 8


class CachedGridGPTQ(GPTQ):
    """GPTQ that searches the clipping ranges of a weight once per width: they depend on the weight alone."""

    affects_weights = False
    _cache: ClassVar[dict[tuple[str, str, GridSpec, float], QParams]] = {}

    def solve(self, module: MoEQuantModule, unit: Unit, weight_EOI: Tensor, hessian_EII: Tensor) -> Solution:
        scales, zero_points = [], []
        model, dtype = str(module.hparams["name"]), module.model.dtype
        for position, expert in enumerate(unit.experts):
            start, rows = 0, []
            for leaf in unit.leaves:
                stop = start + unit.site.rows[leaf]
                one_EOI = weight_EOI[position : position + 1, start:stop]
                # A rotated model has weights of its own under the same names.
                mark = float(one_EOI.sum(dtype=torch.float64))
                key = model, unit.site.weight_name(expert, unit.site.leaves[leaf]), unit.grid, mark
                if key not in self._cache:
                    self._cache[key] = choose_qparams(one_EOI, unit.grid, dtype)
                rows.append(self._cache[key])
                start = stop
            scales.append(torch.cat([part.scale_EOG for part in rows], 1))
            zero_points.append(torch.cat([part.zero_point_EOG for part in rows if part.zero_point_EOG is not None], 1))
        known = QParams(torch.cat(scales), torch.cat(zero_points))
        return gptq_solve(weight_EOI, hessian_EII, unit.grid, module.solve_spec, dtype, qparams=known)


class GivenIds(CalibrationDataModule):
    """Calibration on ids that exist already."""

    def __init__(self, ids_NL: Tensor) -> None:
        super().__init__(BATCH)
        self._given_NL = ids_NL

    def make_ids(self) -> Tensor:
        return self._given_NL


def fit(ids_NL: Tensor, callbacks: Sequence[pl.Callback] | None = None, **settings: Any) -> MoEQuantModule:
    """Quantize a model that is loaded anew.

    Args:
        ids_NL: Calibration ids.
        callbacks: Steps in their order; None is uniform bits, Hessians, GPTQ.
        settings: Of ``MoEQuantModule``: name, bits, group_size, affinity_power, ...
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    steps = [BitAllocation(), HessianCalibration(), CachedGridGPTQ()] if callbacks is None else list(callbacks)
    module = MoEQuantModule(**{"damping": 0.01, **settings})  # the papers'; studies that differ say so
    with TemporaryDirectory() as folder, warnings.catch_warnings():
        # Few workers, no logger: advice for training runs.
        warnings.simplefilter("ignore")
        trainer = pl.Trainer(
            accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=folder, callbacks=steps,
        )  # fmt: skip
        trainer.fit(module, datamodule=GivenIds(ids_NL))
    return module


@dataclass(frozen=True)
class Divergence:
    """How far a model is from the original on one domain: nats, nats per token of the text, shares."""

    kl: float
    nll: float
    top1_agreement: float
    router_agreement: float


@dataclass(frozen=True)
class Texts:
    """What a yardstick measures on: file of each domain, tokens of a window, windows per domain (evenly spread)."""

    data_dir: str = "assets/reference-moe/texts"
    domains: dict[str, str] = field(
        default_factory=lambda: {
            "prose": "wikitext2_test.txt", "python": "python_heldout.jsonl",
            "gsm8k": "gsm8k_test.jsonl", "arithmetic": "arithmetic.txt",
        }
    )  # fmt: skip
    window_length: int = 256
    num_windows: int | None = 32


class Yardstick:
    """Evaluation windows of the domains with the original's logits.

    Args:
        name: The original model.
        texts: Domains and windows; None is those of ``configs/eval.yaml`` on the bundled model.
    """

    def __init__(self, name: str, texts: Texts | None = None) -> None:
        self.texts = texts or Texts()
        self.model, self.tokenizer = load_model(name, "auto"), load_tokenizer(name)
        self.streams = {
            domain: token_stream(read_documents(Path(self.texts.data_dir) / file), self.tokenizer)
            for domain, file in self.texts.domains.items()
        }
        self._original = {domain: list(map(self._run_original, self._batches(domain))) for domain in self.streams}

    def windows(self, domain: str) -> Tensor:
        """The evaluation windows of a domain, [N, L]."""
        every_NL = consecutive_windows(self.streams[domain], self.texts.window_length)
        return every_NL[spread(len(every_NL), self.texts.num_windows)]

    def unused_windows(self, domain: str) -> Tensor:
        """The windows of a domain that are not evaluated, [N, L]: what an oracle may calibrate on."""
        every_NL = consecutive_windows(self.streams[domain], self.texts.window_length)
        num = self.texts.num_windows or len(every_NL)
        unused_N = torch.ones(len(every_NL), dtype=torch.bool)
        unused_N[torch.arange(num) * len(every_NL) // num] = False
        return every_NL[unused_N]

    @torch.no_grad()
    def measure(self, model: Any) -> dict[str, Divergence]:
        """Divergence of a model by domain."""
        return {domain: self._measure(model, domain) for domain in self.streams}

    @torch.no_grad()
    def expert_errors(self, model: Any) -> Tensor:
        """Relative output error of the linears of every routed expert on the tokens the evaluation sends it, [X].

        tr(D H D^T) / tr(W H W^T), W of the original, D what quantization changed, H of the original's inputs; for each
        block the experts' gate and up together, then their down projections.
        """
        original, changed = Adapter(self.model), Adapter(model)
        errors = []
        for site, hessian_EII in self._expert_hessians().items():
            weight_EOI = original.get_weight(site).float()
            delta_EOI = changed.get_weight(site).float() - weight_EOI
            damage_E, energy_E = (
                torch.einsum("eoi,eij,eoj->e", stack, hessian_EII, stack) for stack in (delta_EOI, weight_EOI)
            )
            errors.append(damage_E / energy_E)
        return torch.cat(errors)

    @cache  # noqa: B019  one yardstick per process
    def _expert_hessians(self) -> dict[Site, Tensor]:
        adapter = Adapter(self.model)
        sites = [site for site in adapter.all_sites() if site.kind == "routed"]
        states = {site.name: empty_state(site.num_experts, site.in_features, torch.device("cpu")) for site in sites}

        def on_rows(site: Site, expert: int, x_TI: Tensor, _: Tensor | None) -> None:
            accumulate(states[site.name], expert, x_TI, None, 0.0)

        with torch.no_grad():
            # Inputs of gate and up come from a hook, those of down from an implementation of its own.
            for stage in ("mlp_in", "mlp_down"):
                group = tuple(site for site in sites if site.stage == stage)
                with observe(adapter, group, on_rows):
                    for domain in self.streams:
                        for ids_BL in self._batches(domain):
                            self.model(input_ids=ids_BL, use_cache=False)
        return {site: mean_hessian(states[site.name]) for site in sites}

    def _batches(self, domain: str) -> list[Tensor]:
        return list(self.windows(domain).split(BATCH))

    @torch.no_grad()
    def _run_original(self, ids_BL: Tensor) -> tuple[Tensor, Any]:
        with record_routing(self.model) as routing:
            return self.model(input_ids=ids_BL, use_cache=False).logits, routing

    def _measure(self, model: Any, domain: str) -> Divergence:
        kl = nll = 0.0
        same = positions = scored = routed_same = routed = 0
        for ids_BL, (original_BLV, original_routing) in zip(self._batches(domain), self._original[domain], strict=True):
            with record_routing(model) as routing:
                logits_BLV = model(input_ids=ids_BL, use_cache=False).logits
            kl_sum, num_same, num_positions = kl_sum_and_agreement(original_BLV, logits_BLV)
            nll_sum, num_scored = nll_sum_and_count(logits_BLV, ids_BL)
            kept, total = count_same_routing(routing, original_routing)
            kl, nll, same = kl + float(kl_sum), nll + float(nll_sum), same + int(num_same)
            positions, scored = positions + int(num_positions), scored + int(num_scored)
            routed_same, routed = routed_same + int(kept), routed + int(total)
        return Divergence(kl / positions, nll / scored, same / positions, routed_same / routed)
