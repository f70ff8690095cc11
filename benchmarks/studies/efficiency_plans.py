"""Plans, uniform, ruled and allocated: quality is measured on the bundled model, time on one of real shapes.

The second model has the shapes of DeepSeek-MoE-16B (64 experts of 1408 x 2048, six for a token, shared experts of 2816)
in the layout of Qwen2-MoE.  A weight of it has the grid of the weight of that name in the bundled one, whose blocks are
evenly spread over it; experts repeat.  Shares of attention, shared and routed weights differ between the two, so a plan
has a size on each.
"""

import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import gettempdir
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import Qwen2MoeConfig

from benchmarks.lab.sets import SAMPLED, sampled_set
from benchmarks.lab.study import MODEL
from benchmarks.lab.yardstick import Yardstick
from benchmarks.studies.sharing import shared
from moeq.allocation.constraints import Budget, Constraints
from moeq.allocation.evidence import Evidence
from moeq.allocation.plan import Choice, plan_cost
from moeq.allocation.problem import AllocationProgram, TimeLimit, build_problem
from moeq.allocation.runtime import RUNTIMES
from moeq.allocation.solver import solve
from moeq.allocation.time_table import TimeTable, plan_milliseconds
from moeq.allocation.two_limits import fastest, time_of
from moeq.checkpoint.loading import load_model
from moeq.checkpoint.model_class import model_class
from moeq.disk.waiting import WaitingStates
from moeq.models.adapter import Adapter
from moeq.models.shapes import weight_shapes
from moeq.quant.kinds import SUPER_BLOCK, Kind
from moeq.quant.spec import GridSpec, SolveSpec, WeightShape
from moeq.survey.candidates import Candidates
from moeq.survey.judge import open_judge
from moeq.survey.survey_spec import SurveySpec
from moeq.survey.surveyor import survey_model

Plan = dict[str, GridSpec]
GROUP = 64
# Without zero points, so that llama.cpp's files hold every grid.
GRID = GridSpec(bits=2, group_size=GROUP, symmetric=True, kind="full_range")
CHOICES = tuple(Choice(bits, GROUP) for bits in (2, 3, 4, 8))
DENSE, RULE = "bfloat16", "attention, shared and busy experts at 4"
UNIFORM = {f"{bits} bits": bits for bits in (8, 4, 3, 2)}
ALLOCATED: dict[str, Callable[[WeightShape], Hashable]] = {
    "allocated per block": lambda weight: (weight.block, weight.kind),
    "allocated per projection": RUNTIMES["mlx"].key,
    "allocated per expert": RUNTIMES["gptqmodel"].key,
    "allocated per weight": RUNTIMES["research"].key,
}
TIMED, BY_TIME = "per weight, limit of time", "per weight, milliseconds alone"
PLANS = (DENSE, *UNIFORM, RULE, *ALLOCATED, TIMED, BY_TIME)
K_QUANTS: dict[str, Kind] = {"Q2_K and Q4_0": "q2_k", "Q3_K and Q4_0": "q3_k"}
# Of the way from the allocated plan's time to that of the fastest plan of its size; of the time of 4 bits.
SHARE_OF_SAVING, TIMES_FOUR_BITS = 0.5, 1.1
SHAPES = {
    "hidden_size": 2048, "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 2816, "num_experts": 64,
    "num_experts_per_tok": 6, "num_hidden_layers": 4, "num_attention_heads": 16, "num_key_value_heads": 16,
    "vocab_size": 4096, "norm_topk_prob": False, "tie_word_embeddings": False, "decoder_sparse_step": 1,
}  # fmt: skip
NUM_BLOCKS, NUM_EXPERTS = 4, 16  # of the bundled model
_BLOCK = re.compile(r"(?<=^model\.layers\.)\d+")
_EXPERT = re.compile(r"(?<=\.experts\.)\d+")


@dataclass(frozen=True)
class Surveyed:
    """The bundled model's weights with what a survey found, and every solved candidate."""

    weights: Sequence[WeightShape]
    evidence: Evidence
    candidates: Candidates


def config_of(**changes: int) -> Qwen2MoeConfig:
    """The model of real shapes."""
    return Qwen2MoeConfig(**SHAPES | changes)


def shapes_of(config: Qwen2MoeConfig) -> list[WeightShape]:
    """Its quantizable weights."""
    with torch.device("meta"):
        model = model_class(config).from_config(config, dtype=torch.bfloat16)
    return weight_shapes(Adapter(model))


def carried(plan: Plan, weights: Sequence[WeightShape]) -> Plan:
    """A plan of the bundled model on the weights of another, whose blocks are evenly spread over those of that one."""
    every = NUM_BLOCKS // (1 + max(weight.block for weight in weights))
    return {weight.name: plan[name] for weight in weights if (name := counterpart(weight.name, every)) in plan}


def k_quants(kind: Kind, weights: Sequence[WeightShape]) -> Plan:
    """A K-quant where rows are whole super-blocks, elsewhere 4 bits, as llama.cpp's own quantizer does it."""
    own, four = GridSpec.of_kind(kind), replace(GRID, bits=4)
    return {weight.name: four if weight.in_features % SUPER_BLOCK else own for weight in weights}


