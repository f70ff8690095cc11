"""Sources with Python code of their own: where it may run, it travels into exports and reads them back."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import moeq.export.reopen
from moeq.checkpoint.loading import load_model
from moeq.checkpoint.model_class import runs_code
from moeq.export.contents import empty_model
from moeq.export.moeq_format import read_quantized
from tests.test_main import fit, validate
from tests.tiny import save_tiny, tiny_model

RTN = Path("configs/rtn_w3.yaml")
# Logits are twice those of the family, so that whoever runs its own class in the place of this one is found out.
MODEL = """
from transformers import Qwen2MoeForCausalLM
{config_import}

class OwnModel(Qwen2MoeForCausalLM):
    config_class = {config}

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = 2 * out.logits
        return out
"""
CONFIG = """
from transformers import Qwen2MoeConfig


class OwnConfig(Qwen2MoeConfig):
    model_type = "own_moe"
"""


def with_code(folder: Path, *, own_type: bool) -> Path:
    """A tiny model with a modeling file; or also with a type of its own, whose experts lie fused in its files."""
    save_tiny("qwen2_moe", folder)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_own.OwnModel"}
    config["architectures"] = ["OwnModel"]
    if own_type:
        config["auto_map"]["AutoConfig"] = "configuration_own.OwnConfig"
        config["model_type"] = "own_moe"
        what = {"config": "OwnConfig", "config_import": "from .configuration_own import OwnConfig"}
        (folder / "configuration_own.py").write_text(CONFIG)
        state = tiny_model("qwen2_moe", dtype=torch.bfloat16).state_dict()
        save_file(state, folder / "model.safetensors", {"format": "pt"})
    else:
        what = {"config": "Qwen2MoeConfig", "config_import": "from transformers import Qwen2MoeConfig"}
    (folder / "modeling_own.py").write_text(MODEL.format(**what))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _logits(folder: Path) -> torch.Tensor:
    ids_BT = torch.arange(40).reshape(2, 20)
    logits: torch.Tensor = load_model(str(folder), trust_remote_code=True)(input_ids=ids_BT).logits
    return logits


@pytest.mark.parametrize("own_type", [False, True])
def test_a_folder_without_values_is_made_by_its_code_where_that_may_run(own_type: bool, tmp_path: Path) -> None:
    model = load_model(str(with_code(tmp_path / "model", own_type=own_type)), trust_remote_code=True)
    empty, _ = empty_model(tmp_path / "model", trust_remote_code=True)
    assert type(model).__name__ == type(empty).__name__ == "OwnModel"
    assert runs_code(model)
    assert not runs_code(tiny_model("qwen2_moe"))
    assert empty.state_dict().keys() == model.state_dict().keys()


@pytest.mark.slow
@pytest.mark.parametrize(("own_type", "placement", "whole"), [(False, "stream", True), (True, "memory", False)])
def test_code_that_was_allowed_travels_with_the_exports_and_reads_them_back(
    own_type: bool, placement: str, whole: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not whole:
        monkeypatch.setattr(moeq.export.reopen, "WHOLE_BYTES", 0)
    model, run = with_code(tmp_path / "model", own_type=own_type), tmp_path / "run"
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 9)
    fit(RTN, model, run, f"--data.path={text}", "--model.trust_remote_code=true", f"--model.placement={placement}")
    for name in ("export", "dense"):
        assert {path.name for path in model.glob("*.py")} == {path.name for path in (run / name).glob("*.py")}
        for path in model.glob("*.py"):
            assert (run / name / path.name).read_bytes() == path.read_bytes()
        assert 'from_pretrained("' + name + '", trust_remote_code=True)' in (run / name / "README.md").read_text()
    ours, theirs = _logits(run / "export"), _logits(run / "dense")
    assert torch.equal(ours, theirs)
    assert len(read_quantized(run / "export", trust_remote_code=True)) == 62
    if not own_type:  # transformers takes the family's own class where the code may not run
        plain = load_model(str(run / "dense"))
        assert torch.equal(2 * plain(input_ids=torch.arange(40).reshape(2, 20)).logits, theirs)
        return
    domain = ["--data.tasks=null", f"--data.data_dir={tmp_path}", "--data.domains={text: text.txt}"]
    options = [*domain, "--data.window_length=64", f"--model.reference={model}", "--model.trust_remote_code=true"]
    results = validate(Path("configs/eval.yaml"), run / "export", tmp_path / "evaluated", *options)
    assert results["tasks"][0]["metrics"]["kl"]["value"] > 0
    with pytest.raises(SystemExit, match=r"needs Python code .*--model\.trust_remote_code true"):
        validate(Path("configs/eval.yaml"), run / "export", tmp_path / "refused", *domain, "--model.reference=null")
