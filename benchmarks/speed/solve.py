"""Time of Hessian accumulation and GPTQ solve for one block of a large MoE, against the loop of the papers' code.

    python -m benchmarks.speed.solve                                 # Qwen1.5-MoE, DeepSeek-MoE-16B, Qwen3-30B-A3B
    python -m benchmarks.speed.solve --quick                         # one small shape, same code
    python -m benchmarks.speed.solve --device cuda --experts 64      # and Mixtral
    python -m benchmarks.speed.solve --peer llm-compressor=ENV/bin/python --peer gptqmodel=ENV2/bin/python
    python -m benchmarks.speed.solve --json benchmarks/results/solve.json

Both run interleaved in one process on the same tensors, and beside them the floor: the operations that the phase cannot
do without, as matrix products (T I^2 for a symmetric Hessian; O I^2 of feedback and I^3 / 3 of a factor).  Figures are
per expert, of ``--experts`` measured ones; a block is that times its number of experts, which is stated as an
extrapolation.  Wall time and processor time, which other processes on the machine disturb less.
"""

import argparse
import json
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import ClassVar

import torch

from benchmarks.lab.study import Study
from benchmarks.lab.tables import Row, cell, grouped, markdown
from benchmarks.speed.papers_loop import papers_solve
from benchmarks.speed.solve_linears import GRID, SOLVE, make_linears
from moeq.quant.grid import dequantize
from moeq.quant.solution import output_energy

# Experts of a block, hidden size, expert width.
MODELS = {
    "Qwen1.5-MoE": (60, 2048, 1408),
    "DeepSeek-MoE-16B": (64, 2048, 1408),
    "Qwen3-30B-A3B": (128, 2048, 768),
    "Mixtral-8x7B": (8, 4096, 14336),
    "quick": (8, 512, 352),
}
ON_A_GPU = ("Mixtral-8x7B",)
QUICK = "quick"


@dataclass(frozen=True)
class Case:
    """Weights and inputs of one block, drawn by a seed."""

    model: str
    seed: int


class Solve(Study[Case]):
    """Every block."""

    title = "Time of the GPTQ solve"
    quick: ClassVar = {"models": [QUICK]}
    keeps = False
    threads = None

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--models", nargs="+", choices=MODELS, help="blocks to measure (default: all; Mixtral on CUDA)"
        )
        parser.add_argument("--experts", type=int, default=2, help="experts that are measured (default 2)")
        parser.add_argument("--batches", type=int, default=4, help="calibration batches per expert (default 4)")
        parser.add_argument("--tokens", type=int, default=256, help="tokens of an expert in a batch (default 256)")
        parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
        parser.add_argument(
            "--peer", action="append", default=[], metavar="NAME=PYTHON", help="llm-compressor or gptqmodel"
        )

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(options)
        for name in ("experts", "batches", "tokens"):
            if getattr(options, name) < 1:
                raise SystemExit(
                    f"--{name} ({getattr(options, name)}) must be at least 1; leave it out for the default"
                )

    @property
    def device(self) -> torch.device:
        return torch.device(self.options.device)

    def cases(self) -> list[Case]:
        o = self.options
        usual = [name for name in MODELS if name != QUICK and (o.device == "cuda" or name not in ON_A_GPU)]
        return [Case(name, seed) for name in o.models or usual for seed in o.seeds]

    def measure(self, case: Case) -> Row:
        sizes, o = MODELS[case.model], self.options
        row: Row = {}
        if case.seed == o.seeds[0]:
            measure(sizes, o, case.seed)  # the first call loads libraries and compiles kernels
            pairs = [peer.split("=", 1) for peer in o.peer]
            row = {"peers": {peer: measure_peer(peer, python, sizes, o) for peer, python in pairs}}
        return {**row, **measure(sizes, o, case.seed)}

    def report(self, rows: Sequence[Row]) -> str:
        o = self.options
        worst = max(row["error_difference"] for row in rows)
        peers = {row["model"]: row["peers"] for row in rows if row.get("peers")}
        parts = [
            f"{o.experts} experts measured, {o.batches} x {o.tokens} tokens each; mean +- deviation over seeds; a "
            "whole block is extrapolated from these experts.\n", phases(rows),
            f"Largest relative difference of the output errors of loop and moeq: {worst:.1e}.\n",
        ]  # fmt: skip
        return "\n".join([*parts, *([against_peers(rows, peers)] if peers else [])])


def timed(work: Callable[[], object], device: str) -> tuple[float, float]:
    """Wall and processor seconds of one call."""
    if device == "cuda":
        torch.cuda.synchronize()
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - wall, time.process_time() - cpu


def measure(sizes: tuple[int, int, int], args: argparse.Namespace, seed: int) -> Row:
    """Seconds per expert of each phase and way, and by how much the output errors of the two solves differ."""
    linears = make_linears(sizes, args, seed)
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
    row: Row = {"block_experts": sizes[0]}
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
    linears = make_linears(sizes, args, 0)
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


def phases(rows: Sequence[Row]) -> str:
    """Both phases of every block by both clocks."""
    lines = []
    for clock, label in (("wall", "wall"), ("cpu", "processor")):
        for model, chosen in grouped(rows, lambda row: row["model"]).items():
            for phase in ("hessian", "solve"):
                loop, ours, floor = (
                    [row[f"{phase}_{way}_{clock}"] for row in chosen] for way in ("loop", "ours", "floor")
                )
                ratios = [[a / b for a, b in zip(values, ours, strict=True)] for values in (loop, floor)]
                share = f"{cell([100 * ratio for ratio in ratios[1]], '.0f')}%"
                whole = f"{mean(ours) * chosen[0]['block_experts']:.1f} s"
                times = [cell(loop, ".3f"), cell(ours, ".3f"), cell(ratios[0])]
                lines.append([f"{model} ({label})", phase, *times, share, whole])
    head = ("loop, s per expert", "moeq, s per expert", "loop / moeq", "floor / moeq", "whole block, moeq")
    return markdown(["block", "phase", *head], lines)


def against_peers(rows: Sequence[Row], peers: Mapping[str, Mapping[str, Sequence[Mapping[str, float]]]]) -> str:
    """Solves of other projects, by block and project."""
    lines = []
    for model, by_peer in peers.items():
        ours = mean(row["solve_ours_wall"] for row in rows if row["model"] == model)
        for peer, repeats in by_peer.items():
            walls, cpus = ([row[clock] for row in repeats] for clock in ("wall", "cpu"))
            lines.append([model, peer, cell(walls, ".3f"), cell(cpus, ".3f"), f"{mean(walls) / ours:.2f}"])
    head = ("block", "solve of", "wall s per expert", "processor s per expert", "this / moeq, wall")
    return markdown(head, lines)


if __name__ == "__main__":
    Solve.main()
