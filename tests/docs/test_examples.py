"""The example callback of the README works as it stands there."""

import csv
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from docs.examples.absmax import absmax
from main import main
from moeq.quant.grid import dequantize
from moeq.quant.spec import GridSpec
from tests.tiny import save_tiny

ROOT = Path(__file__).parents[2]


def reference_absmax(weight_OI: torch.Tensor, bits: int, group_size: int, shrink: float) -> torch.Tensor:
    """One group at a time, one weight at a time."""
    top = 2 ** (bits - 1) - 1
    out = torch.empty_like(weight_OI)
    for o, row in enumerate(weight_OI.tolist()):
        for start in range(0, len(row), group_size):
            group = row[start : start + group_size]
            scale = shrink * max(abs(value) for value in group) / top
            for i, value in enumerate(group):
                out[o, start + i] = scale * min(max(round(value / scale), -top - 1), top)
    return out


@pytest.mark.parametrize("shrink", [1.0, 0.8])
def test_absmax_equals_a_loop_over_weights(generator: torch.Generator, shrink: float) -> None:
    weight_EOI = torch.randn(2, 3, 32, generator=generator)
    solution = absmax(weight_EOI, GridSpec(4, 16, symmetric=True), torch.float32, shrink)
    for e, weight_OI in enumerate(weight_EOI):
        expected_OI = reference_absmax(weight_OI, 4, 16, shrink)
        actual_OI = dequantize(solution.codes_EOI[e], solution.scale_EOG[e], None, 4)
        torch.testing.assert_close(actual_OI, expected_OI, rtol=1e-5, atol=1e-6)
        error = float((expected_OI - weight_OI).square().sum() / weight_OI.square().sum())
        assert float(solution.relative_error_E[e]) == pytest.approx(error, rel=1e-4)


def test_absmax_refuses_a_grid_with_zero_points() -> None:
    with pytest.raises(ValueError, match=r"symmetric \(false\)"):
        absmax(torch.ones(1, 2, 16), GridSpec(4, 16, symmetric=False), torch.float32)


def test_the_example_config_quantizes_exports_and_reloads(tmp_path: Path) -> None:
    model = save_tiny("qwen2_moe", tmp_path / "model")
    main(
        [
            "fit", "--config", str(ROOT / "docs/examples/absmax.yaml"), f"--model.name={model}",
            "--model.group_size=16",
            f"--trainer.default_root_dir={tmp_path / 'run'}", "--trainer.accelerator=cpu",
            "--trainer.enable_progress_bar=false",
        ]
    )  # fmt: skip
    with (tmp_path / "run/errors.csv").open() as file:
        errors = {row["weight"]: float(row["relative_error"]) for row in csv.DictReader(file)}
    assert "model.layers.1.mlp.experts.7.down_proj" in errors
    assert all(0 < error < 0.05 for error in errors.values())
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "run/export")
    assert reloaded(torch.arange(1, 9)[None]).logits.isfinite().all()


def test_the_readme_shows_the_example_as_it_is() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf8")
    code = (ROOT / "docs/examples/absmax.py").read_text(encoding="utf8")
    assert f"```python\n{code}```" in readme
