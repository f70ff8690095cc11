"""Task reports for tests, made of plain numbers."""

import random
from typing import Any

from moeq.report.task_report import Description, TaskReport
from moeq.tasks.metrics import COMPARISONS, Measurement, mean_over_groups


def description(**changes: Any) -> Description:
    described: Description = {
        "split": "validation", "origin": "data/hellaswag/validation.jsonl.gz", "sha256": "a6b82ed778038268" + "0" * 48,
        "num_shots": 0, "num_documents": 10042, "num_available": 10042, "num_tokens": 3_200_000, "num_truncated": 0,
        "partial": None, "fallbacks": {}, "seconds": 125.5,
    }  # fmt: skip
    return {**described, **changes}  # type: ignore[typeddict-item]


def share(value: float, n: int = 10042) -> Measurement:
    return Measurement(value, (value * (1 - value) / (n - 1)) ** 0.5, n, float(n))


def hellaswag(**changes: Any) -> TaskReport:
    measured = {"acc": share(0.5714), "acc_norm": share(0.7602)}
    return TaskReport(
        "hellaswag", "MultipleChoice", {"acc": "mean", "acc_norm": "mean"}, {"": measured}, (),
        description(chance=0.25, **changes),
    )  # fmt: skip


def wikitext(compared: bool = True) -> TaskReport:
    measured = {"perplexity": Measurement(5.8432, 0.041, 164, 335_708.0)}
    if compared:
        measured |= {
            "kl": Measurement(0.01234, 0.00021, 164, 335_872.0),
            "top1_agreement": Measurement(0.951, 0.0011, 164, 335_872.0),
            "router_agreement": Measurement(0.9, 0.002, 164, 1_343_488.0),
        }
    described = description(
        split="test", origin="data/wikitext-2-raw/test.txt", num_documents=164, num_available=164, seconds=41.0
    )
    return TaskReport(
        "wikitext2", "Windows", {"perplexity": "perplexity", **COMPARISONS}, {"": measured}, (), described
    )


def mmlu(subjects: int = 3, seed: int = 0, **changes: Any) -> TaskReport:
    rng = random.Random(seed)
    categories = ("stem", "humanities", "social_sciences", "other")
    paths = tuple(
        sorted((categories[i % 4], f"high_school_government_and_politics_{i}" if i % 9 == 8 else f"subject_{i}")
        for i in range(subjects))
    )  # fmt: skip
    measured = {subject: {"acc": share(rng.uniform(0.2, 0.8), 100)} for _, subject in paths}
    for category in dict.fromkeys(category for category, _ in paths):
        inside = [measured[subject]["acc"] for of, subject in paths if of == category]
        measured[category] = {"acc": share(sum(m.value for m in inside) / len(inside), 100 * len(inside))}
    by_subject = mean_over_groups([measured[subject]["acc"] for _, subject in paths])
    measured[""] = {"acc": share(by_subject.value, 100 * subjects), "acc_by_subject": by_subject}
    described = description(num_shots=5, split="test", num_documents=100 * subjects, chance=0.25, **changes)
    return TaskReport("mmlu", "MultipleChoice", {"acc": "mean"}, measured, paths, described)
