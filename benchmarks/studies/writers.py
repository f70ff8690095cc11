"""Who writes the calibration data: the model itself, or itself rounded to 8 or 4 bits where it does not fit.

    OMP_NUM_THREADS=1 python -m benchmarks.studies.writers --json benchmarks/results/writers_reference.json
    ... --model runs/mixtral_moe/model --label Mixtral --json benchmarks/results/writers_mixtral.json

EBSS in corpus mode; what follows is the same for all: Hessians of the original's blocks, AGQ in groups of 64, damping
0.1.  The rounded writers are those of ``--data.writer packed8`` and ``packed4``: rounded to nearest, routers exact.
``prose`` is text of one domain in their place.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean
from typing import Any, ClassVar

import torch
from torch import Tensor

from benchmarks.lab.sets import LENGTH, SAMPLED, calibration_set, sampled_set
from benchmarks.lab.study import MODEL, Study
from benchmarks.lab.tables import Row, cell, grouped, markdown, mean_kl, worst_kl
from benchmarks.lab.trial import CachedGridGPTQ, fit
from benchmarks.lab.yardstick import Texts, Yardstick
from callbacks.bit_allocation import BitAllocation
from callbacks.hessian_calibration import HessianCalibration
from moeq.checkpoint.packed import keep_dequantized
from moeq.checkpoint.packed_self import packed_self
from moeq.models.adapter import Adapter
from moeq.sampling.next_token import score_sequences
from moeq.sampling.writer import BITS

WIDTHS: dict[str, int] = {**BITS}
ARMS = ("original", *WIDTHS, "prose")


@dataclass(frozen=True)
class Case:
    """One set and its quantization."""

    seed: int
    writer: str
    bits: int


class Writers(Study[Case]):
    """Every writer at every width, on one model."""

    title = "Who writes the calibration data"
    legend = (
        "Mean KL over the domains (worst domain) in thousandths of a nat, +- over seeds, each with a set of its own; "
        "below, the sets: nats per token by the original, tokens of the least used expert."
    )
    quick: ClassVar = {"seeds": [0], "bits": [3], "num_windows": 32}

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--model", default=MODEL, help="folder of a model with the same tokenizer")
        parser.add_argument("--label", default="reference", help="name of the model in folders and tables")
        parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4])
        parser.add_argument("--writers", nargs="+", default=list(ARMS), choices=ARMS)
        parser.add_argument("--num-windows", type=int, default=64, help=f"sequences of {LENGTH} tokens")

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(options)
        options.folder = options.folder / options.label
        self.title = f"Who writes the calibration data: {options.label} model"  # type: ignore[misc]

    def cases(self) -> list[Case]:
        o = self.options
        return [Case(seed, writer, bits) for seed in o.seeds for writer in o.writers for bits in o.bits]

    @cached_property
    def yardstick(self) -> Yardstick:
        return Yardstick(self.options.model, Texts(num_windows=16))

    def model(self, writer: str) -> Any:
        """The model that writes; a rounded one keeps what it dequantizes, which is the same and faster."""
        if writer not in WIDTHS:
            return self.yardstick.model
        packed = packed_self(Adapter(self.yardstick.model), WIDTHS[writer])
        keep_dequantized(packed, torch.inf)
        return packed

    def ids(self, case: Case) -> Tensor:
        """The set of a case, written once for all widths."""
        num, folder = self.options.num_windows, self.options.folder
        if case.writer == "prose":
            return calibration_set(self.yardstick, "prose", num, case.seed, folder)
        done = folder / f"{case.writer}-{num}-{case.seed}.safetensors"
        writer = None if done.is_file() else self.model(case.writer)
        return sampled_set(self.yardstick, SAMPLED["corpus"], case.writer, case.seed, folder, num, writer=writer)

    def measure(self, case: Case) -> Row:
        ids_NL = self.ids(case)
        nll_N, counts_NLE = score_sequences(self.yardstick.model, ids_NL)
        steps = [BitAllocation(), HessianCalibration(), CachedGridGPTQ()]
        module = fit(ids_NL, steps, name=self.options.model, bits=case.bits, group_size=64, damping=0.1)
        return {
            "nll": float(nll_N.mean()) / (LENGTH - 1),
            "least_tokens": int(counts_NLE.sum(0).min()),
            "domains": self.yardstick.row(module.model),
        }

    def report(self, rows: Sequence[Row]) -> str:
        arms = [arm for arm in ARMS if any(row["writer"] == arm for row in rows)]
        lines = []
        for bits, group in sorted(grouped(rows, lambda row: row["bits"]).items()):
            by_arm = grouped(group, lambda row: row["writer"])
            base = fmean(map(mean_kl, by_arm["original"]))
            ratios = [f"{fmean(map(mean_kl, by_arm[arm])) / base:.3f}" for arm in arms[1:]]
            lines.append([f"{bits} bits", *(_divergence(by_arm[arm]) for arm in arms), *ratios])
        head = ["", *arms, *(f"{arm} / original" for arm in arms[1:])]
        sets = [[arm, *_set(rows, arm)] for arm in arms]
        return markdown(head, lines) + "\n" + markdown(["set", "nats per token", "least tokens"], sets)


def _divergence(rows: Sequence[Row]) -> str:
    return f"{cell([1e3 * mean_kl(row) for row in rows])} ({fmean(1e3 * worst_kl(row) for row in rows):.1f})"


def _set(rows: Sequence[Row], arm: str) -> list[str]:
    """Of the sets of an arm, each counted once whatever widths it was used for."""
    sets = {row["seed"]: row for row in rows if row["writer"] == arm}.values()
    return [cell([row["nll"] for row in sets], ".3f"), cell([row["least_tokens"] for row in sets], ".0f")]


if __name__ == "__main__":
    Writers.main()
