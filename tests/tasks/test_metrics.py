"""Metrics add exactly over batches and ranks, a rank without data included."""

import math
from pathlib import Path

import pytest
import torch
from torch import distributed, multiprocessing

from moeq.tasks.evaluate import SetMetrics
from moeq.tasks.metrics import Agreement, ExactMatch, MeanKL, MeanMetric, Perplexity, RouterAgreement

CLASSES = (Perplexity, MeanKL, Agreement, RouterAgreement, ExactMatch)


def reduce_on_one_rank(rank: int, folder: str) -> None:
    """Two ranks with 3 and 1 batches; what each computes is written down."""
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    metrics = SetMetrics("prose")
    for total, count in ((10.0, 4), (3.0, 2), (0.5, 1))[: 3 if rank == 0 else 1]:
        metrics.perplexity.update(torch.tensor(total, dtype=torch.float64), count)
        metrics.top1_agreement.update(count - 1, torch.tensor(count))
    if rank == 0:
        metrics.kl.update(0.25, 5)
    torch.save(metrics.compute(), f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


def test_two_ranks_with_unequal_batches_reduce_exactly(tmp_path: Path) -> None:
    multiprocessing.spawn(reduce_on_one_rank, args=(str(tmp_path),), nprocs=2)
    first, second = torch.load(tmp_path / "0.pt"), torch.load(tmp_path / "1.pt")
    # exact_match and router_agreement saw nothing anywhere; kl only on rank 0.
    assert first == second
    assert first == {"perplexity": math.exp(23.5 / 11), "top1_agreement": 7 / 11, "kl": 0.05}


@pytest.mark.parametrize("metric_class", CLASSES)
def test_one_metric_over_all_batches_equals_merged_states(metric_class: type[MeanMetric]) -> None:
    together, left, right = metric_class(), metric_class(), metric_class()
    for index, (total, count) in enumerate([(1, 3), (2, 2), (0, 5)]):
        together.update(total, count)
        (left if index < 2 else right).update(total, count)
    left.merge_state(right)
    assert float(left.compute()) == float(together.compute())
    mean = 3 / 10
    assert float(together.compute()) == (math.exp(mean) if metric_class is Perplexity else mean)


def test_sums_keep_their_precision_when_the_module_is_cast() -> None:
    metrics = SetMetrics("prose").to(torch.bfloat16)
    metrics.perplexity.update(1.0, 1)
    metrics.perplexity.update(2.0**-40, 0)
    assert metrics.perplexity.total.dtype == torch.float64
    assert float(metrics.perplexity.total) == 1.0 + 2.0**-40


def test_a_metric_without_data_is_not_a_number() -> None:
    for metric_class in CLASSES:
        metric = metric_class()
        metric.update(0, 0)
        assert math.isnan(float(metric.compute()))
