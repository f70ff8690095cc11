"""Do cost tables predict? Rank correlation of every table with the measured KL of rounding single weights.

    OMP_NUM_THREADS=1 python benchmarks/prediction.py

Cases: each linear of attention and shared experts, one linear of one routed expert, and one linear of all experts of
a block, each rounded to nearest at 2, 3 and 4 bits in groups of 64.  The survey and the measurement see the same prose,
so this judges the approximation and not its transfer to other text.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from moeq.allocation.evidence import Evidence
from moeq.allocation.plan import Choice
from moeq.checkpoint.loading import load_model, load_tokenizer
from moeq.disk.texts import read_documents, token_stream
from moeq.models.adapter import Adapter
from moeq.quant.grid import choose_qparams, dequantize, quantize
from moeq.quant.spec import GridSpec
from moeq.sampling.text import text_windows
from moeq.scoring.divergence import kl_sum_and_agreement
from moeq.survey.settings import SurveySpec
from moeq.survey.surveyor import survey_model

TEXT = Path("assets/reference-moe/texts/wikitext2_validation.txt")
COSTS = ("fisher", "fisher_kl", "hessian", "gemq", "pmq", "block_output")
Case = tuple[str, list[str], dict[str, Tensor]]


def cases(adapter: Adapter, bits: int) -> Iterator[Case]:
    """Kind of the weights, their names, and weight_EOI of the sites that they change."""
    grid = GridSpec(bits=bits, group_size=64)
    for site in adapter.all_sites():
        weight_EOI = adapter.get_weight(site).float()
        qparams = choose_qparams(weight_EOI, grid, torch.bfloat16)
        codes_EOI = quantize(weight_EOI, qparams, grid)
        rounded_EOI = dequantize(codes_EOI, qparams.scale_EOG, qparams.zero_point_EOG, bits)
        end = 0
        for leaf, rows in zip(site.leaves, site.rows, strict=True):
            start, end = end, end + rows
            # An expert in the middle, then all of them.
            for experts in [[site.num_experts // 2], list(range(site.num_experts))][: 2 if site.num_experts > 1 else 1]:
                changed_EOI = weight_EOI.clone()
                changed_EOI[experts, start:end] = rounded_EOI[experts, start:end]
                yield site.kind, [site.weight_name(e, leaf) for e in experts], {site.name: changed_EOI}


@torch.no_grad()
def measured_kl(adapter: Adapter, changed: dict[str, Tensor], ids_NL: Tensor, original_NLV: Tensor) -> float:
    """Mean KL of the model with some weights replaced; the original ones are put back."""
    sites = [site for site in adapter.all_sites() if site.name in changed]
    before = {site: adapter.get_weight(site) for site in sites}
    for site in sites:
        adapter.set_weight(site, changed[site.name])
    kl_sum, _, num_tokens = kl_sum_and_agreement(original_NLV, adapter.model(ids_NL).logits)
    for site, weight_EOI in before.items():
        adapter.set_weight(site, weight_EOI)
    return float(kl_sum / num_tokens)


def predicted(evidence: Evidence, cost: str, names: Sequence[str], bits: int) -> float:
    """Sum of a table over some weights."""
    return sum(evidence.costs[cost][name][Choice(bits, 64)] for name in names)


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's, without ties."""
    ranks = torch.stack([values.argsort().argsort().double() for values in (a, b)])
    return float(torch.corrcoef(ranks)[0, 1])


def main(args: Sequence[str] | None = None) -> None:
    """Print rank correlations by kind, and the scale of the tables that are in nats."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="assets/reference-moe")
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--quick", action="store_true", help="3 bits, fisher alone")
    options = parser.parse_args(args)
    torch.set_num_threads(1)
    if options.quick:
        options.bits = [3]
    costs = ("fisher",) if options.quick else COSTS
    model, tokenizer = load_model(options.model, "float32"), load_tokenizer(options.model)
    windows_NL = text_windows(token_stream(read_documents(TEXT), tokenizer), 256, 32, 0)
    spec = SurveySpec(costs=costs, choices=tuple(Choice(b, 64) for b in options.bits), solver="rtn")
    evidence = survey_model(model, windows_NL.split(8), spec)
    adapter, ids_NL = Adapter(model), windows_NL[:16]
    with torch.no_grad():
        original_NLV = model(ids_NL).logits
    found = [
        (kind, bits, names, measured_kl(adapter, changed, ids_NL, original_NLV))
        for bits in options.bits
        for kind, names, changed in cases(adapter, bits)
    ]
    kinds = list(dict.fromkeys(kind for kind, *_ in found))
    print(f"| cost | all {len(found)} cases | {' | '.join(kinds)} | median KL / predicted |")
    print("|---" * (3 + len(kinds)) + "|")
    for cost in costs:
        cells = []
        for kind in (None, *kinds):
            rows = [row for row in found if kind in (None, row[0])]
            kl = torch.tensor([row[3] for row in rows], dtype=torch.float64)
            cost_of = torch.tensor([predicted(evidence, cost, row[2], row[1]) for row in rows], dtype=torch.float64)
            cells.append(f"{rank_correlation(kl, cost_of):.3f}")
            if kind is None:
                scale = f"{float((kl / cost_of).median()):.2f}" if cost.startswith("fisher") else ""
        print(f"| {cost} | {' | '.join(cells)} | {scale} |", flush=True)


if __name__ == "__main__":
    main()
