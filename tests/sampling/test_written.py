"""Sequences for tuning are text of the model, drawn alike each time, and other than a calibration set's."""

from pathlib import Path

import torch

from moeq.models.adapter import Adapter
from moeq.sampling.written import agreed_writer, plain_spec, write_sequences
from tests.tiny import tiny_model, tiny_tokenizer


def drawn(folder: Path, seed: int) -> torch.Tensor:
    adapter, device = Adapter(tiny_model("qwen2_moe")), torch.device("cpu")
    spec = plain_spec(6, 12, seed)
    assert agreed_writer(adapter, device, 4, 12, 1) == "original"
    return write_sequences(
        adapter, tiny_tokenizer(), spec, "original", 4, folder / str(seed), device, (0, 1), lambda: None
    )


def test_they_follow_from_the_seed_and_are_all_different(tmp_path: Path) -> None:
    first = drawn(tmp_path / "one", 0)
    assert first.shape == (6, 12)
    assert len(first.unique(dim=0)) == 6
    assert torch.equal(drawn(tmp_path / "two", 0), first)
    assert not torch.equal(drawn(tmp_path / "one", 1), first)
