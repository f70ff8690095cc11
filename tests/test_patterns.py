"""Weights that patterns keep leave a run as they came, those with grids of their own on these; in every method."""

import csv
import json
import re
import shutil
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from moeq.export.moeq_format import read_quantized
from tests.test_main import fit
from tests.tiny import save_tiny

PATTERNS: list[dict[str, Any]] = [
    {"pattern": "*.mlp.shared_expert.*", "bits": 8},
    {"pattern": "*.experts.*.down_proj", "group_size": 32},
    {"pattern": "model.layers.0.self_attn.[qo]_proj", "keep": True},
    {"pattern": "model.layers.1.mlp.experts.3.*", "keep": True},
    {"pattern": "model.layers.0.mlp.experts.5.up_proj", "keep": True},
]
KEPT = [each["pattern"] for each in PATTERNS if each.get("keep")]
SLOW = ["gptq_text_w3", "moequant_awq_w4", "moequant_learned_w3", "moequant_rotated_w4", "moequant_allocated_w3"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("qwen2_moe", tmp_path_factory.mktemp("model") / "model")


def with_patterns(name: str, folder: Path, patterns: list[dict[str, Any]], **options: Any) -> Path:
    """A configuration whose BitAllocation has patterns."""
    config = yaml.safe_load(Path(f"configs/{name}.yaml").read_text())
    steps = config["trainer"]["callbacks"]
    for step in steps:
        if step["class_path"] in options:
            step.setdefault("init_args", {}).update(options[step["class_path"]])
    allocation = next(step for step in steps if step["class_path"] == "BitAllocation")
    allocation.setdefault("init_args", {})["patterns"] = patterns
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def is_kept(name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in KEPT)


@pytest.mark.parametrize("name", ["rtn_w3", *(pytest.param(each, marks=pytest.mark.slow) for each in SLOW)])
def test_kept_weights_have_the_bytes_of_the_source_and_others_the_grids_they_were_given(
    name: str, model: Path, tmp_path: Path
) -> None:
    choices = {"choices": ["2g16", "2g32", "4g16", "4g32"]}
    options = {"Survey": choices, "BitAllocation": choices | {"budget": 4.0}} if "allocated" in name else {}
    fit(with_patterns(name, tmp_path, PATTERNS, **options), model, tmp_path / "run")
    source = load_file(model / "model.safetensors")
    names = [key.removesuffix(".weight") for key in source if re.search(r"(_proj)\.weight$", key)]
    packed = read_quantized(tmp_path / "run/export")
    assert packed.keys() == {weight for weight in names if not is_kept(weight)}
    for weight, codes in packed.items():
        if ".shared_expert." in weight:
            assert codes.bits == 8, weight
        assert codes.group_size == (32 if fnmatchcase(weight, "*.experts.*.down_proj") else 16) or (
            "allocated" in name
        ), weight
    folders = [folder for folder in ("export", "dense") if (tmp_path / "run" / folder).is_dir()]
    for folder in folders:
        written = load_file(tmp_path / "run" / folder / "model.safetensors")
        for weight in filter(is_kept, names) if "rotated" not in name else ():
            assert torch.equal(written[f"{weight}.weight"], source[f"{weight}.weight"]), weight
    plan = json.loads((tmp_path / "run/allocation.json").read_text())
    assert set(plan["kept"]) == set(filter(is_kept, names))
    with (tmp_path / "run/errors.csv").open() as file:
        assert {row["weight"] for row in csv.DictReader(file)} == packed.keys()
    assert "6 of 62 weights are kept as they are" in (tmp_path / "run/allocation.md").read_text()


@pytest.mark.slow
def test_a_block_that_is_kept_whole_is_finished_like_others_and_resumed_past(model: Path, tmp_path: Path) -> None:
    config = with_patterns("gptq_text_w3", tmp_path, [{"pattern": "model.layers.0.*", "keep": True}])
    fit(config, model, tmp_path / "whole")
    blocks = sorted(path.name for path in (tmp_path / "whole/blocks").iterdir())
    assert blocks == ["block_000.safetensors", "block_001.safetensors"]
    again = tmp_path / "again"
    shutil.copytree(tmp_path / "whole", again, ignore=shutil.ignore_patterns("export", "dense", "block_001*"))
    fit(config, model, again)
    weights = "export/model.safetensors"
    assert (again / weights).read_bytes() == (tmp_path / "whole" / weights).read_bytes()
    assert all(name.startswith("model.layers.1.") for name in read_quantized(again / "export"))


@pytest.mark.slow
def test_the_plan_of_a_run_with_kept_weights_is_one_for_the_next(model: Path, tmp_path: Path) -> None:
    fit(with_patterns("rtn_w3", tmp_path, PATTERNS), model, tmp_path / "first")
    config = yaml.safe_load(Path("configs/rtn_w3.yaml").read_text())
    plan = {"class_path": "BitAllocation", "init_args": {"plan": str(tmp_path / "first/allocation.json")}}
    steps = config["trainer"]["callbacks"]
    config["trainer"]["callbacks"] = [plan, *(s for s in steps if s["class_path"] != "BitAllocation")]
    (tmp_path / "rtn_again.yaml").write_text(yaml.safe_dump(config))
    fit(tmp_path / "rtn_again.yaml", model, tmp_path / "second")
    weights = "export/model.safetensors"
    assert (tmp_path / "second" / weights).read_bytes() == (tmp_path / "first" / weights).read_bytes()


def test_a_pattern_without_a_weight_is_refused_with_near_names(model: Path, tmp_path: Path) -> None:
    config = with_patterns("rtn_w3", tmp_path, [{"pattern": "*.self_atn.*", "bits": 8}])
    with pytest.raises(SystemExit, match=r"moeq: pattern '.*self_atn.*' matches none of the 62 weights .*near are mod"):
        fit(config, model, tmp_path / "run")
    assert not (tmp_path / "run").exists()
