"""The result table: condensing metrics, JSON that reads back, Markdown that lines up."""

import json
from pathlib import Path

import pytest

from moeq.report import ResultRow, markdown_table, read_results, result_row, write_results

SETS = {
    "prose": {"perplexity": 51.0, "kl": 0.01, "top1_agreement": 0.9, "router_agreement": 0.8},
    "python": {"perplexity": 12.0, "kl": 0.04, "top1_agreement": 0.7, "router_agreement": 0.6},
    "arithmetic_exact_match": {"exact_match": 0.625},
}
ORIGINAL = ResultRow("original", 16, 16.0, 18_000_000, perplexity={"prose": 50.0, "python": 11.5}, exact_match=0.7)


def quantized() -> ResultRow:
    return result_row(SETS, method="MoEQuant", bits=3, average_bits=3.375, num_bytes=5_100_000, seconds=71.6)


def test_metrics_of_all_sets_condense_to_a_row() -> None:
    assert quantized() == ResultRow(
        method="MoEQuant", bits=3, average_bits=3.375, bytes=5_100_000, kl_mean=pytest.approx(0.025), kl_worst=0.04,
        perplexity={"prose": 51.0, "python": 12.0}, top1_agreement=pytest.approx(0.8),
        router_agreement=pytest.approx(0.7), exact_match=0.625, seconds=71.6,
    )  # fmt: skip


def test_what_was_not_measured_is_none() -> None:
    row = result_row({"prose": {"perplexity": 9.0}}, method="original", bits=16, average_bits=16.0, num_bytes=1)
    assert (row.kl_mean, row.kl_worst, row.top1_agreement, row.router_agreement, row.exact_match) == (None,) * 5


def test_results_read_back_as_they_were_written(tmp_path: Path) -> None:
    rows = [ORIGINAL, quantized()]
    write_results(rows, tmp_path / "run")
    assert read_results(tmp_path / "run/results.json") == rows
    assert (tmp_path / "run/results.md").read_text() == markdown_table(rows)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["results.json", "results.md"]
    assert {"method", "bits", "average_bits", "bytes", "kl_mean", "kl_worst", "perplexity"} <= set(
        json.loads((tmp_path / "run/results.json").read_text())[0]
    )


def test_rows_of_another_version_are_refused(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text('[{"method": "RTN", "speed": 1}]')
    with pytest.raises(ValueError, match=r"unknown fields \['speed'\]"):
        read_results(tmp_path / "results.json")


def test_the_table_lines_up_and_shows_every_domain() -> None:
    assert markdown_table([ORIGINAL, quantized()]).split("\n") == [
        "| method   | bits | avg bits |   MB | KL mean | KL worst | ppl prose | ppl python | top-1 % | router % | exact % | seconds |",  # noqa: E501
        "| -------- | ---: | -------: | ---: | ------: | -------: | --------: | ---------: | ------: | -------: | ------: | ------: |",  # noqa: E501
        "| original |   16 |    16.00 | 18.0 |       - |        - |     50.00 |      11.50 |       - |        - |    70.0 |       0 |",  # noqa: E501
        "| MoEQuant |    3 |     3.38 |  5.1 |  0.0250 |   0.0400 |     51.00 |      12.00 |    80.0 |     70.0 |    62.5 |      72 |",  # noqa: E501
        "",
    ]


def test_a_destroyed_model_does_not_widen_the_table() -> None:
    row = ResultRow("RTN", 2, 2.5, 1, perplexity={"prose": 3.2e11}, kl_mean=0.0)
    assert "| 3.20e+11 |" in markdown_table([row]).replace("  ", " ")
    assert " 0.0000 " in markdown_table([row])
