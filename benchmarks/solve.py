"""Time of the GPTQ solve of one expert (gate, up, down) against the loop of the papers' published code.

    python benchmarks/solve.py                            # 1408 x 2048, 1408 x 2048, 2048 x 1408
    python benchmarks/solve.py --quick                    # smaller shapes, same code
    python benchmarks/solve.py --json benchmarks/results/solve.json    # also writes solve.md beside it

The loop solves one linear at a time and one column at a time, with lazy updates of 128 columns and three
factorisations (cholesky, cholesky_inverse, upper cholesky).  Ours solves gate and up stacked.  Both run interleaved in
one process, and the matrix product floor beside them; each time is given as wall time and as processor time, which
other processes on the machine disturb less.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev

import torch
from torch import Tensor

from moeq.quant.gptq import gptq_solve
from moeq.quant.grid import choose_qparams, dequantize
from moeq.quant.solution import Solution, output_energy
from moeq.quant.spec import GridSpec, SolveSpec

GRID = GridSpec(bits=4, group_size=None, symmetric=True, clip_search=False)
SOLVE = SolveSpec(damping=0.01, act_order=False, column_block=128)


def papers_loop(weight_OI: Tensor, hessian_II: Tensor) -> Tensor:
    """The dequantized weight by GPTQ's published loop (also MoEQuant's and AutoGPTQ's), line for line."""
    weight_OI, inverse_II = weight_OI.clone(), hessian_II.clone()
    scale_O1 = choose_qparams(weight_OI.unsqueeze(0), GRID, torch.float32).scale_EOG[0]
    middle, top = 2 ** (GRID.bits - 1), 2**GRID.bits - 1
    columns, width = weight_OI.shape[1], SOLVE.column_block
    losses_OI, rounded_OI = torch.zeros_like(weight_OI), torch.zeros_like(weight_OI)
    diagonal = torch.arange(columns)
    inverse_II[diagonal, diagonal] += SOLVE.damping * torch.mean(torch.diag(inverse_II))
    inverse_II = torch.cholesky_inverse(torch.linalg.cholesky(inverse_II))
    inverse_II = torch.linalg.cholesky(inverse_II, upper=True)
    for start in range(0, columns, width):
        stop = min(start + width, columns)
        block_OB = weight_OI[:, start:stop].clone()
        block_inverse_BB = inverse_II[start:stop, start:stop]
        rounded_OB, error_OB = torch.zeros_like(block_OB), torch.zeros_like(block_OB)
        losses_OB = torch.zeros_like(block_OB)
        for column in range(stop - start):
            weight_O, pivot = block_OB[:, column], block_inverse_BB[column, column]
            code_O1 = torch.clamp(torch.round(weight_O.unsqueeze(1) / scale_O1) + middle, 0, top)
            rounded_O = (scale_O1 * (code_O1 - middle)).flatten()
            rounded_OB[:, column] = rounded_O
            losses_OB[:, column] = (weight_O - rounded_O) ** 2 / pivot**2
            error_O = (weight_O - rounded_O) / pivot
            block_OB[:, column:] -= error_O.unsqueeze(1).matmul(block_inverse_BB[column, column:].unsqueeze(0))
            error_OB[:, column] = error_O
        rounded_OI[:, start:stop] = rounded_OB
        losses_OI[:, start:stop] = losses_OB / 2
        weight_OI[:, stop:] -= error_OB.matmul(inverse_II[start:stop, stop:])
    return rounded_OI


