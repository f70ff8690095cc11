r"""Which domains a calibration set reaches, and how many of its tokens each expert sees.

    OMP_NUM_THREADS=1 python -m benchmarks.studies.reach --folder runs/calibration_data \
        --json benchmarks/results/reach.json

A sequence is given to the domain whose use of experts explains its own best: the largest sum over blocks and experts of
n_l^e log p_l^e, with n its tokens and p the shares of the domain's evaluation windows.  The accuracy of this rule on
other windows of the domains is reported with it.  Sets have 128 windows of 256 tokens; sampled ones are read from
``--folder`` where ``calibration_data`` left them.  The figure has the tokens per expert.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from benchmarks.lab.sets import LENGTH, SAMPLED, calibration_set, domain_windows
from benchmarks.lab.study import Study
from benchmarks.lab.tables import Row, cell, grouped, markdown
from moeq.sampling.balance import imbalance
from moeq.sampling.next_token import score_sequences

DOMAINS = ("prose", "python", "gsm8k", "arithmetic")
SHOWN = (*DOMAINS, "paper", "corpus")


@dataclass(frozen=True)
class Case:
    """One calibration set."""

    num_windows: int
    name: str
    seed: int


class Reach(Study[Case]):
    """Sets of each domain, their mixture, and every kind of sampling."""

    title = "Which domains a calibration set reaches"
    legend = (
        "Percent of the sequences by the domain whose use of experts is nearest (the rows of the domains themselves "
        "are the accuracy of that rule on windows it has not seen); tokens of the least used expert over those of an "
        "even routing; sigma of the set (fraction of tokens)."
    )
    quick: ClassVar = {"seeds": [0], "windows": 16, "sets": [*DOMAINS, "mixture", "plain"]}

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        names = [*DOMAINS, "mixture", *SAMPLED]
        parser.add_argument("--sets", nargs="+", default=names, choices=names, metavar="SET", help=", ".join(names))
        parser.add_argument("--windows", type=int, default=128, help=f"of {LENGTH} tokens")

    def cases(self) -> list[Case]:
        o = self.options
        return [Case(o.windows, name, seed) for name in o.sets for seed in o.seeds]

    @cached_property
    def signature_DLE(self) -> Tensor:
        """How the evaluation windows of each domain use the experts."""
        model = self.yardstick.model
        return signatures({name: score_sequences(model, self.yardstick.windows(name))[1] for name in DOMAINS})

    def measure(self, case: Case) -> Row:
        if case.name in DOMAINS:
            ids_NL = domain_windows(self.yardstick, case.name, case.num_windows, case.seed)
        else:
            ids_NL = calibration_set(self.yardstick, case.name, case.num_windows, case.seed, self.options.folder)
        nll_N, counts_NLE = score_sequences(self.yardstick.model, ids_NL)
        total_LE = counts_NLE.sum(0).double()
        found_N = nearest(counts_NLE, self.signature_DLE)
        return {
            "percent": {name: 100 * float((found_N == i).double().mean()) for i, name in enumerate(DOMAINS)},
            "least": float((total_LE / total_LE.mean(-1, keepdim=True)).min()),
            "sigma": float(imbalance(total_LE, ids_NL.numel())),
            "nats": float(nll_N.mean()) / (ids_NL.shape[1] - 1),
            "tokens_LE": total_LE.tolist(),
        }

    def report(self, rows: Sequence[Row]) -> str:
        lines = []
        for name, group in grouped(rows, lambda row: row["name"]).items():
            percents = [cell([row["percent"][domain] for row in group], ".0f") for domain in DOMAINS]
            rest = [cell([row[key] for row in group], f".{d}f") for key, d in (("least", 2), ("sigma", 4), ("nats", 2))]
            lines.append([name, *percents, *rest])
        return markdown(["set", *DOMAINS, "least tokens / even", "sigma", "nats per token"], lines)

    def draw(self, rows: Sequence[Row], path: Path) -> None:
        first = {name: group[0] for name, group in grouped(rows, lambda row: row["name"]).items()}
        draw({name: torch.tensor(first[name]["tokens_LE"]) for name in SHOWN if name in first}, path)


def signatures(counts: Mapping[str, Tensor]) -> Tensor:
    """Log-shares of every expert, [D, L, E], by domain; counts_NLE of each (one token more, so that none is zero)."""
    usage_DLE = torch.stack([counts_NLE.sum(0).double() + 1 for counts_NLE in counts.values()])
    return (usage_DLE / usage_DLE.sum(-1, keepdim=True)).log()


def nearest(counts_NLE: Tensor, signature_DLE: Tensor) -> Tensor:
    """Index of the domain that explains each sequence best, [N]."""
    return torch.einsum("nle,dle->nd", counts_NLE.double(), signature_DLE).argmax(-1)


def draw(counts: Mapping[str, Tensor], path: Path) -> None:
    """Tokens of each expert over those of an even routing, one line per set, experts side by side."""
    from matplotlib.figure import Figure

    shares = torch.stack([(total / total.mean(-1, keepdim=True)).flatten() for total in counts.values()])
    figure = Figure(figsize=(11, 0.5 * len(counts) + 1.4), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares.numpy(), aspect="auto", cmap="RdBu", vmin=0, vmax=2, interpolation="nearest")
    num_blocks, num_experts = next(iter(counts.values())).shape
    axes.set_yticks(range(len(counts)), [f"{name} (least {shares[i].min():.2f})" for i, name in enumerate(counts)])
    middles = [block * num_experts + (num_experts - 1) / 2 for block in range(num_blocks)]
    axes.set_xticks(middles, [f"block {block}" for block in range(num_blocks)])
    for block in range(1, num_blocks):
        axes.axvline(block * num_experts - 0.5, color="black", linewidth=0.8)
    axes.set_title(f"Tokens of each of {num_experts} experts, over those of an even routing")
    figure.colorbar(image, ax=axes, extend="max")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    Reach.main()
