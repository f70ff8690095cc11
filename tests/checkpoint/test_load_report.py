"""Only a report of keys that the model does not have is left out."""

from logging import WARNING
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from moeq.checkpoint.load_report import without_unexpected_keys
from tests.tiny import save_tiny


@pytest.fixture
def reports(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What transformers logs as a warning, shown or not."""
    texts: list[str] = []
    logger = logging.get_logger("transformers.modeling_utils")
    monkeypatch.setattr(logger, "isEnabledFor", lambda level: level >= WARNING)
    monkeypatch.setattr(logger, "callHandlers", lambda record: texts.append(record.getMessage()))
    return texts


def with_key(folder: Path, *, without: str = "") -> Path:
    save_tiny("qwen2_moe", folder)
    found = load_file(folder / "model.safetensors")
    found.pop(without, None)
    save_file(found | {"mtp.weight": torch.ones(2)}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_keys_that_the_model_does_not_have_are_not_reported_within(tmp_path: Path, reports: list[str]) -> None:
    folder = with_key(tmp_path)
    with without_unexpected_keys():
        AutoModelForCausalLM.from_pretrained(folder)
    assert reports == []
    AutoModelForCausalLM.from_pretrained(folder)
    (report,) = reports
    assert "mtp.weight" in report


def test_a_report_of_missing_keys_is_logged_whole(tmp_path: Path, reports: list[str]) -> None:
    folder = with_key(tmp_path, without="model.norm.weight")
    with without_unexpected_keys():
        AutoModelForCausalLM.from_pretrained(folder)
    (report,) = reports
    assert "model.norm.weight" in report
    assert "mtp.weight" in report