def make_linears(width: int, expert_width: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Stacked gate and up, and down, each [1, O, I] with the Hessian [1, I, I] of correlated, uneven inputs."""
    generator = torch.Generator().manual_seed(seed)
    linears = []
    for out_features, in_features in ((2 * expert_width, width), (width, expert_width)):
        mixing_II = torch.eye(in_features) + 0.05 * torch.randn(in_features, in_features, generator=generator)
        scale_I = 0.1 + torch.rand(in_features, generator=generator)
        inputs_TI = (torch.randn(2 * in_features, in_features, generator=generator) * scale_I) @ mixing_II
        weight_EOI = 0.02 * torch.randn(1, out_features, in_features, generator=generator)
        linears.append((weight_EOI, (inputs_TI.mT @ inputs_TI / len(inputs_TI)).unsqueeze(0)))
    return linears


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Wall and processor seconds of one call."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def loop_of(linears: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """Gate, up and down one after another."""
    (gate_up_EOI, hessian_EII), (down_EOI, down_hessian_EII) = linears
    parts = [papers_loop(part_OI, hessian_EII[0]) for part_OI in gate_up_EOI[0].chunk(2)]
    return [torch.cat(parts), papers_loop(down_EOI[0], down_hessian_EII[0])]


def measure(width: int, expert_width: int, seed: int) -> dict[str, float]:
    """Times of one expert, in seconds, and by how much the output errors of the two solves differ."""
    linears = make_linears(width, expert_width, seed)
    energies = [output_energy(weight[0], hessian[0]).view(1) for weight, hessian in linears]

    def solve(known: bool) -> list[Solution]:
        return [
            gptq_solve(weight, hessian, GRID, SOLVE, torch.float32, energy if known else None)
            for (weight, hessian), energy in zip(linears, energies, strict=True)
        ]

    def floor() -> None:  # O * I^2 operations for the feedback and I^3 / 3 for the factor, in products of 128 rows
        for weight_EOI, hessian_EII in linears:
            weight_IO, total_BO = weight_EOI[0].mT.contiguous(), torch.empty(128, weight_EOI.shape[1])
            for stop in range(128, len(weight_IO), 128):
                torch.mm(hessian_EII[0, stop - 128 : stop, :stop], weight_IO[:stop], out=total_BO)
            third = hessian_EII[0, :, : len(weight_IO) // 6]
            torch.mm(third.mT.contiguous(), hessian_EII[0])

    row: dict[str, float] = {"seed": seed}
    works = {"loop": lambda: loop_of(linears), "ours": lambda: solve(True)}
    works |= {"ours_with_energy": lambda: solve(False), "floor": floor}
    for name, work in works.items():
        row[f"{name}_wall"], row[f"{name}_cpu"] = timed(work)
    differences = []
    for (weight, hessian), theirs_OI, ours in zip(linears, loop_of(linears), solve(True), strict=True):
        ours_OI = dequantize(ours.codes_EOI, ours.scale_EOG, ours.zero_point_EOG, GRID.bits)[0]
        errors = [float(output_energy(weight[0] - rounded_OI, hessian[0])) for rounded_OI in (theirs_OI, ours_OI)]
        differences.append(abs(errors[0] - errors[1]) / errors[0])
    return row | {"error_difference": max(differences)}


def summarise(rows: list[dict[str, float]], shapes: str) -> str:
    """The table of the terminal and of the Markdown file."""

    def spread(values: list[float], form: str) -> str:
        deviation = stdev(values) if len(values) > 1 else 0.0
        return f"{mean(values):{form}} +- {deviation:{form}}"

    lines = [f"Per expert, {shapes}, {len(rows)} seeds, {torch.get_num_threads()} threads; mean +- deviation.", ""]
    lines += ["| | wall s | processor s | loop / this, wall | loop / this, processor |", "|---|---|---|---|---|"]
    labels = {"loop": "papers' loop", "ours": "moeq", "ours_with_energy": "moeq, and tr(W H W^T)", "floor": "floor"}
    for name, label in labels.items():
        cells = [spread([row[f"{name}_{clock}"] for row in rows], ".3f") for clock in ("wall", "cpu")]
        for clock in ("wall", "cpu"):
            cells.append(spread([row[f"loop_{clock}"] / row[f"{name}_{clock}"] for row in rows], ".2f"))
        lines.append("| " + " | ".join([label, *cells]) + " |")
    worst = max(row["error_difference"] for row in rows)
    return "\n".join([*lines, "", f"Largest relative difference of the output errors of loop and moeq: {worst:.1e}."])


def provenance() -> dict[str, str]:
    """Command, commit, hardware and versions."""
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    info = Path("/proc/cpuinfo")
    models = [line for line in info.read_text().splitlines() if "model name" in line] if info.exists() else []
    processor = models[0].split(":")[1].strip() if models else platform.processor()
    return {
        "command": " ".join(["python", *sys.argv]),
        "commit": git.stdout.strip() or "unknown",
        "hardware": f"{processor}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}",
        "torch": torch.__version__,
    }


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="352 x 512 and 512 x 352 instead of 1408 x 2048")
    parser.add_argument("--seeds", type=int, default=5, help="number of weights and Hessians (default 5)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here, and a table to FILE.md")
    args = parser.parse_args()
    if args.seeds < 1:
        parser.error(f"--seeds ({args.seeds}) must be at least 1; the usual value is 5")
    width, expert_width = (512, 352) if args.quick else (2048, 1408)
    measure(width, expert_width, args.seeds)  # the first call loads the linear algebra libraries
    rows = [measure(width, expert_width, seed) for seed in range(args.seeds)]
    shapes = f"gate and up {expert_width} x {width}, down {width} x {expert_width}"
    table = summarise(rows, shapes)
    print(table)
    if args.json:
        facts = provenance()
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({**facts, "shapes": shapes, "rows": rows}, indent=2) + "\n")
        header = "\n".join(f"- {name}: {value}" for name, value in facts.items())
        args.json.with_suffix(".md").write_text(f"# Time of the GPTQ solve\n\n{header}\n\n{table}\n")


if __name__ == "__main__":
    main()
