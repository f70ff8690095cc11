"""The parts that studies of calibration share."""

from pathlib import Path

import pytest
import torch

from benchmarks.lab.sets import LENGTH, calibration_set
from benchmarks.lab.trial import fit
from benchmarks.lab.yardstick import Texts, Yardstick
from benchmarks.studies.calibration_data import kl_table, ratio_table
from benchmarks.studies.reach import nearest, signatures
from moeq.evaluation.evaluator import Evaluator
from moeq.evaluation.reference_logits import LiveOriginal
from moeq.scoring.scorer import Scorer
from moeq.tasks.documents import Document, Request
from moeq.tasks.task import Source, Windows

MODEL = str(Path(__file__).resolve().parents[3] / "assets/reference-moe")


@pytest.fixture(scope="module")
def yardstick() -> Yardstick:
    files = {"python": "python_heldout.jsonl", "gsm8k": "gsm8k_test.jsonl"}
    return Yardstick(MODEL, Texts(domains=files, num_windows=2, window_length=LENGTH))


@pytest.mark.slow
def test_a_yardstick_measures_what_validate_measures(yardstick: Yardstick) -> None:
    module = fit(yardstick.unused_windows("gsm8k")[:2], name=MODEL, bits=3)
    found = yardstick.measure(module.model)
    task = Windows(name="text", source=Source("", None))
    evaluator = Evaluator(Scorer(module.model), yardstick.tokenizer, LiveOriginal(Scorer(yardstick.model)))
    for domain, divergence in found.items():
        windows = [Request((row[0],), tuple(row[1:]), open_end=True) for row in yardstick.windows(domain).tolist()]
        results = evaluator.run(task, [Document(i, str(i), {}, (), (window,)) for i, window in enumerate(windows)])
        expected = {}
        for name in results[0].values:
            totals, weights = zip(*(result.values[name] for result in results), strict=True)
            expected[name] = sum(totals) / sum(weights)
        assert divergence.kl == pytest.approx(expected["kl"])
        assert divergence.nll == pytest.approx(expected["perplexity"], rel=1e-5)
        assert divergence.router_agreement == pytest.approx(expected["router_agreement"])
        assert divergence.top1_agreement == pytest.approx(expected["top1_agreement"])
    errors = yardstick.expert_errors(module.model)
    assert errors.shape == (4 * 2 * 16,)
    assert 0.005 < float(errors.median()) < 0.5
    assert yardstick.expert_errors(yardstick.model).max() == 0


def test_no_window_is_both_evaluated_and_calibrated_on(yardstick: Yardstick) -> None:
    for domain in yardstick.streams:
        evaluated, unused = yardstick.windows(domain), yardstick.unused_windows(domain)
        assert len(evaluated) + len(unused) == len(yardstick.streams[domain]) // LENGTH
        assert not (unused[:, None] == evaluated).all(-1).any()
    first, again = (calibration_set(yardstick, "mixture", 8, seed, Path()) for seed in (0, 0))
    assert torch.equal(first, again)
    assert first.shape == (8, LENGTH)


def test_sequences_go_to_the_domain_that_uses_experts_as_they_do() -> None:
    generator = torch.Generator().manual_seed(0)
    shares_DLE = torch.rand(3, 2, 6, generator=generator, dtype=torch.float64).softmax(-1)
    drawn = torch.stack(
        [
            torch.stack([row.multinomial(400, True, generator=generator).bincount(minlength=6) for row in p])
            for p in shares_DLE
        ]
    )
    signature_DLE = signatures({str(d): (1000 * p).round().unsqueeze(0) for d, p in enumerate(shares_DLE)})
    assert nearest(drawn, signature_DLE).tolist() == [0, 1, 2]


def test_tables_average_seeds_and_pair_them_with_the_oracle() -> None:
    def row(arm: str, seed: int, kl: float) -> dict[str, object]:
        domains = {"a": {"kl": kl, "router_agreement": 0.5}, "b": {"kl": 3 * kl, "router_agreement": 0.7}}
        return {"arm": arm, "seed": seed, "bits": 3, "tokens": 8192, "affinity_power": 1, "domains": domains}

    rows = [row("mixture", 0, 0.1), row("mixture", 1, 0.2), row("corpus", 0, 0.2), row("corpus", 1, 0.3)]
    assert "| 3 | 8k | mixture | AGQ | 150.00 +- 70.71 | 450.00 +- 212.13 | 300.00 +- 141.42 |" in kl_table(rows)
    assert "| 3 | 8k | AGQ | 1.750 +- 0.354 | 1.750 +- 0.354 |" in ratio_table(rows)
