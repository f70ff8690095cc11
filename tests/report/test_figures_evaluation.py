"""Figures of an evaluation: a bar for every metric, nothing cut, scales apart."""

import dataclasses
import math

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from moeq.report.figures_evaluation import group_bars, task_bars
from moeq.report.task_report import TaskReport
from moeq.tasks.metrics import Measurement
from tests.reports import description, hellaswag, mmlu, wikitext


def named(report: TaskReport, name: str) -> TaskReport:
    return dataclasses.replace(report, name=name)


def sixteen() -> list[TaskReport]:
    return [*(named(hellaswag(), f"choices_{i}") for i in range(13)), wikitext(), named(wikitext(), "c4"), mmlu(57)]


def widths(axes) -> list[float]:  # noqa: ANN001
    return [bar.get_width() for bar in axes.patches]


def test_metrics_of_different_scales_have_panels_of_their_own() -> None:
    panels = {axes.get_title(): axes for axes in task_bars([hellaswag(), wikitext()]).axes if axes.get_title()}
    assert list(panels) == [
        "accuracy, %", "perplexity", "KL divergence to the original, nats", "agreement with the original, %"
    ]  # fmt: skip
    assert widths(panels["accuracy, %"]) == pytest.approx([57.14, 76.02])
    assert widths(panels["perplexity"]) == pytest.approx([5.8432])
    assert widths(panels["agreement with the original, %"]) == pytest.approx([95.1, 90.0])


def test_error_bars_are_one_standard_error_and_chance_is_drawn() -> None:
    (axes,) = [axes for axes in task_bars([hellaswag()]).axes if axes.get_title()]
    *errors, chance = [collection.get_segments()[0] for collection in axes.collections]
    (low, _), (high, _) = errors[0]
    acc = hellaswag().of_task["acc"]
    assert ((low + high) / 2, (high - low) / 2) == (pytest.approx(100 * acc.value), pytest.approx(100 * acc.stderr))
    assert [x for x, _ in chance] == [25.0, 25.0]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["chance", "acc", "acc_norm"]


def test_partial_tasks_are_marked() -> None:
    (axes, *_) = task_bars([hellaswag(partial="num_documents")]).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["hellaswag (partial)"]


def test_a_hopeless_model_is_drawn_on_a_logarithmic_scale_and_an_infinite_one_not_at_all() -> None:
    reports = [
        TaskReport(name, "Windows", {"perplexity": "perplexity"}, {"": {"perplexity": measured}}, (), description())
        for name, measured in {
            "good": Measurement(5.0, 0.1, 9, 9.0), "bad": Measurement(1e9, 1e8, 9, 9.0),
            "worst": Measurement(math.inf, math.inf, 9, 9.0),
        }.items()
    ]  # fmt: skip
    axes = task_bars(reports).axes[0]
    assert axes.get_xscale() == "log"
    assert len(widths(axes)) == 2
    assert task_bars(reports[2:]) is None


@pytest.mark.parametrize("reports", [[hellaswag()], [wikitext(), mmlu(3)], sixteen()], ids=["1", "2", "16"])
def test_nothing_is_cut_and_no_figure_is_a_tower(reports: list[TaskReport]) -> None:
    figure = task_bars(reports)
    FigureCanvasAgg(figure).draw()
    width, height = figure.get_size_inches()
    for axes in figure.axes:
        box = axes.get_tightbbox().transformed(figure.dpi_scale_trans.inverted())
        assert box.x0 >= -0.01
        assert box.y0 >= -0.01
        assert box.x1 <= width + 0.01
        assert box.y1 <= height + 0.01
    assert height <= max(9.0, width)


def test_57_subjects_have_a_bar_each_coloured_by_category() -> None:
    axes = group_bars(mmlu(57)).axes[0]
    assert len(widths(axes)) == 57
    assert len({bar.get_facecolor() for bar in axes.patches}) == 4
    assert len({label.get_text() for label in axes.get_yticklabels()}) == 57
    assert axes.get_title() == "mmlu: acc, %"


def test_a_task_without_groups_or_accuracy_has_no_bars_of_groups() -> None:
    assert group_bars(hellaswag()) is None
    assert group_bars(wikitext()) is None