def counterpart(name: str, every: int = 1) -> str:
    """The weight of the bundled model whose grid a weight has: block b has that of block ``every`` b."""
    name = _BLOCK.sub(lambda found: str(int(found[0]) * every), name)
    return _EXPERT.sub(lambda found: str(int(found[0]) % NUM_EXPERTS), name)


def assembled_row(yardstick: Yardstick, candidates: Candidates, plan: Plan) -> dict[str, dict[str, float]]:
    """Divergence by domain of the bundled model with the candidates of a plan."""
    with ExitStack() as inside:
        for block in range(len(candidates.adapter.blocks)):
            inside.enter_context(candidates.in_place(block, plan))
        return yardstick.row(candidates.adapter.model)


def survey(yardstick: Yardstick, seed: int, num_windows: int, folder: Path, solver: Literal["gptq", "rtn"]) -> Surveyed:
    """One survey of the bundled model, whose candidates are the solver's solutions on the original's inputs.

    Rounding to nearest is for a look, without the search of ranges, which is most of its time.
    """
    model = load_model(MODEL, "auto", "auto")
    spec = SurveySpec(
        costs=("fisher",), grid=replace(GRID, clip_search=solver == "gptq"), seed=seed, solver=solver,
        solve=SolveSpec(damping=0.1), choices=CHOICES, num_gradient_batches=4,
    )  # fmt: skip
    ids_NL = sampled_set(yardstick, SAMPLED["corpus"], "corpus", seed, folder, num_windows)
    judge = open_judge(Adapter(model), spec, {}, WaitingStates(1 << 30, Path(gettempdir())))
    found = survey_model(model, ids_NL.split(8), spec, judge=judge)
    return Surveyed(weight_shapes(Adapter(model)), found, judge.candidates)


def make_plan(name: str, surveyed: Surveyed, size: float, times: TimeTable, large: Sequence[WeightShape]) -> Plan:
    """A plan of the bundled model by name.

    Args:
        name: One of ``PLANS``.
        surveyed: Of the bundled model.
        size: Of mixed plans: bits per weight with scales.
        times: Of products with the weights of the large model.
        large: These weights.
    """
    weights = surveyed.weights
    if name == DENSE:
        return {}
    if name in UNIFORM:
        return {weight.name: replace(GRID, bits=UNIFORM[name]) for weight in weights}
    if name == RULE:
        return busy_experts(weights, surveyed.evidence, size)
    constraints = Constraints(CHOICES, Budget(size, "average_bits"), GRID)
    program = build_problem(weights, surveyed.evidence.costs["fisher"], constraints)
    if name in ALLOCATED:
        return chosen(shared(program, ALLOCATED[name]))
    nanoseconds_UC = times_of(program, times, large)
    if name == TIMED:
        plain = solve(program).choice_U
        limit = TimeLimit(nanoseconds_UC, 0, 0)
        slow, fast = time_of(limit, plain), fastest(replace(program, limit=limit))[1]
        return chosen(replace(program, limit=replace(limit, capacity=round(slow - SHARE_OF_SAVING * (slow - fast)))))
    four = 1e6 * plan_milliseconds({weight.name: replace(GRID, bits=4) for weight in large}, large, times)
    return chosen(replace(program, size_UC=nanoseconds_UC, capacity=round(TIMES_FOUR_BITS * four)))


def chosen(program: AllocationProgram) -> Plan:
    """The plan that solves a program."""
    return {
        weight.name: program.choices[choice].grid(GRID)
        for unit, choice in zip(program.units, solve(program).choice_U.tolist(), strict=True)
        for weight in unit
    }


def busy_experts(weights: Sequence[WeightShape], evidence: Evidence, size: float) -> Plan:
    """QuantMoE-Bench's combination: attention, shared experts and the most used experts at 4 bits, the others at 2."""
    plan = {weight.name: replace(GRID, bits=4 if weight.kind != "routed" else 2) for weight in weights}
    tokens = {(path, e): float(n) for path, counts in evidence.tokens.items() for e, n in enumerate(counts.tolist())}
    for path, expert in sorted(tokens, key=tokens.__getitem__, reverse=True):
        names = (w.name for w in weights if w.name.startswith(f"{path}.{expert}."))
        wider = plan | {name: replace(GRID, bits=4) for name in names}
        if plan_cost(wider, weights).average_bits > size * (1 + 1e-9):
            break
        plan = wider
    return plan


def times_of(program: AllocationProgram, times: TimeTable, large: Sequence[WeightShape]) -> NDArray[np.int64]:
    """Nanoseconds of a token of the large model by unit (a weight of the bundled one) and choice, int64."""
    row = {weight.name: index for index, (weight,) in enumerate(program.units)}
    nanoseconds_UC = np.zeros(program.size_UC.shape)
    for weight in large:
        for column, choice in enumerate(program.choices):
            taken = 1e9 * weight.active_share * times.of(weight, choice.grid(GRID))
            nanoseconds_UC[row[counterpart(weight.name)], column] += taken
    return nanoseconds_UC.round().astype(np.int64)


def labels(plan: Mapping[str, GridSpec]) -> dict[str, int]:
    """Bits by name, for a row."""
    return {name: grid.bits for name, grid in plan.items()}


def from_labels(bits: Mapping[str, int]) -> Plan:
    """The inverse."""
    return {name: replace(GRID, bits=each) for name, each in bits.items()}
