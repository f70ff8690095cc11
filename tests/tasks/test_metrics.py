"""Metrics add exactly over documents, batches and ranks, with the standard errors of textbooks and of the harness."""

import math
import random
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import distributed

from moeq.tasks.documents import Result
from moeq.tasks.metrics import COMPARISONS, Measurement, RatioMetric, TaskMetrics, mean_over_groups
from moeq.tasks.task import Aggregate
from tests.processes import SERVER

GROUPS = [("stem", "physics"), ("stem", "algebra"), ("humanities", "law")]


def measure(pairs: Sequence[tuple[float, float]], kind: Aggregate = "mean") -> Measurement:
    metric = RatioMetric(kind)
    for pair in pairs:
        metric.update(*pair)
    return metric.compute()


def reference_ratio(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """sum t / sum w and its linearised standard error, in exact fractions up to the square root."""
    exact = [(Fraction(total), Fraction(weight)) for total, weight in pairs]
    n, weight = len(exact), sum(w for _, w in exact)
    ratio = sum(t for t, _ in exact) / weight
    variance = Fraction(n, n - 1) * sum((t - ratio * w) ** 2 for t, w in exact) / weight**2
    return float(ratio), math.sqrt(variance)


def documents(seed: int, spread: float, n: int = 200) -> list[tuple[float, float]]:
    """Totals of about 2.3 per unit of weight, as of windows or pages of different lengths."""
    rng = random.Random(seed)
    weights = [float(rng.randint(1, 3000)) for _ in range(n)]
    return [(weight * (2.3 + spread * rng.gauss(0, 1)), weight) for weight in weights]


@pytest.mark.parametrize("spread", [1.0, 1e-3, 1e-9])
@pytest.mark.parametrize("seed", range(3))
def test_a_quotient_and_its_standard_error_equal_exact_arithmetic(seed: int, spread: float) -> None:
    pairs = documents(seed, spread)
    ratio, stderr = reference_ratio(pairs)
    found = measure(pairs)
    assert found.value == pytest.approx(ratio, rel=1e-14)
    # The documents differ in their 9th digit only, of which sum t^2 - R^2 sum w^2 would leave nothing.
    assert found.stderr == pytest.approx(stderr, rel=1e-4 if spread < 1e-6 else 1e-9)
    assert (found.num_documents, found.weight) == (200, sum(weight for _, weight in pairs))


def test_with_equal_weights_the_standard_error_is_that_of_a_mean() -> None:
    totals = [random.Random(1).gauss(3, 2) for _ in range(50)]
    mean = sum(totals) / 50
    sample = math.sqrt(sum((total - mean) ** 2 for total in totals) / 49)
    assert measure([(total, 1.0) for total in totals]).stderr == pytest.approx(sample / math.sqrt(50), rel=1e-12)


def test_of_right_and_wrong_it_is_binomial() -> None:
    found = measure([(1.0, 1.0)] * 70 + [(0.0, 1.0)] * 30)
    assert found.value == 0.7
    assert found.stderr == pytest.approx(math.sqrt(0.7 * 0.3 / 99), rel=1e-12)


@pytest.mark.parametrize("kind", get_args(Aggregate))
def test_errors_of_functions_of_the_quotient_follow_the_delta_method(kind: Aggregate) -> None:
    pairs = documents(4, 0.1)
    ratio, stderr = reference_ratio(pairs)
    through = {"mean": float, "perplexity": math.exp, "bits": lambda x: x / math.log(2)}[kind]
    found = measure(pairs, kind)
    assert found.value == pytest.approx(through(ratio), rel=1e-13)
    slope = (through(ratio + 1e-6) - through(ratio - 1e-6)) / 2e-6
    assert found.stderr == pytest.approx(slope * stderr, rel=1e-8)


@pytest.mark.slow
def test_the_standard_error_is_the_spread_of_repeated_samples() -> None:
    values, errors = [], []
    for seed in range(300):
        found = measure(documents(seed, 0.3, 100), "perplexity")
        values.append(found.value)
        errors.append(found.stderr)
    mean = sum(values) / len(values)
    spread = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
    assert sum(errors) / len(errors) == pytest.approx(spread, rel=0.15)


def test_documents_that_agree_have_no_error_rather_than_the_root_of_a_negative_number() -> None:
    for total in (0.1, 1 / 3, 2.7e5):
        assert measure([(total, 1.0)] * 1000).stderr == pytest.approx(0, abs=1e-12 * total)
        assert measure([(total * w, w) for w in (1.0, 3.0, 7.0, 11.0)]).stderr == pytest.approx(0, abs=1e-12 * total)


def test_one_document_has_a_value_and_no_error_and_none_has_neither() -> None:
    assert measure([(3.0, 2.0)]) == (1.5, None, 1, 2.0)
    nothing = measure([(0.0, 0.0)])
    assert math.isnan(nothing.value)
    assert nothing[1:] == (None, 0, 0.0)


def test_a_document_without_weight_is_none() -> None:
    assert measure([(1.0, 1.0), (0.0, 1.0), (0.0, 0.0)]) == measure([(1.0, 1.0), (0.0, 1.0)])


def test_a_hopeless_model_has_an_infinite_perplexity() -> None:
    assert measure([(1000.0, 1.0), (900.0, 1.0)], "perplexity").value == math.inf


def test_batches_and_merged_states_give_what_single_documents_give() -> None:
    pairs = documents(5, 0.2)
    alone = measure(pairs)
    whole, left, right = RatioMetric(), RatioMetric(), RatioMetric()
    whole.update(*torch.tensor(pairs, dtype=torch.float64).unbind(-1))
    left.update(*torch.tensor(pairs[:30], dtype=torch.float64).unbind(-1))
    right.update(*torch.tensor(pairs[30:], dtype=torch.float64).unbind(-1))
    left.merge_state(right)
    for metric in (whole, left):
        found = metric.compute()
        assert (found.value, found.num_documents, found.weight) == pytest.approx((alone.value, 200, alone.weight))
        assert found.stderr == pytest.approx(alone.stderr, rel=1e-12)


def test_sums_keep_their_precision_when_the_module_is_cast() -> None:
    metrics = TaskMetrics("prose", {"perplexity": "perplexity"})
    metrics.add(Result(0, "", (), {"perplexity": (1.001, 1.0)}))
    metrics.compute()
    metrics.to(torch.bfloat16).half()
    metrics.add(Result(1, "", (), {"perplexity": (2.0**-40, 0.0)}))
    assert metrics.compute()[""]["perplexity"].value == math.exp(1.001 + 2.0**-40)


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match=r"kind of a metric \('median'\) must be one of mean, perplexity, bits"):
        RatioMetric("median")  # type: ignore[arg-type]


