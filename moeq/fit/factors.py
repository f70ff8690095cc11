"""Kronecker factors of the curvature at every site: a file for each block, and as a solver takes them.

    H_I = mean of x x^T,   H_O = mean of g g^T      over the tokens of an expert

x what a linear reads, g the gradient of the log-likelihood at what it returns.  Experts with few tokens are pulled
toward the means over all experts of their site, on both sides, as ``moeq.quant.coverage`` does it with the Hessians of
a pass.

Shapes: E experts, O out features of a site, I in features.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from moeq.disk.checked import DamagedFile, read_checked, write_checked
from moeq.disk.digest import digest
from moeq.fit.schedule import SitePart
from moeq.models.adapter import Site
from moeq.quant.coverage import CoverageSpec, hessians_to_solve, pool_of
from moeq.quant.hessian import HessianState
from moeq.quant.spec import Fallback, GridSpec
from moeq.quant.two_sided_solve import TwoSidedSpec

FEW_TOKENS, NO_LEVELS = "few tokens of curvature", "codes of one Hessian"
_FINGERPRINT = "fingerprint"
_REMEDY = "start again, and it is gathered again"


@dataclass(frozen=True)
class SiteFactors:
    """Sums of both sides over the tokens of one site, float64; they add up over batches and over ranks.

    Attributes:
        output: Of g g^T.
        input: Of x x^T.
    """

    output: HessianState
    input: HessianState

    def tensors(self) -> list[Tensor]:
        """All sums, in a fixed order."""
        return [*self.output.tensors(), *self.input.tensors()]


@dataclass
class Factors:
    """The factors of a run.

    Attributes:
        path: Their folder.
        fingerprint: Of the run.
        solve: What codes are found with.
    """

    path: Path
    fingerprint: Mapping[str, str]
    solve: TwoSidedSpec
    _held: tuple[int, dict[str, Tensor]] | None = field(default=None, init=False)

    @property
    def sequences(self) -> Path:
        """Folder of the sequences while they are written, a part at a time."""
        return self.path / f"sequences-{digest(dict(self.fingerprint))}"

    def missing(self, blocks: Sequence[int]) -> list[int]:
        """Those of some blocks that have no file of this run, or a damaged one."""
        return [block for block in blocks if not self._is_there(block)]

    def write(self, block: int, sums: Mapping[str, SiteFactors]) -> None:
        """Write the sums of a block, by the name of the site, in float32."""
        tensors = {}
        for name, factors in sums.items():
            for side, state in (("output", factors.output), ("input", factors.input)):
                tensors[f"{name}|{side}"] = state.sum_EII.float()
                tensors[f"{name}|{side} tokens"] = state.num_tokens_E
                if len(state.num_tokens_E) > 1:
                    tensors[f"{name}|{side} pool"] = pool_of(state).sum_EII.float()
        write_checked(self._file(block), tensors, {_FINGERPRINT: json.dumps(dict(self.fingerprint), sort_keys=True)})

    def of(self, site: Site, experts: Sequence[int], rows: Tensor, coverage: CoverageSpec) -> tuple[Tensor, Tensor]:
        """H_O of some rows of a site's stacked weight and H_I, float32, of some of its experts.

        Args:
            site: Where.
            experts: Which of them.
            rows: int64, which rows.
            coverage: Says how far experts with few tokens are pulled.

        Raises:
            DamagedFile: The file of the block is not what was written.
        """
        output_EOO, input_EII = (self._means(site, side, experts, coverage) for side in ("output", "input"))
        return output_EOO[:, rows][:, :, rows], input_EII

    def fallbacks(
        self, parts: Sequence[SitePart], plan: Mapping[str, GridSpec], coverage: CoverageSpec
    ) -> list[Fallback]:
        """What is not solved on its own factors: experts with few tokens, and weights on grids without even levels."""
        found = []
        for part in parts:
            site, tensors = part.site, self._tensors(part.site.block)
            tokens = tensors[f"{site.name}|output tokens"].tolist()
            for expert in part.experts:
                if tokens[expert] < coverage.min_tokens:
                    told = f"{tokens[expert]:.0f} tokens, fewer than min_tokens ({coverage.min_tokens}); factors shrunk"
                    told += " toward those of all experts" if site.num_experts > 1 else " toward nothing"
                    found.append(Fallback(site.weight_name(expert, site.leaves[0]), FEW_TOKENS, told))
                for leaf in site.leaves:
                    grid = plan.get(name := site.weight_name(expert, leaf))
                    if grid is not None and grid.is_named:
                        found.append(Fallback(name, NO_LEVELS, f"{grid.kind} has no evenly spaced levels"))
        return found

    def clear(self) -> None:
        """Delete everything."""
        self._held = None
        shutil.rmtree(self.path, ignore_errors=True)

    def _means(self, site: Site, side: str, experts: Sequence[int], coverage: CoverageSpec) -> Tensor:
        tensors = self._tensors(site.block)
        tokens_E = tensors[f"{site.name}|{side} tokens"]
        pool = None
        if site.num_experts > 1:
            pool = _state(tensors[f"{site.name}|{side} pool"], tokens_E.sum(0, keepdim=True))
        state = _state(tensors[f"{site.name}|{side}"], tokens_E)
        none_E = torch.zeros(site.num_experts, dtype=torch.bool)
        return hessians_to_solve(state, replace(coverage, policy="shrink"), experts, none_E, pool)

    def _tensors(self, block: int) -> dict[str, Tensor]:
        """Of one block, mapped into memory, and checked once."""
        if self._held is None or self._held[0] != block:
            self._held = block, read_checked(self._file(block), _REMEDY)[1]
        return self._held[1]

    def _is_there(self, block: int) -> bool:
        with suppress(DamagedFile):
            told = json.loads(read_checked(self._file(block), _REMEDY)[0][_FINGERPRINT])
            return bool(told == dict(self.fingerprint))
        return False

    def _file(self, block: int) -> Path:
        return self.path / f"block_{block:03d}.safetensors"


def _state(sum_EII: Tensor, tokens_E: Tensor) -> HessianState:
    """Sums of tokens that weigh 1 each."""
    return HessianState(sum_EII, *[tokens_E] * 5)
