"""What the steps of a run share: one dataclass, and the files of the run folder.

Callbacks never read each other; they read and write a ``Run``.  Every file is written under a temporary name and
renamed, so that a killed run leaves no half-written file.
"""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from moeq.allocation.evidence import Evidence, Promise
from moeq.quant.hessian import HessianState
from moeq.quant.spec import Fallback, GridSpec, QuantizedWeight


@dataclass
class Run:
    """State of one quantization run.

    Attributes:
        plan: Grid of every weight, by canonical name.
        hessians: Hessian statistics of the current pass, by site name: of the experts of the pass's part of the site.
        pools: Their sums over all experts of the site (E = 1), for sites with several; kept until its last chunk.
        usage: Tokens routed to each expert, int64 [E], by path of the experts module.
        quantized: Quantized weights so far, on the CPU, by canonical name.
        offsets: Where the weights of the current block lie in the cells of their codes; None where no step asked.
        changed: Unquantized parameters that were changed (norms, routers), on the CPU, by their name in the model.
        errors: One row per quantized weight: weight, block, kind, linear, bits, relative_error.
        fallbacks: Everything that was not done as asked.
        seconds: Wall time by step.
        promised: What a survey of the original model will find; None where no step makes one.
        survey_needed: Whether a step of this run decides from it.
        evidence: What it found; None before its end.
    """

    plan: dict[str, GridSpec] = field(default_factory=dict)
    hessians: dict[str, HessianState] = field(default_factory=dict)
    pools: dict[str, HessianState] = field(default_factory=dict)
    usage: dict[str, Tensor] = field(default_factory=dict)
    quantized: dict[str, QuantizedWeight] = field(default_factory=dict)
    offsets: dict[str, Tensor] | None = None
    changed: dict[str, Tensor] = field(default_factory=dict)
    errors: list[dict[str, Any]] = field(default_factory=list)
    fallbacks: list[Fallback] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    promised: Promise | None = None
    survey_needed: bool = False
    evidence: Evidence | None = None