def results(seed: int = 0) -> list[Result]:
    rng = random.Random(seed)
    return [
        Result(index, str(index), rng.choice(GROUPS), {"acc": (float(rng.random() < 0.6), 1.0), "kl": (0.1, 5.0)})
        for index in range(60)
    ]


def task_metrics() -> TaskMetrics:
    return TaskMetrics("mmlu", {"acc": "mean", **COMPARISONS}, GROUPS)


def test_a_document_counts_for_its_task_and_for_each_of_its_groups() -> None:
    metrics = task_metrics()
    metrics.add(*results())
    computed = metrics.compute()
    assert list(computed) == ["", "humanities", "law", "stem", "algebra", "physics"]
    for group, measured in computed.items():
        right = [r.values["acc"] for r in results() if not group or group in r.groups]
        alone = measure(right)
        assert measured["acc"] == (alone.value, pytest.approx(alone.stderr), *alone[2:])
        assert measured["kl"].value == pytest.approx(0.02)
        assert set(measured) == {"acc", "kl"} | ({"acc_by_subject"} if not group else set())


def test_the_mean_over_subjects_counts_each_the_same() -> None:
    metrics = task_metrics()
    metrics.add(*results())
    computed = metrics.compute()
    subjects = [computed[name]["acc"] for name in ("algebra", "law", "physics")]
    macro = computed[""]["acc_by_subject"]
    assert macro.value == pytest.approx(sum(subject.value for subject in subjects) / 3)
    assert macro.value != computed[""]["acc"].value
    assert macro.stderr == pytest.approx(math.sqrt(sum(subject.stderr**2 for subject in subjects)) / 3)
    assert (macro.num_documents, macro.weight) == (60, 3.0)


def test_the_mean_over_groups_has_no_error_where_a_group_has_none() -> None:
    assert mean_over_groups([measure([(1.0, 1.0)]), measure([(0.0, 1.0), (1.0, 1.0)])]) == (0.75, None, 3, 2.0)


def test_groups_and_metrics_that_were_not_announced_are_refused() -> None:
    metrics = task_metrics()
    with pytest.raises(ValueError, match="group 'art' of task mmlu has no metric 'acc'"):
        metrics.add(Result(0, "", ("art",), {"acc": (1.0, 1.0)}))
    with pytest.raises(ValueError, match="task mmlu has no metric 'f1'; it was made with the metrics acc, kl"):
        metrics.add(Result(0, "", (), {"f1": (1.0, 1.0)}))


def test_reset_forgets_everything_and_nothing_seen_is_no_metric() -> None:
    metrics = task_metrics()
    metrics.add(*results())
    metrics.compute()
    metrics.add(*results())
    metrics.reset()
    assert metrics.compute() == {}


def reduce_on_one_rank(rank: int, folder: str) -> None:
    """Two ranks with unequal shares of one task, and only the first with any of another; both write what they get."""
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    shared, one_sided = task_metrics(), RatioMetric("perplexity")
    shared.add(*(results()[:47] if rank == 0 else results()[47:]))
    if rank == 0:
        one_sided.update(10.0, 4)
    else:
        one_sided.update(torch.zeros(0), torch.zeros(0))
    torch.save((shared.compute(), one_sided.compute()), f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_measure_what_one_does(tmp_path: Path) -> None:
    ranks = [SERVER.Process(target=reduce_on_one_rank, args=(rank, str(tmp_path))) for rank in range(2)]
    for each in ranks:
        each.start()
    for each in ranks:
        each.join()
        assert each.exitcode == 0
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in (0, 1))
    assert first == second
    alone = task_metrics()
    alone.add(*results())
    expected = alone.compute()
    assert {group: set(found) for group, found in first[0].items()} == {g: set(found) for g, found in expected.items()}
    for group, measured in expected.items():
        for name, found in measured.items():
            both = first[0][group][name]
            assert both.value == (found.value if name == "acc" else pytest.approx(found.value, rel=1e-15)), (
                group,
                name,
            )
            assert both.stderr == pytest.approx(found.stderr, rel=1e-12, abs=1e-12)
            assert both[2:] == found[2:]
    assert first[1] == (math.exp(2.5), None, 1, 4.0)
