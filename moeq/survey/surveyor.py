"""Survey of the original model, block by block: from hooks on forward and backward passes to ``Evidence``.

``Surveyor`` is fed by a training loop (the callback ``Survey``) or by ``survey_model``, which needs only a model
and token ids.  Every sum is added up over ranks, and solves are divided over them, so all ranks find the same.

Memory of one block: the Hessians of all its sites in float64 (twice where the solver's are weighted by affinity and the
Fisher cost needs plain ones), and for measured costs its rounded weights at every choice.  For ``gemq`` the gradients
at all blocks' outputs wait on the CPU: ``num_gradient_batches`` bounds them.

Shapes: B batch, T tokens of a sequence, N = B T, D width, E experts, K experts of a token, I in features.
"""

from collections import defaultdict
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from moeq.allocation.evidence import Evidence
from moeq.allocation.plan import Choice
from moeq.distributed import gather_lists, rank_and_world, sum_over_ranks
from moeq.fit.activations import ActivationStore
from moeq.models.adapter import Adapter, Site
from moeq.models.blocks import capture_calls, run_block
from moeq.models.families import survey_refusal
from moeq.models.observe import TokenMask, observe
from moeq.quant.hessian import HessianState, accumulate, empty_state
from moeq.survey.cost_tables import BlockFindings, Tables, measured_costs, solved_costs
from moeq.survey.damage import RoutedCall, add_damage, empty_damage
from moeq.survey.gradient_probe import GradientProbe
from moeq.survey.measured_scale import anchor_factors, anchored
from moeq.survey.sensitivity import round_trip
from moeq.survey.similarity import SimilarityProbe
from moeq.survey.survey_spec import FISHER, MEASURED, SOLVED, SurveySpec
from moeq.survey.weight_scores import alphaq_table, weight_scores


