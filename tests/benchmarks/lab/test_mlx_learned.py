"""mlx-lm's learned folders: sizes as without learning, products as mlx-lm's own, and less divergence."""

from pathlib import Path

import numpy as np
import pytest
import torch

from moeq.checkpoint.loading import load_model
from tests.tiny import save_tiny

mx = pytest.importorskip("mlx.core", reason="MLX has no build for this system")
pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")

from benchmarks.lab.files import tensor_bytes  # noqa: E402
from benchmarks.lab.mlx_learned import Dequantized, write_dwq, write_gptq  # noqa: E402
from benchmarks.studies.mlx import is_quantized, logits_of, write_dense, write_mlx_lm  # noqa: E402

IDS = torch.randint(0, 64, (8, 32), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    save_tiny("qwen2_moe", tmp_path / "source", hidden_size=64, moe_intermediate_size=64)
    write_dense(load_model(str(tmp_path / "source")), tmp_path / "source", tmp_path / "dense")
    return tmp_path / "dense"


def divergence(folder: Path, dense: Path) -> float:
    original, found = logits_of(dense), logits_of(folder)
    total = 0.0
    for ids_L in IDS:
        p, q = (torch.log_softmax(logits(ids_L).double(), -1) for logits in (original, found))
        total += float((p.exp() * (p - q)).sum(-1).mean())
    return total


def test_products_with_dequantized_weights_are_those_with_packed_ones() -> None:
    import mlx.nn as nn
    from mlx_lm.models.switch_layers import SwitchLinear

    mx.set_default_device(mx.cpu)
    x, indices = mx.random.normal((6, 1, 64)), mx.array([0, 1, 2, 0, 1, 2])
    for layer, more in ((nn.Linear(64, 32), ()), (SwitchLinear(64, 32, 3, bias=False), (indices,))):
        packed = layer.to_quantized(group_size=32, bits=3)
        same = np.allclose(np.array(packed(x, *more)), np.array(Dequantized(packed)(x, *more)), atol=1e-5)
        assert same, type(layer)


@pytest.mark.slow
def test_learning_and_gptq_keep_the_size_and_diverge_less_than_rounding(dense: Path, tmp_path: Path) -> None:
    write_mlx_lm(dense, tmp_path / "rounded", "2 bits")
    write_dwq(dense, tmp_path / "learned", 2, 64, IDS, 8, 1e-3, is_quantized)
    write_gptq(dense, tmp_path / "solved", 2, 64, IDS, is_quantized)
    rounded = divergence(tmp_path / "rounded", dense)
    for name in ("learned", "solved"):
        assert tensor_bytes(tmp_path / name) == tensor_bytes(tmp_path / "rounded")
        assert divergence(tmp_path / name, dense) < 0.9 * rounded, name
