"""The results of an evaluation: condensing metrics, JSON that reads back, Markdown that lines up."""

import dataclasses
import json
from pathlib import Path

import pytest

from moeq.report.results import ResultRow, markdown_results, markdown_table, read_results, result_row, write_results
from moeq.report.task_report import TaskReport
from moeq.tasks.metrics import COMPARISONS, Measurement
from tests.reports import description, hellaswag, mmlu, share, wikitext

ORIGINAL = ResultRow("original", 16, 16.0, 18_000_000, perplexity={"prose": 50.0, "python": 11.5}, exact_match=0.7)
SETTING = {"versions": {"moeq": "0.1.0", "python": "3.11.7"}, "device": "cpu", "dtype": "bfloat16", "num_ranks": 2}


def windows(name: str, perplexity: float, kl: float, top1: float, router: float) -> TaskReport:
    values = {"perplexity": perplexity, "kl": kl, "top1_agreement": top1, "router_agreement": router}
    measured = {metric: Measurement(value, None, 1, 1.0) for metric, value in values.items()}
    return TaskReport(name, "Windows", {"perplexity": "perplexity", **COMPARISONS}, {"": measured}, (), description())


def arithmetic() -> TaskReport:
    measured = {"exact_match": share(0.625, 200)}
    return TaskReport("arithmetic", "Generation", {"exact_match": "mean"}, {"": measured}, (), description())


def quantized() -> ResultRow:
    tasks = [windows("prose", 51.0, 0.01, 0.9, 0.8), windows("python", 12.0, 0.04, 0.7, 0.6), arithmetic()]
    return result_row(tasks, method="MoEQuant", bits=3, average_bits=3.375, num_bytes=5_100_000, seconds=71.6)


def test_metrics_of_all_tasks_condense_to_a_row() -> None:
    assert quantized() == ResultRow(
        method="MoEQuant", bits=3, average_bits=3.375, bytes=5_100_000, kl_mean=pytest.approx(0.025), kl_worst=0.04,
        perplexity={"prose": 51.0, "python": 12.0}, top1_agreement=pytest.approx(0.8),
        router_agreement=pytest.approx(0.7), exact_match=0.625, seconds=71.6,
    )  # fmt: skip


def test_the_first_share_of_a_task_is_its_accuracy_whatever_comes_before_it() -> None:
    measured = {"perplexity": Measurement(4.2, 0.1, 9, 9.0), "acc": share(0.7, 9), "top1_agreement": share(0.9, 9)}
    kinds = {"perplexity": "perplexity", "acc": "mean", **COMPARISONS}
    lambada = TaskReport("lambada", "LastWord", kinds, {"": measured}, (), description(partial="limit_val_batches"))
    row = result_row([hellaswag(), lambada, mmlu(3)], method="original", bits=16, average_bits=16.0, num_bytes=1)
    assert row.accuracy == {"hellaswag": 0.5714, "lambada": 0.7, "mmlu": mmlu(3).of_task["acc"].value}
    assert row.perplexity == {"lambada": 4.2}
    assert row.partial
    assert row.top1_agreement == 0.9


def test_what_was_not_measured_is_none() -> None:
    row = result_row([wikitext(compared=False)], method="original", bits=16, average_bits=16.0, num_bytes=1)
    assert (row.kl_mean, row.kl_worst, row.top1_agreement, row.router_agreement, row.exact_match) == (None,) * 5
    assert not row.partial


def test_results_read_back_as_they_were_written(tmp_path: Path) -> None:
    rows = [ORIGINAL, quantized()]
    write_results(rows, tmp_path / "run")
    assert read_results(tmp_path / "run/results.json") == rows
    assert (tmp_path / "run/results.md").read_text() == markdown_table(rows)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["results.json", "results.md"]
    assert {"method", "bits", "average_bits", "bytes", "kl_mean", "kl_worst", "perplexity"} <= set(
        json.loads((tmp_path / "run/results.json").read_text())["rows"][0]
    )


def test_everything_about_a_task_is_in_the_file(tmp_path: Path) -> None:
    partial = hellaswag(num_documents=100, partial="num_documents", num_truncated=3, fallbacks={"no BOS": 2})
    write_results([ORIGINAL], tmp_path, [partial, mmlu(3)], SETTING)
    data = json.loads((tmp_path / "results.json").read_text())
    first, second = data["tasks"]
    assert data["format"] == 2
    assert data["device"] == "cpu"
    assert data["versions"]["python"] == "3.11.7"
    assert first["metrics"]["acc_norm"] == {
        "value": 0.7602, "stderr": share(0.7602).stderr, "num_documents": 10042, "weight": 10042.0
    }  # fmt: skip
    assert (first["partial"], first["partial_reason"]) == (True, "num_documents")
    assert (first["num_documents"], first["num_available"], first["num_truncated"]) == (100, 10042, 3)
    assert first["documents_per_second"] == pytest.approx(100 / 125.5)
    assert (first["kind"], first["num_shots"], first["split"], first["chance"]) == (
        "MultipleChoice", 0, "validation", 0.25
    )  # fmt: skip
    assert first["fallbacks"] == {"no BOS": 2}
    assert len(first["sha256"]) == 64
    assert (second["partial"], second["partial_reason"]) == (False, None)
    assert set(second["groups"]) == {"stem", "humanities", "social_sciences", "subject_0", "subject_1", "subject_2"}
    assert read_results(tmp_path / "results.json") == [ORIGINAL]