class Surveyor:
    """Gathers evidence in one pass over the data per block, in block order, on the original weights.

    For each block: ``open_block``; for each batch ``start_batch`` and then one run of the block; ``finish_block``.
    After the last block ``evidence``.

    Args:
        adapter: The model.
        spec: What to find out.
        device: Where the model is.

    Raises:
        ValueError: The family, or none of the choices, suits the survey.
    """

    def __init__(self, adapter: Adapter, spec: SurveySpec, device: torch.device | str = "cpu") -> None:
        self.adapter, self.spec, self.device = adapter, spec, torch.device(device)
        self._sites = adapter.all_sites()
        config, stages = getattr(adapter.model, "config", None), {site.stage for site in self._sites}
        if why := survey_refusal(config, stages, of_output=spec.wants(MEASURED)):
            raise ValueError(f"this survey cannot be made of {type(adapter.model).__name__}: {why}")
        for site in self._sites if spec.costs else ():
            spec.choices_of(site)  # raises where none fits
        self._similarity = SimilarityProbe(adapter, spec)
        self._gradients = GradientProbe(adapter, spec, self._sites, self.device)
        self._tables: Tables = defaultdict(dict)
        self._tokens: dict[str, Tensor] = {}
        self._affinity: dict[str, Tensor] = {}
        self._kl_batches: list[dict[str, Tensor]] = []
        self._stack = ExitStack()

    def open_block(self, block: int) -> None:
        """Attach to a block; hooks stay until ``finish_block`` or ``close``."""
        self._block, self._listening, self._mask = block, False, TokenMask()
        self._mask_BT: Tensor | None = None
        self._routed: RoutedCall | None = None
        sites = tuple(site for site in self._sites if site.block == block)
        self._found = self._empty(sites)
        if self.spec.wants(SOLVED):
            self._mask = self._stack.enter_context(observe(self.adapter, sites, self._on_rows))
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
        """Before the block runs on a batch; in the first block this is where backward passes are made.

        Args:
            batch_idx: Number of the batch on this rank; batch i of rank r is number i * ranks + r of the whole set.
            inputs: The batch.
        """
        rank, world = rank_and_world()
        self._batch, self._mask_BT = batch_idx * world + rank, inputs.get("attention_mask")
        self._mask.keep = None if self._mask_BT is None else self._mask_BT.flatten().bool()
        self._found.num_tokens += inputs["input_ids"].numel() if self._mask_BT is None else int(self._mask_BT.sum())
        if self._block == 0:
            self._gradients.run(self._batch, inputs, self._mask.keep)
            if "fisher_kl" in self.spec.costs and self._batch < self.spec.num_kl_batches:
                self._kl_batches.append(inputs)
        self._listening = True

    def finish_block(self) -> None:
        """Take the hooks off, add up the ranks, make the block's part of every table."""
        self.close()
        found = self._found
        if self._block == 0:
            self._gradients.finish()
        self._sum_over_ranks(found)
        self._tokens |= {path: counts.cpu() for path, counts in found.tokens.items()}
        self._affinity |= {path: sums.cpu() for path, sums in found.affinity.items()}
        rank, world = rank_and_world()
        parts = [measured_costs(self.spec, found)] if rank == 0 else []
        if self.spec.wants(SOLVED):
            parts.append(solved_costs(self.adapter, self.spec, found, found.sites[rank::world]))
        for part in gather_lists(parts):
            for cost, table in part.items():
                self._tables[cost] |= table
        if "fisher_kl" in self.spec.costs:
            factors = anchor_factors(self.adapter, self.spec, found, self._kl_batches)
            self._tables["fisher_kl"] |= anchored(self._tables["fisher"], found.sites, factors)
        self._similarity.finish(self._block)
        del self._found, self._rounded

    def close(self) -> None:
        """Take the hooks off."""
        self._listening = False
        self._stack.close()

    def evidence(self) -> Evidence:
        """What was found; call it after the last block, before any weight is changed."""
        names = [name for site in self._sites for name in site.weight_names()]
        if "alphaq" in self.spec.costs:
            self._tables["alphaq"] = alphaq_table(self.adapter, self.spec, self._sites)
        scores = weight_scores(self.adapter, self.spec, self._sites)
        return Evidence(
            tokens=self._tokens,
            affinity=self._affinity,
            similarity_L=self._similarity.measured_L,
            predicted_similarity_L=self._similarity.predicted_L if self.spec.predictor else None,
            scores={score: {name: values[name] for name in names} for score, values in scores.items()},
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
                self._gradients.at_output(self._batch, self._block, self.device), self._mask.keep,
            )  # fmt: skip

    # -- parts

    def _empty(self, sites: tuple[Site, ...]) -> BlockFindings:
        experts = {site.modules[0]: site.num_experts for site in sites if site.kind == "routed"}
        solver: dict[str, HessianState] = {}
        plain: dict[str, HessianState] = {}
        for site in sites if self.spec.wants(SOLVED) else ():
            solver[site.name] = plain[site.name] = empty_state(site.num_experts, site.in_features, self.device)
            weighted = self.spec.affinity_power and site.kind in ("routed", "shared")
            if weighted and self.spec.wants(FISHER):
                plain[site.name] = empty_state(site.num_experts, site.in_features, self.device)
        measured = self.spec.wants(MEASURED)
        return BlockFindings(
            sites=sites, solver=solver, plain=plain, gradients=self._gradients.states,
            damage=empty_damage(sites, len(self.spec.choices), self.device) if measured else None,
            tokens={path: torch.zeros(n, dtype=torch.int64, device=self.device) for path, n in experts.items()},
            affinity={path: torch.zeros(n, dtype=torch.float64, device=self.device) for path, n in experts.items()},
            num_tokens=0.0,
        )  # fmt: skip

    def _round(self, site: Site) -> dict[Choice, Tensor]:
        weight_EOI = self.adapter.get_weight(site)
        spec, dtype = self.spec, self.adapter.storage_dtype
        return {
            choice: round_trip(weight_EOI, choice.grid(spec.grid), dtype, None, spec.solve)
            .to(dtype)
            .to(weight_EOI.dtype)
            for choice in spec.choices_of(site)
        }

    def _sum_over_ranks(self, found: BlockFindings) -> None:
        tensors = [*found.tokens.values(), *found.affinity.values()]
        for site in found.sites if found.solver else ():
            states = [found.solver[site.name]]
            if found.plain[site.name] is not states[0]:
                states.append(found.plain[site.name])
            tensors += [part for state in states for part in state.tensors()]
        if found.damage is not None:
            tensors += found.damage.tensors()
        num_tokens = torch.tensor(found.num_tokens, dtype=torch.float64, device=self.device)
        sum_over_ranks([*tensors, num_tokens])
        found.num_tokens = float(num_tokens)


@torch.no_grad()
def survey_model(model: nn.Module, batches: Iterable[Tensor], spec: SurveySpec) -> Evidence:
    """Evidence about a model from token ids, without a trainer.

    Args:
        model: A Mixture-of-Experts causal LM of transformers; its weights stay as they are.
        batches: int64 ids [B, T] without padding, on any device; ``ids_NT.split(8)`` for example.
        spec: What to find out; backward passes and measured changes use the first batches.
    """
    device = next(model.parameters()).device
    inputs = [{"input_ids": ids_BT.to(device)} for ids_BT in batches]
    adapter = Adapter(model)
    surveyor, activations = Surveyor(adapter, spec, device), ActivationStore()
    try:
        for block in range(len(adapter.blocks)):
            surveyor.open_block(block)
            for batch_idx, batch in enumerate(inputs):
                surveyor.start_batch(batch_idx, batch)
                calls = capture_calls(model, adapter.blocks, batch)
                hidden = activations.advance(batch_idx, block, calls, adapter.blocks)
                run_block(adapter.blocks[block], hidden, calls[block])
            surveyor.finish_block()
    finally:
        surveyor.close()
    return surveyor.evidence()


def _hidden(output: Any) -> Tensor:
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden
