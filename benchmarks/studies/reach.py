"""Which domains a calibration set reaches, and how many of its tokens each expert sees.

    OMP_NUM_THREADS=1 python benchmarks/ebss_reach.py --output benchmarks/results/ebss_reach.md

A sequence is given to the domain whose use of experts explains its own best: the largest sum over blocks and experts of
n_l^e log p_l^e, with n its tokens and p the shares of the domain's evaluation windows.  The accuracy of this rule on
other windows of the domains is printed with it.  Sets have 128 windows of 256 tokens; sampled ones are read from
``--folder`` where the study of ``ebss_effect.py`` left them.  Writes a table, and the tokens per expert as a figure.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from calibration_sets import SAMPLED, calibration_set, domain_windows
from origin import origin
from trial import Yardstick

from moeq.sampling.balance import imbalance
from moeq.sampling.next_token import score_sequences

MODEL = "assets/reference-moe"
NUM_WINDOWS = 128
SHOWN = ("prose", "python", "gsm8k", "arithmetic", "paper", "corpus")


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


def main(args: Sequence[str] | None = None) -> None:
    """Print the table; write it and the figure where an output is given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--quick", action="store_true", help="one seed; sets that are not sampled yet are left out")
    parser.add_argument("--folder", type=Path, default=Path("runs/ebss_effect"), help="sampled sets")
    parser.add_argument("--output", type=Path, help="write the table here, and the figure beside it as .png")
    options = parser.parse_args(args)
    torch.set_num_threads(1)
    seeds = options.seeds[:1] if options.quick else options.seeds
    yardstick = Yardstick(MODEL)
    domains = list(yardstick.streams)
    known = {domain: score_sequences(yardstick.model, yardstick.windows(domain))[1] for domain in domains}
    lines = [f"| set | {' | '.join(domains)} | least tokens / even | sigma | nats per token |"]
    lines.append("|---" * (4 + len(domains)) + "|")
    shown: dict[str, Tensor] = {}
    for name in (*domains, "mixture", *SAMPLED):
        written = name not in SAMPLED or any(options.folder.glob(f"{name}-*-{seeds[0]}.safetensors"))
        if options.quick and not written:
            continue
        rows = []
        for seed in seeds:
            row, total_LE = _measure(yardstick, name, seed, options.folder, signatures(known))
            rows.append(row)
            shown.setdefault(name, total_LE)
        digits = [0] * len(domains) + [2, 4, 2]
        lines.append(f"| {name} | {' | '.join(_cell([row[i] for row in rows], d) for i, d in enumerate(digits))} |")
        print(lines[-1], flush=True)
    table = "\n".join(lines) + "\n"
    print(f"\n{table}")
    if options.output is not None:
        _write(options.output, table, {name: shown[name] for name in SHOWN if name in shown}, args)


def _measure(
    yardstick: Yardstick, name: str, seed: int, folder: Path, signature_DLE: Tensor
) -> tuple[list[float], Tensor]:
    """Percent of the sequences by domain, least tokens, sigma, nats per token; and tokens per expert, [L, E]."""
    if name in yardstick.streams:
        ids_NL = domain_windows(yardstick, name, NUM_WINDOWS, seed)
    else:
        ids_NL = calibration_set(yardstick, name, NUM_WINDOWS, seed, folder)
    nll_N, counts_NLE = score_sequences(yardstick.model, ids_NL)
    total_LE = counts_NLE.sum(0).double()
    found_N = nearest(counts_NLE, signature_DLE)
    shares = [100 * float((found_N == index).double().mean()) for index in range(len(signature_DLE))]
    least = float((total_LE / total_LE.mean(-1, keepdim=True)).min())
    nats = float(nll_N.mean()) / (ids_NL.shape[1] - 1)
    return [*shares, least, float(imbalance(total_LE, ids_NL.numel())), nats], total_LE


def _write(path: Path, table: str, shown: Mapping[str, Tensor], args: Sequence[str] | None) -> None:
    figure = path.with_suffix(".png")
    draw(shown, figure)
    path.write_text(
        f"# Which domains a calibration set reaches\n\n{origin(__file__, args)}. Percent of the sequences by "
        "the domain whose use of experts is nearest (the rows of the domains themselves are the accuracy of that "
        "rule on windows it has not seen); tokens of the least used expert over those of an even routing; sigma of "
        f"the set (fraction of tokens).\n\n{table}\n![tokens per expert]({figure.name})\n"
    )


def _cell(values: Sequence[float], digits: int) -> str:
    spread = f" +- {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{fmean(values):.{digits}f}{spread}"


if __name__ == "__main__":
    main()
