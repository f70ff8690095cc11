"""Time of Hessian accumulation and GPTQ solve for one block of a large MoE, against the loop of the papers' code.

    python benchmarks/solve.py                                 # Qwen1.5-MoE, DeepSeek-MoE-16B, Qwen3-30B-A3B
    python benchmarks/solve.py --quick                         # one small shape, same code
    python benchmarks/solve.py --device cuda --experts 64      # and Mixtral
    python benchmarks/solve.py --peer llm-compressor=ENV/bin/python --peer gptqmodel=ENV2/bin/python
    python benchmarks/solve.py --json benchmarks/results/solve.json    # also writes solve.md beside it

Both run interleaved in one process on the same tensors, and beside them the floor: the operations that the phase cannot
do without, as matrix products (T I^2 for a symmetric Hessian; O I^2 of feedback and I^3 / 3 of a factor).  Figures are
per expert, of ``--experts`` measured ones; a block is that times its number of experts, which is stated as an
extrapolation.  Wall time and processor time, which other processes on the machine disturb less.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from papers_loop import papers_hessian, papers_solve

from moeq.quant.gptq import gptq_solve
from moeq.quant.grid import dequantize
from moeq.quant.hessian import HessianState, accumulate, empty_state, mean_hessian
from moeq.quant.solution import Solution, output_energy
from moeq.quant.spec import GridSpec, SolveSpec

GRID = GridSpec(bits=4, group_size=None, symmetric=True, clip_search=False)
SOLVE = SolveSpec(damping=0.01, act_order=False, column_block=128)
# Experts of a block, hidden size, expert width.
MODELS = {
    "Qwen1.5-MoE": (60, 2048, 1408),
    "DeepSeek-MoE-16B": (64, 2048, 1408),
    "Qwen3-30B-A3B": (128, 2048, 768),
    "Mixtral-8x7B": (8, 4096, 14336),
}
ON_A_GPU = ("Mixtral-8x7B",)
QUICK = {"quick": (8, 512, 352)}


class Linear:
    """Stacked gate and up, or down: weights [E, O, I] and correlated, uneven inputs in batches [E, T, I]."""

    def __init__(
        self, shape: tuple[int, int, int], batches: int, tokens: int, parts: int, seed: int, device: str
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        experts, _, in_features = shape
        mixing_II = torch.eye(in_features) + 0.05 * torch.randn(in_features, in_features, generator=generator)
        scale_I = 0.1 + torch.rand(in_features, generator=generator)
        sizes = (experts, tokens, in_features)
        noise = [torch.randn(sizes, generator=generator) for _ in range(batches)]
        self.batches_ETI = [((x_ETI * scale_I) @ mixing_II).bfloat16().to(device) for x_ETI in noise]
        self.weight_EOI = (0.02 * torch.randn(shape, generator=generator)).to(device)
        self.parts = parts

    def our_hessian(self) -> Tensor:
        """Sums over batches and their mean, as in a calibration pass."""
        experts, _, in_features = self.weight_EOI.shape
        state: HessianState = empty_state(experts, in_features, self.weight_EOI.device)
        for x_ETI in self.batches_ETI:
            for expert, x_TI in enumerate(x_ETI):
                accumulate(state, expert, x_TI)
        return mean_hessian(state)

    def loop_hessian(self) -> None:
        """One Hessian for each linear of each expert."""
        for expert in range(len(self.weight_EOI)):
            for _ in range(self.parts):
                papers_hessian([x_ETI[expert] for x_ETI in self.batches_ETI])

    def our_solve(self, hessian_EII: Tensor) -> Solution:
        """Everything a run does: solve, scales, codes, relative error."""
        return gptq_solve(self.weight_EOI, hessian_EII, GRID, SOLVE, torch.float32)

    def loop_solve(self, hessian_EII: Tensor) -> Tensor:
        """Dequantized weights [E, O, I], one linear after another."""
        return torch.stack(
            [
                torch.cat([papers_solve(part, hessian_II, GRID, SOLVE) for part in weight_OI.chunk(self.parts)])
                for weight_OI, hessian_II in zip(self.weight_EOI, hessian_EII, strict=True)
            ]
        )

    def hessian_floor(self) -> None:
        """Half of x^T x per batch and expert."""
        for x_ETI in self.batches_ETI:
            for x_TI in x_ETI:
                rows_TI = x_TI.float()
                torch.mm(rows_TI[:, : rows_TI.shape[1] // 2].mT, rows_TI)

    def solve_floor(self, hessian_EII: Tensor) -> None:
        """The feedback in products of 128 rows, and a product of as many operations as the factor."""
        for weight_OI, hessian_II in zip(self.weight_EOI, hessian_EII, strict=True):
            weight_IO = weight_OI.mT.contiguous()
            for stop in range(128, len(weight_IO), 128):
                torch.mm(hessian_II[stop - 128 : stop, :stop], weight_IO[:stop])
            torch.mm(hessian_II[:, : len(weight_IO) // 6].mT.contiguous(), hessian_II)


def timed(work: Callable[[], object], device: str) -> tuple[float, float]:
    """Wall and processor seconds of one call."""
    if device == "cuda":
        torch.cuda.synchronize()
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - wall, time.process_time() - cpu


def make_linears(width: int, expert_width: int, args: argparse.Namespace, seed: int) -> list[Linear]:
    """Gate and up, which share their input, and down."""
    shapes = [((args.experts, 2 * expert_width, width), 2), ((args.experts, width, expert_width), 1)]
    return [Linear(shape, args.batches, args.tokens, parts, seed, args.device) for shape, parts in shapes]


def measure(model: str, sizes: tuple[int, int, int], args: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Seconds per expert of each phase and way, and by how much the output errors of the two solves differ."""
    linears = make_linears(*sizes[1:], args, seed)
    hessians = [linear.our_hessian() for linear in linears]
    pairs = list(zip(linears, hessians, strict=True))
    works: dict[str, Callable[[], object]] = {
        "hessian_loop": lambda: [linear.loop_hessian() for linear in linears],
        "hessian_ours": lambda: [linear.our_hessian() for linear in linears],
        "hessian_floor": lambda: [linear.hessian_floor() for linear in linears],
        "solve_loop": lambda: [linear.loop_solve(hessian) for linear, hessian in pairs],
        "solve_ours": lambda: [linear.our_solve(hessian) for linear, hessian in pairs],
        "solve_floor": lambda: [linear.solve_floor(hessian) for linear, hessian in pairs],
    }
    row: dict[str, Any] = {"model": model, "seed": seed, "block_experts": sizes[0]}
    for name, work in works.items():
        wall, cpu = timed(work, args.device)
        row[f"{name}_wall"], row[f"{name}_cpu"] = wall / args.experts, cpu / args.experts
    differences = []
    for linear, hessian_EII in pairs:
        ours = linear.our_solve(hessian_EII)
        ours_OI = dequantize(ours.codes_EOI, ours.scale_EOG, ours.zero_point_EOG, GRID.bits)[0]
        theirs_OI = linear.loop_solve(hessian_EII[:1])[0] if args.experts == 1 else None
        if theirs_OI is None:
            parts = linear.weight_EOI[0].chunk(linear.parts)
            theirs_OI = torch.cat([papers_solve(part, hessian_EII[0], GRID, SOLVE) for part in parts])
        weight_OI = linear.weight_EOI[0]
        errors = [float(output_energy(weight_OI - rounded, hessian_EII[0])) for rounded in (theirs_OI, ours_OI)]
        differences.append(abs(errors[0] - errors[1]) / errors[0])
    return row | {"error_difference": max(differences)}


