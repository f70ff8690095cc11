"""Figures from plain data, and the callback that puts them in the run folder and in TensorBoard."""

import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from callbacks.figures import Figures
from moeq.report.figures_fit import bits_map, error_by_block, usage_heatmap


def usage(blocks: int, experts: int) -> dict[str, torch.Tensor]:
    return {f"model.layers.{b}.mlp.experts": torch.arange(experts) * (b + 1) for b in range(blocks)}


def errors(blocks: int, experts: int) -> list[dict[str, Any]]:
    rng = random.Random(0)
    paths = ["self_attn.q_proj", "self_attn.o_proj", "mlp.shared_expert.up_proj"]
    paths += [f"mlp.experts.{e}.{leaf}" for e in range(experts) for leaf in ("gate_proj", "up_proj", "down_proj")]
    return [
        {
            "weight": f"model.layers.{block}.{path}", "block": block, "linear": path.rpartition(".")[2],
            "bits": 2 + (block + len(path)) % 3, "relative_error": rng.random(),
        }
        for block in range(blocks)
        for path in paths
    ]  # fmt: skip


def test_heatmap_shows_the_share_of_every_expert() -> None:
    axes, bar = usage_heatmap(usage(3, 4)).axes
    shares = axes.images[0].get_array()
    assert shares.shape == (3, 4)
    assert shares[2].tolist() == pytest.approx([0.0, 100 / 6, 200 / 6, 50.0])
    assert "even: 25%" in axes.get_title()
    assert bar.get_ylabel() == "% of routed tokens"
    assert len(axes.collections[0].get_offsets()) == 3  # expert 0 is crossed in each block


def test_blocks_are_in_their_order_and_may_differ_in_experts() -> None:
    counts = {
        "model.layers.10.mlp.experts": torch.tensor([1, 1]),
        "model.layers.2.mlp.experts": torch.tensor([1, 1, 2]),
    }
    axes = usage_heatmap(counts).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["2", "10"]
    assert axes.images[0].get_array()[1].tolist()[:2] == [50.0, 50.0]
    assert axes.images[0].get_array().mask[1, 2]


def test_small_grids_are_written_out_and_large_ones_are_not() -> None:
    counts = {"model.layers.0.mlp.experts": torch.tensor([0, 1000]), "model.layers.1.mlp.experts": torch.tensor([1, 2])}
    assert [text.get_text() for text in usage_heatmap(counts).axes[0].texts] == ["100", "33", "67"]
    assert not usage_heatmap(usage(16, 17)).axes[0].texts


def test_a_large_model_has_no_more_ticks_than_can_be_read() -> None:
    axes = usage_heatmap(usage(48, 128)).axes[0]
    assert len(axes.get_xticks()) == 32
    assert len(axes.get_yticks()) == 24


def test_error_lines_go_through_the_means_over_experts() -> None:
    rows = errors(3, 5)
    axes = error_by_block(rows).axes[0]
    lines = {line.get_label(): line for line in axes.get_lines()}
    assert list(lines) == [
        "self_attn.q_proj", "self_attn.o_proj", "shared_expert.up_proj",
        "experts.gate_proj", "experts.up_proj", "experts.down_proj",
    ]  # fmt: skip
    of_block_1 = [
        row["relative_error"] for row in rows if ".1.mlp.experts" in row["weight"] and row["linear"] == "up_proj"
    ]
    assert lines["experts.up_proj"].get_ydata()[1] == pytest.approx(sum(of_block_1) / 5)


def test_bits_map_has_a_cell_for_every_block_expert_and_linear() -> None:
    rows = errors(2, 3)
    panels = {axes.get_title(): axes for axes in bits_map(rows).axes if axes.images and axes.get_title()}
    assert list(panels) == ["other linears", "experts.gate_proj", "experts.up_proj", "experts.down_proj"]
    columns = {title: [label.get_text() for label in axes.get_xticklabels()] for title, axes in panels.items()}
    assert columns["other linears"] == ["self_attn.q_proj", "self_attn.o_proj", "shared_expert.up_proj"]
    assert columns["experts.up_proj"] == ["0", "1", "2"]
    drawn = 0
    for row in rows:
        leaf, expert = row["linear"], row["weight"].partition(".experts.")[2].partition(".")[0]
        title = f"experts.{leaf}" if expert else "other linears"
        column = columns[title].index(expert or ".".join(row["weight"].split(".")[-2:]))
        assert panels[title].images[0].get_array()[row["block"], column] == row["bits"]
        drawn += 1
    assert drawn == sum(axes.images[0].get_array().count() for axes in panels.values())


@pytest.mark.parametrize("recorded", [{"usage": usage(2, 4), "errors": errors(2, 4)}, {"usage": {}, "errors": []}])
def test_callback_writes_pictures_and_events(tmp_path: Path, recorded: dict[str, Any]) -> None:
    loggers = [TensorBoardLogger(tmp_path / "tensorboard"), CSVLogger(tmp_path / "csv")]
    trainer = SimpleNamespace(is_global_zero=True, loggers=loggers, current_epoch=3)
    module = SimpleNamespace(run=SimpleNamespace(**recorded), run_dir=tmp_path)
    Figures().on_fit_end(trainer, module)
    loggers[0].experiment.close()
    names = ["bits_map", "error_by_block", "expert_usage"] if recorded["usage"] else []
    assert sorted(path.stem for path in tmp_path.glob("figures/*.png")) == names
    events = b"".join(path.read_bytes() for path in (tmp_path / "tensorboard").rglob("events.*"))
    assert [name for name in names if f"figures/{name}".encode() in events] == names


def test_other_ranks_draw_nothing(tmp_path: Path) -> None:
    module = SimpleNamespace(run=SimpleNamespace(usage=usage(2, 4), errors=[]), run_dir=tmp_path)
    Figures().on_fit_end(SimpleNamespace(is_global_zero=False), module)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_drawing_module_does_not_import_matplotlib() -> None:
    code = "import sys, moeq.report.figures_fit; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
