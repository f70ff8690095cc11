"""How well modes of EBSS cover the experts, against plain sampling at equal token count: 32 x 128 tokens each.

``OMP_NUM_THREADS=1 python benchmarks/ebss_coverage.py --seeds 0 1 2`` (about five minutes).
"""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from datamodules.ebss import first_token_candidates
from moeq.checkpoint.loading import load_model, load_tokenizer
from moeq.sampling.balance import balance_columns, is_degenerate
from moeq.sampling.effective import measure_evidence
from moeq.sampling.next_token import ModelNextToken
from moeq.sampling.parts import SetWriter, sample_set
from moeq.sampling.settings import EBSSSpec

MODEL = "assets/reference-moe"
BASE = EBSSSpec(num_sequences=32, length=128, mode="stochastic")
ARMS = {
    "plain sampling": replace(BASE, branches=1),
    "stochastic": BASE,
    "paper": replace(BASE, mode="paper"),
    "corpus": replace(BASE, mode="corpus"),
    "corpus, 1 start": replace(BASE, mode="corpus", starts=1),
    "corpus, 1 branch": replace(BASE, mode="corpus", branches=1),
    "corpus, 8 starts": replace(BASE, mode="corpus", starts=8),
}
KEYS = ("tokens_per_expert_min", "effective", "sigma_token_fraction", "nll_mean", "degenerate_share", "seconds")


def main(args: Sequence[str] | None = None) -> None:
    """Print one Markdown row per arm: mean and standard deviation over seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="sampling seeds")
    parser.add_argument(
        "--arms", nargs="+", default=list(ARMS), choices=list(ARMS), metavar="ARM", help=str(list(ARMS))
    )
    options = parser.parse_args(args)
    model, tokenizer = load_model(MODEL, "float32"), load_tokenizer(MODEL)
    candidates_V = first_token_candidates(model, tokenizer)
    print("| arm | least tokens | least effective | sigma | nats per token | loops | seconds |")
    print("|---|---|---|---|---|---|---|")
    for arm in options.arms:
        rows = []
        for seed in options.seeds:
            start = time.perf_counter()
            with TemporaryDirectory() as folder, ModelNextToken(model) as next_token:
                sampler = SetWriter(
                    replace(ARMS[arm], seed=seed), BASE.num_sequences, candidates_V,
                    lambda ids_NT: [is_degenerate(text) for text in tokenizer.batch_decode(ids_NT)],
                    lambda ids_NT: measure_evidence(model, ids_NT), Path(folder),
                )  # fmt: skip
                sampled = sample_set(sampler, next_token, model.device)
            seconds = time.perf_counter() - start
            texts = tokenizer.batch_decode(sampled.ids_NT)
            columns = balance_columns(sampled.counts_NLE, sampled.nll_N, BASE.length, texts)
            effective = float(measure_evidence(model, sampled.ids_NT).effective_LE().min())
            rows.append({**columns, "effective": effective, "seconds": seconds})
        cells = [[row[key] for row in rows] for key in KEYS]
        print(f"| {arm} | {' | '.join(_cell(values) for values in cells)} |", flush=True)


def _cell(values: list[float]) -> str:
    return f"{fmean(values):.3g}" + (f" +- {stdev(values):.2g}" if len(values) > 1 else "")


if __name__ == "__main__":
    main()