def measure_peer(
    peer: str, python: str, sizes: tuple[int, int, int], args: argparse.Namespace
) -> list[dict[str, float]]:
    """Seconds of one expert by a peer's solve, in its own environment, on the tensors of the first seed."""
    linears = make_linears(*sizes[1:], args, 0)
    tensors = []
    for linear in linears:
        inputs_TI = torch.cat([x_ETI[0] for x_ETI in linear.batches_ETI]).float().cpu()
        weight = torch.stack(linear.weight_EOI[0].chunk(linear.parts)).cpu()
        tensors.append({"weight": weight, "inputs": inputs_TI, "hessian": linear.our_hessian()[0].cpu()})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tensors.pt"
        torch.save(tensors, path)
        script = Path(__file__).with_name("solve_peers.py")
        done = subprocess.run([python, str(script), peer, str(path)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{peer} failed in {python}:\n{done.stderr[-2000:]}")
    rows: list[dict[str, float]] = json.loads(done.stdout.strip().splitlines()[-1])
    return rows


def spread(values: list[float], form: str) -> str:
    """Mean and standard deviation."""
    deviation = stdev(values) if len(values) > 1 else 0.0
    return f"{mean(values):{form}} +- {deviation:{form}}"


def summarise(rows: list[dict[str, Any]], peers: dict[str, dict[str, list[dict[str, float]]]]) -> str:
    """The tables of the terminal and of the Markdown file."""
    lines = [
        "| block | phase | loop, s per expert | moeq, s per expert | loop / moeq | floor / moeq | whole block, moeq |",
        "|---|---|---|---|---|---|---|",
    ]
    for clock, label in (("wall", "wall"), ("cpu", "processor")):
        for model in dict.fromkeys(row["model"] for row in rows):
            chosen = [row for row in rows if row["model"] == model]
            for phase in ("hessian", "solve"):
                loop, ours, floor = (
                    [row[f"{phase}_{way}_{clock}"] for row in chosen] for way in ("loop", "ours", "floor")
                )
                ratios = [[a / b for a, b in zip(values, ours, strict=True)] for values in (loop, floor)]
                whole = mean(ours) * chosen[0]["block_experts"]
                cells = [
                    f"{model} ({label})",
                    phase,
                    spread(loop, ".3f"),
                    spread(ours, ".3f"),
                    spread(ratios[0], ".2f"),
                ]
                lines.append(
                    "| "
                    + " | ".join([*cells, spread([100 * r for r in ratios[1]], ".0f") + "%", f"{whole:.1f} s"])
                    + " |"
                )
    worst = max(row["error_difference"] for row in rows)
    lines += ["", f"Largest relative difference of the output errors of loop and moeq: {worst:.1e}."]
    if peers:
        lines += [
            "",
            "| block | solve of | wall s per expert | processor s per expert | this / moeq, wall |",
            "|---|---|---|---|---|",
        ]
    for model, by_peer in peers.items():
        ours = mean(row["solve_ours_wall"] for row in rows if row["model"] == model)
        for peer, repeats in by_peer.items():
            walls, cpus = ([row[clock] for row in repeats] for clock in ("wall", "cpu"))
            cells = [model, peer, spread(walls, ".3f"), spread(cpus, ".3f"), f"{mean(walls) / ours:.2f}"]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


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


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="352 x 512 and 512 x 352 instead of the models' shapes")
    parser.add_argument("--models", nargs="+", choices=MODELS, help="blocks to measure (default: all; Mixtral on CUDA)")
    parser.add_argument("--experts", type=int, default=2, help="experts that are measured (default 2)")
    parser.add_argument("--batches", type=int, default=4, help="calibration batches per expert (default 4)")
    parser.add_argument("--tokens", type=int, default=256, help="tokens of an expert in a batch (default 256)")
    parser.add_argument("--seeds", type=int, default=3, help="number of weights and inputs (default 3)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--peer", action="append", default=[], metavar="NAME=PYTHON", help="llm-compressor or gptqmodel"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here, and a table to FILE.md")
    args = parser.parse_args()
    for name in ("experts", "batches", "tokens", "seeds"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} ({getattr(args, name)}) must be at least 1; leave it out for the default")
    return args


def main() -> None:
    """Measure, print, write."""
    args = parse()
    names = args.models or [name for name in MODELS if args.device == "cuda" or name not in ON_A_GPU]
    models = QUICK if args.quick else {name: MODELS[name] for name in names}
    rows, peers = [], {}
    for model, sizes in models.items():
        measure(model, sizes, args, args.seeds)  # the first call loads libraries and compiles kernels
        rows += [measure(model, sizes, args, seed) for seed in range(args.seeds)]
        by_peer = {peer.split("=")[0]: measure_peer(*peer.split("=", 1), sizes, args) for peer in args.peer}
        peers |= {model: by_peer} if by_peer else {}
    tokens = f"{args.experts} experts measured, {args.batches} x {args.tokens} tokens each, {args.seeds} seeds"
    where = f"{args.device}, {torch.get_num_threads()} threads"
    what = f"{tokens}, {where}; mean +- deviation; a whole block is extrapolated from these experts."
    table = summarise(rows, peers)
    print(what, table, sep="\n\n")
    if args.json:
        facts = provenance()
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({**facts, "setting": what, "rows": rows, "peers": peers}, indent=2) + "\n")
        header = "\n".join(f"- {name}: {value}" for name, value in facts.items())
        args.json.with_suffix(".md").write_text(f"# Time of the GPTQ solve\n\n{header}\n\n{what}\n\n{table}\n")


if __name__ == "__main__":
    main()
