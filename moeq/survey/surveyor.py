"""Survey of the original model, block by block: from hooks on forward and backward passes to ``Evidence``.

``Surveyor`` is fed by a training loop (the callback ``Survey``) or by ``survey_model``, which needs only a model
and token ids.  Every sum is added up over ranks, and solves are divided over them, so all ranks find the same.  One
block at a time is resident.

Memory of one block: the Hessians of all its sites in float64 (twice where the solver's are weighted by affinity and the
Fisher cost needs plain ones), and for measured costs its rounded weights at every choice.  What the sweeps ahead of the
first pass need again (inputs of blocks, gradients, hidden states of rounded variants) waits in ``WaitingStates``, in
memory up to its bound and then on the disk; so do, until their block comes, the gradients at all blocks' outputs, which
``gemq`` reads.

Shapes: B batch, T tokens of a sequence, N = B T, D width, E experts, K experts of a token, I in features.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import torch
from torch import Tensor, nn

from moeq.allocation.evidence import Evidence
from moeq.allocation.plan import Choice
from moeq.disk.waiting import WaitingStates
from moeq.distributed import gather_lists, rank_and_world
from moeq.fit.activations import ActivationStore
from moeq.models.adapter import Adapter, Site
from moeq.models.blocks import hand_on
from moeq.models.families import survey_refusal
from moeq.models.observe import TokenMask, observe
from moeq.models.residency import Residency
from moeq.quant.hessian import accumulate
from moeq.quant.hessian_groups import accumulate_groups
from moeq.quant.together import taken_together
from moeq.survey.ahead import SweepsAhead
from moeq.survey.cost_tables import Tables, measured_costs, solved_costs
from moeq.survey.damage import RoutedCall, add_damage
from moeq.survey.findings import empty_findings
from moeq.survey.judge import SurveyJudge
from moeq.survey.measured_scale import anchor_factors, anchored
from moeq.survey.sensitivity import round_trip
from moeq.survey.similarity import SimilarityProbe
from moeq.survey.survey_spec import MEASURED, SOLVED, SurveySpec
from moeq.survey.sweeps import Inputs, Show, captured, keep_N, unseen, visit
from moeq.survey.weight_scores import alphaq_table, spectra, weight_scores


class Surveyor:
    """Gathers evidence in one pass over the data per block, in block order, on the original weights.

    First ``sweep_ahead``.  Then for each block, which is resident meanwhile: ``open_block``; for each batch
    ``start_batch`` and one run of the block; ``finish_block``.  After the last block ``evidence``.

    Args:
        adapter: The model.
        spec: What to find out.
        waiting: Where what is needed again waits.
        device: Where the model computes.
        judge: Gets the solved weights, where costs are asked for that solve; nothing is found on its batches.

    Raises:
        ValueError: The family, or none of the choices, suits the survey.
    """

    def __init__(
        self, adapter: Adapter, spec: SurveySpec, waiting: WaitingStates, device: torch.device | str = "cpu",
        judge: SurveyJudge | None = None,
    ) -> None:  # fmt: skip
        self.adapter, self.spec, self.device = adapter, spec, torch.device(device)
        self._candidates = None if judge is None else judge.candidates
        self._apart = frozenset() if judge is None else frozenset(judge.batches)
        self._sites = adapter.all_sites()
        config, stages = getattr(adapter.model, "config", None), {site.stage for site in self._sites}
        if why := survey_refusal(config, stages, of_output=spec.wants(MEASURED)):
            raise ValueError(f"this survey cannot be made of {type(adapter.model).__name__}: {why}")
        for site in self._sites if spec.costs else ():
            spec.choices_of(site)  # raises where none fits
        self._similarity = SimilarityProbe(adapter, spec, self.device)
        self._ahead = SweepsAhead(adapter, spec, waiting, self.device)
        self._tables: Tables = defaultdict(dict)
        self._tokens: dict[str, Tensor] = {}
        self._affinity: dict[str, Tensor] = {}
        self._scores: dict[str, dict[str, float]] = defaultdict(dict)
        self._spectra: dict[str, tuple[float, float]] = {}
        self._stack = ExitStack()

    @property
    def num_ahead(self) -> int:
        """Of this rank's batches, how many of the first ones ``sweep_ahead`` takes."""
        return self._ahead.num_batches

    def sweep_ahead(self, batches: Sequence[Inputs], show: Show = unseen) -> None:
        """Find what costs need of the whole model before its first block is opened: gradients, divergences.

        Args:
            batches: The first ``num_ahead`` of this rank; batch i of rank r is number i * ranks + r of the whole set.
            show: Shows how far the sweeps are.
        """
        self._ahead.sweep(batches, show)

    def open_block(self, block: int) -> None:
        """Attach to a block; hooks stay until ``finish_block`` or ``close``."""
        self._block, self._listening, self._mask = block, False, TokenMask()
        self._mask_BT: Tensor | None = None
        self._routed: RoutedCall | None = None
        sites = tuple(site for site in self._sites if site.block == block)
        self._found = empty_findings(self.spec, sites, self._ahead.gradients.of_sites(sites), self.device)
        if self.spec.wants(SOLVED):
            grouped = self._on_groups if taken_together(self.device) else None
            self._mask = self._stack.enter_context(observe(self.adapter, sites, self._on_rows, on_groups=grouped))
        for path in self._found.tokens:
            experts = self.adapter.model.get_submodule(path)

            def on_experts(_: nn.Module, args: tuple[Tensor, ...], path: str = path) -> None:
                self._on_routing(path, RoutedCall(*args[:3]))

            self._stack.callback(experts.register_forward_pre_hook(on_experts).remove)
        self._similarity.attach(self._stack, block)
        self._rounded = {site.name: self._round(site) for site in sites} if self.spec.wants(MEASURED) else {}
        hook = self.adapter.blocks[block].register_forward_hook(self._on_block, with_kwargs=True)
        self._stack.callback(hook.remove)

    def start_batch(self, batch_idx: int, inputs: dict[str, Tensor]) -> None:
        """Before the block runs on a batch.

        Args:
            batch_idx: Number of the batch on this rank.
            inputs: The batch.
        """
        rank, world = rank_and_world()
        self._batch, self._mask_BT = batch_idx * world + rank, inputs.get("attention_mask")
        self._listening = self._batch not in self._apart
        if not self._listening:
            return
        self._mask.keep = keep_N(inputs)
        self._found.num_tokens += inputs["input_ids"].numel() if self._mask_BT is None else int(self._mask_BT.sum())

    def finish_block(self) -> None:
        """Take the hooks off, add up the ranks, make the block's part of every table."""
        self.close()
        found = self._found
        found.add_up_ranks()
        self._tokens |= {path: counts.cpu() for path, counts in found.tokens.items()}
        self._affinity |= {path: sums.cpu() for path, sums in found.affinity.items()}
        rank, world = rank_and_world()
        parts = [measured_costs(self.spec, found)] if rank == 0 else []
        if self.spec.wants(SOLVED):
            keep = None if self._candidates is None else self._candidates.keep
            parts.append(solved_costs(self.adapter, self.spec, found, found.sites[rank::world], keep))
            if self._candidates is not None:
                self._candidates.share(found.sites, {site: self.spec.choices_of(site) for site in found.sites})
        for part in gather_lists(parts):
            for cost, table in part.items():
                self._tables[cost] |= table
        if "fisher_kl" in self.spec.costs:
            factors = anchor_factors(self.adapter, self.spec, found, self._ahead.divergences)
            self._tables["fisher_kl"] |= anchored(self._tables["fisher"], found.sites, factors)
        for score, values in weight_scores(self.adapter, self.spec, found.sites).items():
            self._scores[score] |= values
        if "alphaq" in self.spec.costs:
            self._spectra |= spectra(self.adapter, found.sites)
        self._similarity.finish(self._block)
        del self._found, self._rounded

    def close(self) -> None:
        """Take the hooks off."""
        self._listening = False
        self._stack.close()

    def evidence(self) -> Evidence:
        """What was found; call it after the last block."""
        names = [name for site in self._sites for name in site.weight_names()]
        if "alphaq" in self.spec.costs:
            self._tables["alphaq"] = alphaq_table(self._spectra, self.spec, self._sites)
        return Evidence(
            tokens=self._tokens,
            affinity=self._affinity,
            similarity_L=self._similarity.measured_L,
            predicted_similarity_L=self._similarity.predicted_L if self.spec.predictor else None,
            scores={score: {name: values[name] for name in names} for score, values in self._scores.items()},
            costs={cost: {name: dict(self._tables[cost][name]) for name in names} for cost in self.spec.costs},
        )

    # -- hooks; they rest while the model runs for another purpose

    def _on_rows(self, site: Site, expert: int, x_NI: Tensor, affinity_N: Tensor | None) -> None:
        if not self._listening:
            return
        solver, plain = self._found.solver[site.name], self._found.plain[site.name]
        accumulate(solver, expert, x_NI, affinity_N, self.spec.affinity_power)
        if plain is not solver:
            accumulate(plain, expert, x_NI, affinity_N, 0.0)

    def _on_groups(self, site: Site, x_NI: Tensor, affinity_N: Tensor, starts: list[int]) -> None:
        if not self._listening:
            return
        solver, plain = self._found.solver[site.name], self._found.plain[site.name]
        accumulate_groups(solver, x_NI, affinity_N, starts, self.spec.affinity_power)
        if plain is not solver:
            accumulate_groups(plain, x_NI, affinity_N, starts, 0.0)

    def _on_routing(self, path: str, call: RoutedCall) -> None:
        if not self._listening:
            return
        self._routed = call
        keep = slice(None) if self._mask.keep is None else self._mask.keep
        ids, weights = call.ids_NK[keep].flatten(), call.weights_NK[keep].flatten().double()
        self._found.tokens[path] += ids.bincount(minlength=len(self._found.tokens[path]))
        self._found.affinity[path].index_add_(0, ids, weights)

    def _on_block(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        # A stub in place of the forward method only writes down what the block is called with.
        if not self._listening or "forward" in vars(block):
            return
        self._listening = False
        self._similarity.after_block(_hidden(output), self._mask_BT)
        if self._found.damage is not None and self._batch < self.spec.num_gradient_batches:
            add_damage(
                self._found.damage, self.adapter, self._found.sites, self._rounded, sorted(self.spec.choices),
                lambda: _hidden(block.forward(*args, **kwargs)), self._routed,
                self._ahead.gradients.at_output(self._batch, self._block), self._mask.keep,
            )  # fmt: skip

    # -- parts

    def _round(self, site: Site) -> dict[Choice, Tensor]:
        weight_EOI = self.adapter.get_weight(site)
        spec, dtype = self.spec, self.adapter.storage_dtype
        return {
            choice: round_trip(weight_EOI, choice.grid(spec.grid), dtype, None, spec.solve)
            .to(dtype)
            .to(weight_EOI.dtype)
            for choice in spec.choices_of(site)
        }


@torch.no_grad()
def survey_model(
    model: nn.Module, batches: Iterable[Tensor], spec: SurveySpec,
    residency: Residency | None = None, waiting: WaitingStates | None = None, judge: SurveyJudge | None = None,
) -> Evidence:  # fmt: skip
    """Evidence about a model from token ids, without a trainer.

    Args:
        model: A Mixture-of-Experts causal LM of transformers; its weights stay as they are.
        batches: int64 ids [B, T] without padding, on any device; ``ids_NT.split(8)`` for example.
        spec: What to find out; backward passes and measured changes use the first batches.
        residency: Where the weights of its blocks are; None is in memory, all of them.
        waiting: Where hidden states wait; None is up to 4 GiB of memory, then a file in the system's temporary folder.
        judge: Gets the solved weights; its batches have no number among these.
    """
    device = model.get_input_embeddings().weight.device  # type: ignore[operator]
    inputs = [{"input_ids": ids_BT.to(device)} for ids_BT in batches]
    adapter, waiting = Adapter(model, residency), waiting or WaitingStates(4 << 30, Path(gettempdir()))
    with waiting:
        surveyor, activations = Surveyor(adapter, spec, waiting, device, judge), ActivationStore(waiting)
        surveyor.sweep_ahead(inputs)
        try:
            for block in range(len(adapter.blocks)):
                with visit(adapter, block, block + 1):
                    surveyor.open_block(block)
                    for batch_idx, batch in enumerate(inputs):
                        surveyor.start_batch(batch_idx, batch)
                        call = activations.enter(batch_idx, block, captured(adapter, batch, block))
                        activations.put(batch_idx, block + 1, *hand_on(adapter.blocks[block], call.hidden, call))
                    surveyor.finish_block()
        finally:
            surveyor.close()
    return surveyor.evidence()


def _hidden(output: Any) -> Tensor:
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden
