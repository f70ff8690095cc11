"""The backward passes of a survey: squared gradients at every linear, and gradients at the outputs of the blocks."""

import hashlib

import torch
from torch import Tensor

from moeq.distributed import sum_over_ranks
from moeq.models.adapter import Adapter, Site
from moeq.survey.fisher import GradientState, add_squares, backward, empty_gradients, observe_gradients, observe_outputs
from moeq.survey.survey_spec import FISHER, SurveySpec


class GradientProbe:
    """Runs backward passes on the first batches, as far as a cost needs them.

    Args:
        adapter: The model, original weights.
        spec: Which costs, on how many batches, and the seed of the sampled tokens.
        sites: Sites of all blocks.
        device: Where the model is.
    """

    def __init__(self, adapter: Adapter, spec: SurveySpec, sites: tuple[Site, ...], device: torch.device) -> None:
        self.adapter, self.spec, self._sites = adapter, spec, sites
        self.states: dict[str, GradientState] = {}
        if spec.wants(FISHER):
            self.states = {site.name: empty_gradients(site, device) for site in sites}
        self._outputs: dict[tuple[int, int], Tensor] = {}

    def run(self, batch: int, inputs: dict[str, Tensor], keep_N: Tensor | None) -> None:
        """Backward passes on one batch; nothing where no cost needs them or enough batches were seen.

        Args:
            batch: Its number in the whole set, of which each rank has a share.
            inputs: The batch.
            keep_N: Which of its tokens are no padding; None is all.
        """
        if batch >= self.spec.num_gradient_batches:
            return
        if self.states:
            generator = torch.Generator().manual_seed(batch_seed(self.spec.seed, batch))
            with observe_gradients(self.adapter, self._sites, add_squares(self.states), keep_N):
                backward(self.adapter.model, inputs, generator)
        if "gemq" in self.spec.costs:

            def store(block: int, gradient_ND: Tensor) -> None:
                self._outputs[batch, block] = gradient_ND.cpu()

            with observe_outputs(self.adapter.blocks, store):
                backward(self.adapter.model, inputs, None)

    def finish(self) -> None:
        """Add up the ranks, once, after the last batch."""
        for state in self.states.values():
            sum_over_ranks([state.sum_EO, state.num_tokens_E])

    def at_output(self, batch: int, block: int, device: torch.device) -> Tensor | None:
        """Gradient [N, D] of the data's log-likelihood at a block's output; it is kept no longer."""
        gradient_ND = self._outputs.pop((batch, block), None)
        return None if gradient_ND is None else gradient_ND.to(device)


def batch_seed(seed: int, batch: int) -> int:
    """Seed of the tokens that are sampled in a batch, a number below 2^63: one for every batch, whichever rank has it.

    The first 8 bytes, big-endian, of the SHA-256 of the ASCII text "<seed>,<batch>", without the highest bit.
    """
    return int.from_bytes(hashlib.sha256(f"{seed},{batch}".encode()).digest()[:8], "big") % 2**63
