"""Do two ranks give the codes of one?  Fits the bundled model on one and on two ranks (CPU, gloo) and counts.

python -m benchmarks.speed.ranks --json benchmarks/results/ranks.json
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from benchmarks.lab.study import Study
from benchmarks.lab.tables import Row, markdown
from moeq.export.moeq_format import read_quantized

CONFIG = "configs/moequant_w3.yaml"
TWO = ["--trainer.devices=2", "--trainer.strategy=moeq_ddp"]


@dataclass(frozen=True)
class Case:
    """A calibration set, and two fits on it."""

    seed: int
    num_sequences: int
    length: int


class Ranks(Study[Case]):
    """One rank against two."""

    title = "One rank and two ranks"
    legend = "One thread per rank, so that one rank has half of the cores and the times can be compared."
    seeds = (0,)
    quick: ClassVar = {"seeds": [0], "num_sequences": 8, "length": 64, "batch_size": 2}
    keeps = False

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--num-sequences", type=int, default=64, help="that the model writes")
        parser.add_argument("--length", type=int, default=256, help="tokens of a sequence")
        parser.add_argument("--batch-size", type=int, default=8, help="sequences of a batch")
        parser.add_argument("--folder", type=Path, default=Path("runs/ranks"), help="scratch folder")

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def cases(self) -> list[Case]:
        o = self.options
        return [Case(seed, o.num_sequences, o.length) for seed in o.seeds]

    def measure(self, case: Case) -> Row:
        folder = self.options.folder
        # Corpus mode writes other sequences with other numbers of ranks, which the comparison is not about.
        data = ["--data.mode=stochastic", f"--data.seed={case.seed}", f"--data.num_sequences={case.num_sequences}"]
        data += [f"--data.length={case.length}", f"--data.batch_size={self.options.batch_size}"]
        data += [f"--data.cache_dir={folder / 'calibration'}"]
        one, two = folder / "one", folder / "two"
        fit(one, data)  # samples; timed again below, with the sequences at hand
        seconds = {"seconds_one_rank": fit(one, data), "seconds_two_ranks": fit(two, [*data, *TWO])}
        found = compare(one / "export", two / "export")
        return {**found, **seconds, "share_different": found["codes_different"] / found["codes"]}

    def report(self, rows: Sequence[Row]) -> str:
        keys = ("seed", "codes", "codes_different", "weights_different", "scales_different")
        lines = [
            [*(row[key] for key in keys), f"{row['seconds_one_rank']:.0f}", f"{row['seconds_two_ranks']:.0f}"]
            for row in rows
        ]
        head = ("seed", "codes", "codes that differ", "weights that differ", "scales that differ", "s, one", "s, two")
        return markdown(head, lines)


def fit(folder: Path, options: Sequence[str]) -> float:
    """Run one fit in processes of its own.

    Returns:
        Its seconds.
    """
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, "main.py", "fit", "--config", CONFIG, "--trainer.accelerator=cpu", *options]
    print("$", shlex.join(command), flush=True)
    start = time.perf_counter()
    # One thread per rank, so that one rank has half of the cores and the times can be compared.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, f"--trainer.default_root_dir={folder}"], check=True, capture_output=True, env=environment)
    return time.perf_counter() - start


def compare(one: Path, two: Path) -> dict[str, int]:
    """Codes, and scales and zero points, that differ between two exports."""
    weights, others = read_quantized(one), read_quantized(two)
    assert weights.keys() == others.keys()
    pairs = [(weights[name], others[name]) for name in weights]
    return {
        "codes": sum(a.codes_OI.numel() for a, _ in pairs),
        "codes_different": sum(int((a.codes_OI != b.codes_OI).sum()) for a, b in pairs),
        "weights_different": sum(int((a.codes_OI != b.codes_OI).any()) for a, b in pairs),
        "scales_different": sum(int((a.scale_OG != b.scale_OG).sum()) for a, b in pairs),
    }


if __name__ == "__main__":
    Ranks.main()
