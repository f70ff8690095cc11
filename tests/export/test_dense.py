from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from moeq.disk.folder import check_integrity
from moeq.export.dense import write_dense
from moeq.export.finished import held
from tests.export.rounding import round_model
from tests.tiny import tiny_model, tiny_tokenizer


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_a_dense_export_opens_as_an_ordinary_model(family: str, tmp_path: Path) -> None:
    model = tiny_model(family, dtype=torch.bfloat16)
    if family != "gpt_oss":
        round_model(model)
    write_dense(held(model), tiny_tokenizer(), tmp_path / "dense")
    check_integrity(tmp_path / "dense")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    ours, theirs = model.state_dict(), reloaded.state_dict()
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert AutoTokenizer.from_pretrained(tmp_path / "dense")("a").input_ids == tiny_tokenizer()("a").input_ids


def test_an_existing_folder_is_replaced_only_when_told(tmp_path: Path) -> None:
    model = tiny_model("olmoe", num_hidden_layers=1)
    write_dense(held(model), None, tmp_path / "dense")
    (tmp_path / "dense" / "mine.txt").write_text("kept")
    with pytest.raises(ValueError, match="exists and is not empty"):
        write_dense(held(model), None, tmp_path / "dense")
    assert (tmp_path / "dense" / "mine.txt").exists()
    write_dense(held(model), None, tmp_path / "dense", overwrite=True)
    assert not (tmp_path / "dense" / "mine.txt").exists()
