"""Tables of tasks: exact text, in percent where it is a share, and nothing partial without its mark."""

import dataclasses

from moeq.report.task_report import TaskReport, task_scalars
from moeq.report.task_tables import group_table, markdown_details, markdown_tasks, notes
from moeq.tasks.metrics import Measurement
from tests.reports import description, hellaswag, mmlu, share, wikitext

TASKS = """\
| task      | metric             |            value |     n | shots | split      | notes       |
| --------- | ------------------ | ---------------: | ----: | ----: | ---------- | ----------- |
| hellaswag | acc %              |    57.14 +- 0.49 | 10042 |     0 | validation | chance 25.0 |
| hellaswag | acc_norm %         |    76.02 +- 0.43 | 10042 |       |            |             |
| wikitext2 | perplexity         |   5.843 +- 0.041 |   164 |     0 | test       |             |
| wikitext2 | kl                 | 0.0123 +- 0.0002 |   164 |       |            |             |
| wikitext2 | top1_agreement %   |    95.10 +- 0.11 |   164 |       |            |             |
| wikitext2 | router_agreement % |    90.00 +- 0.20 |   164 |       |            |             |
"""
CATEGORIES = """\
| task                   | metric           |         value |   n | shots | split | notes       |
| ---------------------- | ---------------- | ------------: | --: | ----: | ----- | ----------- |
| mmlu                   | acc %            | 60.46 +- 2.83 | 300 |     5 | test  | chance 25.0 |
| mmlu                   | acc_by_subject % | 60.46 +- 2.76 | 300 |       |       |             |
| mmlu / humanities      | acc %            | 70.67 +- 4.58 | 100 |       |       |             |
| mmlu / social_sciences | acc %            | 65.48 +- 4.78 | 100 |       |       |             |
| mmlu / stem            | acc %            | 45.23 +- 5.00 | 100 |       |       |             |
"""
SUBJECTS = """\
## mmlu by group

| category        | group     |   n |         acc % |
| --------------- | --------- | --: | ------------: |
| humanities      | subject_1 | 100 | 70.67 +- 4.58 |
| social_sciences | subject_2 | 100 | 65.48 +- 4.78 |
| stem            | subject_0 | 100 | 45.23 +- 5.00 |
"""


def test_every_metric_has_a_row_with_its_standard_error() -> None:
    assert markdown_tasks([hellaswag(), wikitext()]) == TASKS


def test_categories_stand_below_their_task_and_subjects_in_a_table_of_their_own() -> None:
    assert markdown_tasks([mmlu(3)]) == CATEGORIES
    assert markdown_details([mmlu(3)]).endswith(SUBJECTS)


def test_all_57_subjects_have_a_row_and_those_without_a_document_none() -> None:
    report = mmlu(57)
    assert len(group_table(report)[1]) == 57
    measured = {group: found for group, found in report.measurements.items() if group != "subject_0"}
    assert len(group_table(dataclasses.replace(report, measurements=measured))[1]) == 56


def test_groups_of_one_level_have_no_category() -> None:
    measured = {"": {"acc": share(0.5, 20)}, "easy": {"acc": share(0.9, 10)}, "hard": {"acc": share(0.1, 10)}}
    report = TaskReport("t", "MultipleChoice", {"acc": "mean"}, measured, (("easy",), ("hard",)), description())
    assert group_table(report) == (
        ("group", "n", "acc %"), [("easy", "10", "90.00 +- 10.00"), ("hard", "10", "10.00 +- 10.00")]
    )  # fmt: skip
    assert "t / " not in markdown_tasks([report])


def test_what_one_has_to_know_is_noted() -> None:
    assert notes(description()) == ""
    described = description(
        num_documents=100, partial="limit_val_batches", num_truncated=3, chance=0.5,
        fallbacks={"no end-of-text token": 2}, protections=["time", "memory", "no network"],
        num_tokens_cut=70, num_resumed=40, notes=["records of another model were left alone"],
    )  # fmt: skip
    assert notes(described) == (
        "partial: 100 of 10042 (limit_val_batches); chance 50.0; 3 truncated by 70 tokens in all; "
        "40 from an earlier run; 2 x no end-of-text token; code run with 3 protections; "
        "records of another model were left alone"
    )


def test_a_partial_task_says_so_in_both_tables() -> None:
    report = hellaswag(num_documents=100, partial="num_documents")
    assert "| partial: 100 of 10042 (num_documents); chance 25.0 |" in markdown_tasks([report])
    assert "| 100 of 10042 |" in markdown_details([report])


def test_speed_counts_what_this_run_evaluated() -> None:
    assert hellaswag(num_documents=100, num_resumed=60, seconds=8.0).documents_per_second == 5
    for nothing_ran in ({"num_documents": 100, "num_resumed": 100}, {"seconds": 0.0}):
        report = hellaswag(**nothing_ran)
        assert report.documents_per_second is None
        assert " - | data/" in markdown_details([report])


def test_digits_follow_the_metric_and_an_unknown_error_is_left_out() -> None:
    measured = {
        "word_perplexity": Measurement(12.3456, 0.5, 9, 900.0), "byte_perplexity": Measurement(1.61234, 0.01, 9, 4e3),
        "bits_per_byte": Measurement(0.68912, 0.012, 9, 4000.0), "acc": Measurement(1.0, None, 1, 1.0),
    }  # fmt: skip
    kinds = {"word_perplexity": "perplexity", "byte_perplexity": "perplexity", "bits_per_byte": "bits", "acc": "mean"}
    report = TaskReport("t", "Rolling", kinds, {"": measured}, (), description())  # type: ignore[arg-type]
    values = [line.split("|")[3].strip() for line in markdown_tasks([report]).splitlines()[2:]]
    assert values == ["12.35 +- 0.50", "1.612 +- 0.010", "0.6891 +- 0.0120", "100.00"]


def test_scalars_name_task_group_and_metric() -> None:
    found = task_scalars([hellaswag(), mmlu(1)])
    assert found["hellaswag/acc"] == 0.5714
    assert found["hellaswag/acc_stderr"] == share(0.5714).stderr
    assert set(found) >= {"mmlu/acc", "mmlu/acc_by_subject", "mmlu/stem/acc", "mmlu/subject_0/acc_stderr"}
