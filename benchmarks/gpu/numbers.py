"""Numbers of single operations on the device against the CPU: sums, factors, codes, products with packed weights.

Shapes: E experts, O out features, I in features, N rows.
"""

from collections.abc import Iterator
from importlib.util import find_spec
from itertools import pairwise

import torch
from torch import Tensor

from benchmarks.gpu.steps import Setting
from benchmarks.gpu.ties import compare_codes
from benchmarks.lab.tables import Row
from moeq.checkpoint.gpu_forms import product_on
from moeq.checkpoint.packed_weight import packed_tensors
from moeq.disk.waiting import WaitingStates
from moeq.kernels.packed_products import KERNEL_BITS, PackedMatrix, PackedStack, grouped_product_by_torch
from moeq.quant.factor import factorise, factorise_each
from moeq.quant.gptq import gptq_solve
from moeq.quant.grid import QParams, choose_qparams
from moeq.quant.hessian import accumulate, empty_state, mean_hessian
from moeq.quant.hessian_groups import accumulate_groups
from moeq.quant.rtn import round_to_nearest
from moeq.quant.spec import GridSpec, SolveSpec

STARTS = [0, 700, 700, 1500, 2048]


def numbers(setting: Setting) -> Iterator[Row]:
    """Every operation that has a path of its own on a GPU."""
    size = 64 if setting.quick else 512
    generator = torch.Generator().manual_seed(0)
    x_NI = torch.randn(STARTS[-1], size, generator=generator) * (0.2 + torch.rand(size, generator=generator))
    yield waiting_states(setting, x_NI)
    hessian_EII, row = hessians(setting, x_NI, torch.rand(STARTS[-1], generator=generator))
    yield row
    yield factors(setting, hessian_EII)
    weight_EOI = 0.02 * torch.randn(len(STARTS) - 1, size // 2, size, generator=generator)
    for grid in (GridSpec(3, None, True), GridSpec(4, 32, False), GridSpec(2, 64, True)):
        yield solved(setting, weight_EOI, hessian_EII, grid)
    for bits in KERNEL_BITS:
        yield packed_products(setting, weight_EOI, x_NI, bits)


def waiting_states(setting: Setting, x_NI: Tensor) -> Row:
    """Hidden states that wait come back with their bits."""
    x_NI = x_NI.to(setting.device)
    with WaitingStates(x_NI.nbytes, setting.folder) as waiting:
        for key in ("memory", "disk"):
            waiting.put(key, x_NI)
        right = all(torch.equal(waiting.read(key, setting.device), x_NI) for key in ("memory", "disk"))
    return {"what": "states that wait", "right": right}


def hessians(setting: Setting, x_NI: Tensor, affinity_N: Tensor) -> tuple[Tensor, Row]:
    """Sums of all experts at once on the device against one after another on the CPU."""
    num_experts = len(STARTS) - 1
    expected = empty_state(num_experts, x_NI.shape[1], "cpu")
    for expert in range(num_experts):
        part = slice(STARTS[expert], STARTS[expert + 1])
        accumulate(expected, expert, x_NI[part], affinity_N[part])
    found = empty_state(num_experts, x_NI.shape[1], setting.device)
    accumulate_groups(found, x_NI.to(setting.device), affinity_N.to(setting.device), STARTS, 1.0)
    error = max(_relative(a.cpu(), b) for a, b in zip(found.tensors(), expected.tensors(), strict=True))
    return mean_hessian(expected), {"what": "Hessians of groups", "error": error, "right": error < 1e-5}


def factors(setting: Setting, hessian_EII: Tensor) -> Row:
    """Factors of all experts at once, by what they reproduce."""
    found = factorise_each(hessian_EII.to(setting.device), 0.01, act_order=False)
    error = 0.0
    for factor, hessian_II in zip(found, hessian_EII, strict=True):
        root_II = factor.feedback_II.tril().double().cpu() * factor.gain_I.double().cpu().unsqueeze(1)
        expected_II = hessian_II.double() + factor.shift_I.double().cpu().diag()
        error = max(error, _relative(root_II.mT @ root_II, expected_II))
    return {"what": "factors", "error": error, "right": error < 1e-4}


def solved(setting: Setting, weight_EOI: Tensor, hessian_EII: Tensor, grid: GridSpec) -> Row:
    """Codes on the same Hessians and scales: rows are equal, or their first difference is a tie."""
    device, solve = setting.device, SolveSpec(act_order=False)
    static = grid.group_size is None
    qparams = choose_qparams(weight_EOI, grid, torch.bfloat16)
    here = choose_qparams(weight_EOI.to(device), grid, torch.bfloat16)
    scales = float((here.scale_EOG.cpu() != qparams.scale_EOG).float().mean())
    if not static:  # groups that are chosen on the way have none beforehand: visited in the order of the diagonal
        solve = SolveSpec(act_order=True)
    zero_EOG = qparams.zero_point_EOG
    given = QParams(qparams.scale_EOG.to(device), None if zero_EOG is None else zero_EOG.to(device))
    expected = gptq_solve(weight_EOI, hessian_EII, grid, solve, torch.bfloat16, qparams=qparams)
    found = gptq_solve(
        weight_EOI.to(device), hessian_EII.to(device), grid, solve, torch.bfloat16, qparams=given
    ).on_cpu()
    row = compare_codes(
        weight_EOI, [factorise(h, solve.damping, solve.act_order) for h in hessian_EII], expected, found, grid
    )
    error = _relative(found.relative_error_E, expected.relative_error_E)
    name = f"GPTQ, {grid.bits} bits, {'rows' if static else f'groups of {grid.group_size}'}"
    right = row["rows_otherwise"] == 0 and error < 1e-3
    return {"what": name, **row, "error": error, "scales_otherwise": scales, "right": right}


def packed_products(setting: Setting, weight_EOI: Tensor, x_NI: Tensor, bits: int) -> Row:
    """Products with packed weights against the twin: by the kernel where there is one."""
    grid = GridSpec(bits, 32, symmetric=False, clip_search=False)
    solution = round_to_nearest(weight_EOI, grid, torch.bfloat16)
    matrices = []
    for expert in range(len(weight_EOI)):
        parts = packed_tensors(solution.expert(expert, grid))
        kept = [parts[f"weight_{name}"].clone().to(setting.device) for name in ("packed", "scale", "zero_point")]
        matrices.append(PackedMatrix(*kept))
    stack = PackedStack.of(matrices, bits, weight_EOI.shape[2])
    bounds_E2 = torch.tensor(list(pairwise(STARTS)), dtype=torch.int32, device=setting.device)
    x_NI = x_NI.to(setting.device, torch.bfloat16)
    found, expected = (x_NI.new_zeros(len(x_NI), weight_EOI.shape[1]) for _ in range(2))
    product_on(setting.device)(x_NI, None, bounds_E2, stack, found)
    grouped_product_by_torch(x_NI, None, bounds_E2, stack, expected)
    error = _relative(found, expected)
    by = "kernel" if setting.device.type == "cuda" and find_spec("triton") else "twin"
    return {"what": f"packed product, {bits} bits, by the {by}", "error": error, "right": error < 2**-7}


def _relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-300))