def test_the_list_of_rows_that_earlier_versions_wrote_still_reads(tmp_path: Path) -> None:
    rows = [ORIGINAL, quantized()]
    old = [{k: v for k, v in dataclasses.asdict(row).items() if k not in ("accuracy", "partial")} for row in rows]
    (tmp_path / "results.json").write_text(json.dumps(old))
    assert read_results(tmp_path / "results.json") == rows


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"method": "RTN", "speed": 1}]', r"unknown fields \['speed'\]"),
        ('{"format": 3, "rows": []}', "has format 3, this version of moeq reads 2"),
    ],
)
def test_files_of_another_version_are_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_results(tmp_path / "results.json")


def test_the_table_lines_up_and_shows_every_domain() -> None:
    assert markdown_table([ORIGINAL, quantized()]).split("\n") == [
        "| method   | bits | avg bits |   MB | KL mean | KL worst | ppl prose | ppl python | top-1 % | router % | exact % | seconds |",  # noqa: E501
        "| -------- | ---: | -------: | ---: | ------: | -------: | --------: | ---------: | ------: | -------: | ------: | ------: |",  # noqa: E501
        "| original |   16 |    16.00 | 18.0 |       - |        - |     50.00 |      11.50 |       - |        - |    70.0 |       0 |",  # noqa: E501
        "| MoEQuant |    3 |     3.38 |  5.1 |  0.0250 |   0.0400 |     51.00 |      12.00 |    80.0 |     70.0 |    62.5 |      72 |",  # noqa: E501
        "",
    ]


def test_columns_that_no_row_has_are_left_out_and_accuracies_have_their_mean() -> None:
    rows = [
        ResultRow("original", 16, 16.0, 18_000_000, accuracy={"hellaswag": 0.5714, "piqa": 0.8}),
        ResultRow("RTN", 3, 3.3, 5_100_000, accuracy={"hellaswag": 0.5}, partial=True),
    ]
    assert markdown_table(rows).split("\n") == [
        "| method        | bits | avg bits |   MB | hellaswag % | piqa % | mean % | seconds |",
        "| ------------- | ---: | -------: | ---: | ----------: | -----: | -----: | ------: |",
        "| original      |   16 |    16.00 | 18.0 |       57.14 |  80.00 |  68.57 |       0 |",
        "| RTN (partial) |    3 |     3.30 |  5.1 |       50.00 |      - |      - |       0 |",
        "",
    ]


def test_a_destroyed_model_does_not_widen_the_table() -> None:
    row = ResultRow("RTN", 2, 2.5, 1, perplexity={"prose": 3.2e11}, kl_mean=0.0)
    assert "| 3.20e+11 |" in markdown_table([row]).replace("  ", " ")
    assert " 0.0000 " in markdown_table([row])


PAGE = """\
| method   | bits | avg bits |   MB | ppl wikitext2 | seconds |
| -------- | ---: | -------: | ---: | ------------: | ------: |
| original |   16 |    16.00 | 18.0 |          5.84 |       0 |

## Tasks

| task      | metric     |          value |   n | shots | split | notes |
| --------- | ---------- | -------------: | --: | ----: | ----- | ----- |
| wikitext2 | perplexity | 5.843 +- 0.041 | 164 |     0 | test  |       |

## Data

| task      | documents |  tokens | seconds | documents/s | data                         | sha256           |
| --------- | --------: | ------: | ------: | ----------: | ---------------------------- | ---------------- |
| wikitext2 |       164 | 3200000 |    41.0 |         4.0 | data/wikitext-2-raw/test.txt | a6b82ed778038268 |

moeq 0.1.0, python 3.11.7; device cpu, dtype bfloat16, num_ranks 2.
"""


def test_the_page_of_one_evaluation_has_rows_tasks_data_and_versions() -> None:
    row = ResultRow("original", 16, 16.0, 18_000_000, perplexity={"wikitext2": 5.8432})
    assert markdown_results([row], [wikitext(compared=False)], SETTING) == PAGE
