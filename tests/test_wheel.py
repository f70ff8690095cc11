"""The wheel is the library alone, and opens an export where there is no checkout."""

import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import torch

from moeq.export.moeq_format import write_checkpoint
from tests.export.rounding import round_model
from tests.tiny import tiny_model, tiny_tokenizer

ROOT = Path(__file__).parents[1]
BUILD = "import sys; from setuptools.build_meta import build_wheel; print(build_wheel(sys.argv[1]))"
# Run with -I -S: neither the current folder nor an editable install of the checkout is on the path.
OPEN = """
import sys
library, packages, export, ids, answer = sys.argv[1:]
sys.path = [library, *sys.path, *packages.split(":")]
import importlib.metadata, importlib.util
import torch
import moeq.checkpoint.quantizer
from transformers import AutoModelForCausalLM

assert moeq.checkpoint.quantizer.__file__.startswith(library), moeq.checkpoint.quantizer.__file__
assert not any(map(importlib.util.find_spec, ("callbacks", "datamodules", "main", "tests")))
torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained(export).eval()
for parameter in model.parameters():
    parameter.data = parameter.data.clone()  # out of the memory-mapped file, into aligned memory
with torch.no_grad():
    torch.save((importlib.metadata.version("moeq"), model(input_ids=torch.load(ids)).logits), answer)
"""


def python(*args: object, cwd: Path) -> str:
    done = subprocess.run([sys.executable, *map(str, args)], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the checkout, since building leaves files beside pyproject.toml."""
    source, folder = tmp_path_factory.mktemp("wheel") / "source", tmp_path_factory.mktemp("wheel")
    source.mkdir()
    for name in ("moeq", "callbacks", "datamodules", "tests"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "main.py"):
        shutil.copy(ROOT / name, source)
    return folder / python("-c", BUILD, folder, cwd=source).splitlines()[-1]


def test_the_wheel_holds_the_library_whole_and_no_other_name(wheel: Path) -> None:
    files = {Path(name) for name in zipfile.ZipFile(wheel).namelist()}
    assert {path.parts[0] for path in files if not path.parts[0].endswith(".dist-info")} == {"moeq"}
    sources = {path.relative_to(ROOT) for path in (ROOT / "moeq").rglob("*.py")}
    assert {path for path in files if path.parts[0] == "moeq"} == sources


@pytest.mark.slow
def test_an_export_opens_with_the_wheel_and_no_checkout(wheel: Path, tmp_path: Path) -> None:
    model = tiny_model("qwen2_moe")
    write_checkpoint(model, tiny_tokenizer(), round_model(model), tmp_path / "export", metadata={})
    model.set_experts_implementation("eager")
    ids = torch.randint(0, 264, (2, 19))
    torch.save(ids, tmp_path / "ids.pt")
    zipfile.ZipFile(wheel).extractall(tmp_path / "library")
    packages = ":".join(dict.fromkeys(sysconfig.get_path(kind) for kind in ("purelib", "platlib")))
    paths = (tmp_path / name for name in ("export", "ids.pt", "answer.pt"))
    python("-I", "-S", "-c", OPEN, tmp_path / "library", packages, *paths, cwd=tmp_path)
    version, logits = torch.load(tmp_path / "answer.pt")
    assert f"-{version}-" in wheel.name
    assert torch.equal(logits, model(input_ids=ids).logits)
