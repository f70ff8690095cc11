"""Which folders the study of compressed-tensors asks for, and whose values it measures."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from benchmarks.lab.files import MODELS
from benchmarks.peers.dense import QUANTIZED
from benchmarks.studies.compressed_tensors import CompressedTensors
from benchmarks.studies.compressed_tensors import write_values as write
from benchmarks.studies.compressed_tensors_arms import (
    BEST,
    BUDGETS,
    GROUPS,
    OWN,
    OWN_BEST,
    OWN_LEARNED,
    THEIRS,
    steps_of,
)
from callbacks.kronecker_factors import KroneckerFactors
from moeq.checkpoint.loading import load_model
from moeq.formats.convert import convert
from tests.formats.packed import GRIDS, Tiny, config_of, logits_of, tensors_of, write_tiny_packed


def study(*args: str) -> CompressedTensors:
    return CompressedTensors(CompressedTensors.parser().parse_args(args))


def cases(*args: str) -> Counter[tuple[str, str]]:
    return Counter((case.quantizer, case.kind) for case in study(*args).cases())


def test_what_uses_data_comes_for_every_seed_and_rounding_to_nearest_once() -> None:
    found = cases("--llmcompressor", "python")
    uniform = [f"W4 g{group}" for group in GROUPS]
    assert found == {
        **{(name, kind): 1 if "RTN" in name else 3 for name in THEIRS for kind in uniform},
        **{(OWN, kind): 3 for kind in (*uniform, *(f"{budget:g}" for budget in BUDGETS))},
        (OWN_LEARNED, "W4 g64"): 3, (OWN_LEARNED, "4.25"): 3,
        **{(OWN_BEST, f"{budget:g}"): 3 for budget in BEST},
    }  # fmt: skip
    assert not any(name in THEIRS for name, _ in cases())


def test_rows_of_a_model_have_a_folder_of_their_own_and_say_whose_they_are() -> None:
    first, second = study("--folder", "rows"), study("--folder", "rows", "--label", "Mixtral")
    assert (first.options.folder, second.options.folder) == (Path("rows/reference"), Path("rows/Mixtral"))
    assert MODELS["reference"] in first.legend
    assert MODELS["Mixtral"] in second.legend


@pytest.mark.parametrize("kind", ["W4 g32", "4.125"])
def test_each_quantizer_of_moeq_has_the_steps_of_the_one_before_and_one_more(kind: str) -> None:
    names = {
        quantizer: [type(step).__name__ for step in steps_of(quantizer, kind, 2, Path("rows"))[0]]
        for quantizer in (OWN, OWN_LEARNED, OWN_BEST)
    }
    assert names[OWN_BEST][0] == "KroneckerFactors"  # behind other steps, their settings would tell factors apart
    assert names[OWN_LEARNED] == [*names[OWN], "LearnedRounding"]
    assert names[OWN_BEST][1:] == names[OWN_LEARNED]
    (factors, *_), settings = steps_of(OWN_BEST, kind, 2, Path("rows"))
    assert isinstance(factors, KroneckerFactors)
    assert (factors.folder, factors.spec.seed) == ("rows/factors", 2)
    assert settings["group_size"] == (32 if kind == "W4 g32" else 64)


@pytest.fixture(scope="module", params=["qwen2_moe", "mixtral"])
def folder_and_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tiny]:
    """The folders "source" and "ct", of one scheme, and the model with the values of the second."""
    folder = tmp_path_factory.mktemp(request.param)
    made = write_tiny_packed(request.param, folder, GRIDS["3 bits"])
    convert(made.folder, "compressed-tensors", folder / "ct")
    return folder, made


def test_values_are_those_of_the_folder(folder_and_model: tuple[Path, Tiny], tmp_path: Path) -> None:
    folder, made = folder_and_model
    opened = load_model(str(write(folder / "ct", folder / "source", tmp_path / "values")), "auto")
    assert torch.equal(logits_of(opened), logits_of(made.model))


def test_values_are_what_the_configuration_says_of_each_weight(tmp_path: Path) -> None:
    made = write_tiny_packed("qwen2_moe", tmp_path, GRIDS["mixed"])
    convert(made.folder, "compressed-tensors", tmp_path / "ct")
    opened = load_model(str(write(tmp_path / "ct", tmp_path / "source", tmp_path / "values")), "auto")
    assert torch.equal(logits_of(opened), logits_of(made.model))


def test_sizes_are_divided_by_the_weights_that_moeq_quantizes(folder_and_model: tuple[Path, Tiny]) -> None:
    folder, made = folder_and_model
    packed = [key.removesuffix("_packed") for key in tensors_of(folder / "ct") if key.endswith("_packed")]
    assert sorted(filter(QUANTIZED.fullmatch, tensors_of(folder / "source"))) == sorted(packed)
    assert len(packed) == len(made.quantized)


@pytest.mark.parametrize("folder_and_model", ["mixtral"], indirect=True)
def test_values_are_found_under_the_names_that_llm_compressor_gives_to_experts_of_mixtral(
    folder_and_model: tuple[Path, Tiny], tmp_path: Path
) -> None:
    folder, made = folder_and_model
    tensors, renamed = tensors_of(folder / "ct"), tmp_path / "renamed"
    for theirs, mine in (("gate_proj", "w1"), ("down_proj", "w2"), ("up_proj", "w3")):
        tensors = {key.replace(f".{mine}.", f".{theirs}."): tensor for key, tensor in tensors.items()}
    renamed.mkdir()
    save_file(tensors, renamed / "model.safetensors")
    (renamed / "config.json").write_text(json.dumps(config_of(folder / "ct")))
    opened = load_model(str(write(renamed, folder / "source", tmp_path / "values")), "auto")
    assert torch.equal(logits_of(opened), logits_of(made.model))
    del tensors["model.layers.0.block_sparse_moe.experts.0.up_proj.weight_packed"]
    save_file(tensors, renamed / "model.safetensors")
    with pytest.raises(ValueError, match=r"weight_packed of model\.layers\.0\.block_sparse_moe\.experts\.0\.w3 is"):
        write(renamed, folder / "source", tmp_path / "none")
