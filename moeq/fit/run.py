"""State that the steps of a fit share.  Callbacks never read each other; they read and write a ``Run``."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from moeq.allocation.evidence import Evidence, Promise
from moeq.allocation.outer import Judge
from moeq.fit.factors import Factors
from moeq.fit.hessians import Hessians
from moeq.preflight.meter import Meter
from moeq.quant.spec import Fallback, GridSpec, QuantizedWeight
from moeq.quant.two_sided_solve import TwoSidedSpec


@dataclass
class Needs:
    """What the steps of a run ask for before its first pass; each step sets what it needs, none takes anything back.

    Attributes:
        survey: A sweep of every block of the original model before anything is quantized.
        batches_apart: Batches, of all ranks together, that a survey finds nothing on: a search measures plans there.
        evidence: What a survey finds: a step decides from it.
        originals: What the original blocks return on the original hidden states.
        routers: A pass for the router of every block, before its experts.
        offsets: Where the weights of a block lie in the cells of their codes, until its last step.
        factors: How codes are found under Kronecker factors of the curvature; None where nothing gathers them.
    """

    survey: bool = False
    batches_apart: int = 0
    evidence: bool = False
    originals: bool = False
    routers: bool = False
    offsets: bool = False
    factors: TwoSidedSpec | None = None


@dataclass
class Run:
    """State of one quantization run.

    Attributes:
        needs: What the steps ask for.
        promise: What a survey of the original model will find; None where no step makes one.
        evidence: What it found; None before its end.
        judge: Measures plans of the surveyed model, where batches were kept apart for it; None before and after.
        plan: Grid of every weight that is quantized, by canonical name.
        hessians: Hessians of the current pass.
        factors: Kronecker factors of the curvature; None where no step gathers them.
        usage: Tokens routed to each expert, int64 [E], by path of the experts module.
        quantized: Quantized weights of the current block, on the CPU, by canonical name; others are in block files.
        kept: Names of weights of the current block that the plan lacks: they stay as they are.
        offsets: Where the weights of the current block lie in the cells of their codes, by canonical name.
        changed: Unquantized parameters that were changed (norms, routers), on the CPU, by their name in the model.
        reasons: Why parameters are not what the source holds: by name, or by a pattern for many.
        ledger: Tensors of the source's files by what became of them, once exports are written.
        served: The command that serves each export, and what was verified, by format.
        errors: One row per quantized weight: weight, block, kind, linear, bits, relative_error.
        fallbacks: Everything that was not done as asked.
        seconds: Wall time by step.
        meter: Peaks of memory, bytes on disk and time, by phase.
    """

    needs: Needs = field(default_factory=Needs)
    promise: Promise | None = None
    evidence: Evidence | None = None
    judge: Judge | None = None
    plan: dict[str, GridSpec] = field(default_factory=dict)
    hessians: Hessians = field(default_factory=Hessians)
    factors: Factors | None = None
    usage: dict[str, Tensor] = field(default_factory=dict)
    quantized: dict[str, QuantizedWeight] = field(default_factory=dict)
    kept: set[str] = field(default_factory=set)
    offsets: dict[str, Tensor] = field(default_factory=dict)
    changed: dict[str, Tensor] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    ledger: dict[str, int] = field(default_factory=dict)
    served: dict[str, str] = field(default_factory=dict)
    errors: list[dict[str, Any]] = field(default_factory=list)
    fallbacks: list[Fallback] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    meter: Meter = field(default_factory=Meter)
