"""A packed export becomes one GGUF file: written whole, read back by gguf, equal weight by weight."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.runtimes.cells import OPTIONS
from moeq.disk.folder import MANIFEST
from moeq.export.compare import ExportMismatchError
from moeq.export.contents import read_contents
from moeq.export.finished import silent
from moeq.formats import gguf as module
from moeq.formats.convert import convert, proof
from moeq.formats.gguf import FORMAT, NAME
from moeq.formats.gguf_blocks import to_bytes
from moeq.formats.gguf_file import FileTensor, Whole64, read_file, write_file
from moeq.formats.source import PackedExport, open_packed
from moeq.quant.spec import QuantizedWeight
from tests.export.rounding import real_weight
from tests.formats.gguf_models import Grid, write_packed
from tests.formats.packed import tensors_of, write_tiny_packed


def grid_of(name: str) -> Grid | None:
    """3 bits for experts, 8 for attention, shared experts as they are."""
    if ".experts." in name:
        return (3, 32, False)
    return (8, None, True) if "self_attn" in name else None


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict, Path, Any]:
    folder = tmp_path_factory.mktemp("gguf")
    export, quantized = write_packed("deepseek_v3", folder, grid_of)
    report = convert(export, "gguf", folder / "gguf")
    return export, quantized, folder / "gguf", report


def values(path: Path) -> dict[str, Tensor]:
    """Every tensor of a file by the reader of the package alone."""
    return {
        tensor.name: torch.from_numpy(np.array(gguf.dequantize(tensor.data, tensor.tensor_type)))
        for tensor in gguf.GGUFReader(path).tensors
    }


def test_every_quantized_weight_is_in_the_file_bit_for_bit(written: tuple) -> None:
    _, quantized, folder, _ = written
    found = values(folder / NAME)
    for name, weight in quantized.items():
        block, leaf = name.split(".")[2], name.rpartition(".")[2]
        real = real_weight(weight)
        if ".experts." in name:
            ours = found[f"blk.{block}.ffn_{leaf.removesuffix('_proj')}_exps.weight"][int(name.split(".")[5])]
        elif leaf == "kv_b_proj":  # heads of 16 keys above 16 values; the keys' part is transposed
            heads = real.view(4, 32, 32)
            assert torch.equal(found[f"blk.{block}.attn_k_b.weight"].bfloat16(), heads[:, :16].mT)
            ours, real = found[f"blk.{block}.attn_v_b.weight"], heads[:, 16:]
        else:
            short = {"o_proj": "output", "q_a_proj": "q_a", "q_b_proj": "q_b", "kv_a_proj_with_mqa": "kv_a_mqa"}[leaf]
            ours = found[f"blk.{block}.attn_{short}.weight"]
        assert torch.equal(ours.bfloat16(), real), name


def test_the_report_says_what_is_in_the_file(written: tuple) -> None:
    _, quantized, folder, report = written
    assert report.num_quantized == len(quantized)
    assert report.largest_error == 0.0
    assert report.reader == "gguf 0.19.0"
    assert report.path == str(folder / NAME)
    assert report.num_bytes == (folder / NAME).stat().st_size
    # Experts (3 bits in Q4_0), attention without the keys' part of kv_b; shared, dense, head, keys' part as they were.
    assert report.types == {"Q4_0": 24, "Q8_0": 10, "BF16": 9}
    assert FORMAT.serve(folder) == f"llama-server -m {folder / NAME}"


def test_keys_describe_the_model_and_how_it_was_made(written: tuple) -> None:
    metadata, tensors = read_file(written[2] / NAME)
    assert metadata["general.architecture"] == "deepseek2"
    assert metadata["general.quantized_by"] == "moeq"
    assert metadata["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q4_0
    assert metadata["deepseek2.expert_group_count"] == 2
    assert metadata["tokenizer.ggml.pre"] == "gpt-2"
    assert tensors["blk.1.ffn_gate_exps.weight"].shape == (8, 32, 64)


def test_the_folder_has_a_card_and_a_manifest(written: tuple) -> None:
    folder = written[2]
    assert {path.name for path in folder.iterdir()} == {NAME, MANIFEST, "README.md"}
    card = (folder / "README.md").read_text()
    assert "library_name: gguf" in card
    assert "| gguf | 24 weights as Q4_0, 10 weights as Q8_0, 9 weights as BF16 |" in card
    assert "llama-server -m gguf/model.gguf" in card
    assert set(json.loads((folder / MANIFEST).read_text())["files"]) == {NAME}


def test_one_expert_is_in_memory_at_a_time(written: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chunks: list[int] = []

    def watched(path: Path, architecture: str, metadata: Any, tensors: Any) -> None:
        def measured(make: Any) -> Iterator[Any]:
            for chunk in make():
                chunks.append(chunk.nbytes)
                yield chunk

        watch = {name: (tensor, lambda make=make: measured(make)) for name, (tensor, make) in tensors.items()}
        write_file(path, architecture, metadata, watch)

    monkeypatch.setattr(module, "write_file", watched)
    export = PackedExport(written[0], read_contents(written[0]))
    FORMAT.write(export, tmp_path, "exact", silent)
    assert (tmp_path / NAME).read_bytes() == (written[2] / NAME).read_bytes()
    stacked = [tensor for name, tensor in read_file(tmp_path / NAME)[1].items() if "exps" in name]
    assert len(chunks) == len(read_file(tmp_path / NAME)[1]) + sum(tensor.shape[0] - 1 for tensor in stacked)


@pytest.mark.parametrize("name", ["blk.1.ffn_up_exps.weight", "blk.0.attn_q_a.weight", "output_norm.weight"])
def test_a_file_with_one_other_bit_is_found(written: tuple, name: str, tmp_path: Path) -> None:
    raw = bytearray((written[2] / NAME).read_bytes())
    tensor = next(tensor for tensor in gguf.GGUFReader(written[2] / NAME).tensors if tensor.name == name)
    raw[tensor.data_offset + tensor.n_bytes - 1] ^= 0x40
    (tmp_path / NAME).write_bytes(raw)
    export = PackedExport(written[0], read_contents(written[0]))
    with pytest.raises(ExportMismatchError, match=r"export again"):
        FORMAT.verify(export, tmp_path, "exact", silent)


def test_a_refusal_or_a_wrong_file_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def mixed(name: str) -> Grid:
        return (8, 32, True) if "experts.3." in name else (4, 32, True)

    export, _ = write_packed("mixtral", tmp_path, mixed, num_hidden_layers=1)
    with pytest.raises(ValueError, match=r"runtime: llama\.cpp"):
        convert(export, "gguf", tmp_path / "gguf")
    export, _ = write_packed("mixtral", tmp_path / "other", grid_of, num_hidden_layers=1)
    monkeypatch.setattr(module, "to_bytes", lambda kind, weight, mode: to_bytes(kind, weight, mode) ^ 1)
    with pytest.raises(ExportMismatchError, match=r"differs by more than the rounding of its scales"):
        convert(export, "gguf", tmp_path / "gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export", "other", "source"]


def test_scales_outside_of_float16_name_their_weight_and_are_rounded_as_asked(tmp_path: Path) -> None:
    def small(name: str) -> Grid:
        return (4, 32, True)

    export, _ = write_packed("mixtral", tmp_path, small, num_hidden_layers=1, change=_shrink)
    with pytest.raises(ValueError, match=r"gguf: model\.layers\.0\.self_attn\.v_proj: float16.*carrier to native"):
        convert(export, "gguf", tmp_path / "gguf")
    assert not (tmp_path / "gguf").exists()
    report = convert(export, "gguf", tmp_path / "gguf", carrier="native")
    assert 0 < report.largest_error <= 8


def _shrink(name: str, weight: QuantizedWeight) -> None:
    """One row of a weight that is almost nothing."""
    if name.endswith("v_proj"):
        weight.scale_OG[3] *= 2.0**-16


def test_a_file_whose_tensor_has_too_few_bytes_is_not_finished(tmp_path: Path) -> None:
    tensor = FileTensor("F32", (2, 4))
    with pytest.raises(ValueError, match="a has 16 bytes where 32 were declared"):
        write_file(tmp_path / NAME, "llama", {}, {"a": (tensor, lambda: [np.zeros(16, np.uint8)])})
    assert not list(tmp_path.iterdir())


def test_whole_numbers_of_64_bits_are_read_as_they_were_written(tmp_path: Path) -> None:
    numbers = [2**62 + 1, 0, 5]
    write_file(tmp_path / NAME, "qwen4exp", {"qwen4exp.wide": Whole64(numbers), "qwen4exp.narrow": [1, 2]}, {})
    fields = gguf.GGUFReader(tmp_path / NAME).fields
    assert fields["qwen4exp.wide"].types[1] is gguf.GGUFValueType.UINT64
    assert fields["qwen4exp.narrow"].types[1] is gguf.GGUFValueType.INT32
    assert read_file(tmp_path / NAME)[0]["qwen4exp.wide"] == numbers


def test_tensors_of_whole_numbers_are_keys_of_the_file_and_compared(tmp_path: Path) -> None:
    """Tables of n-grams and what a token is multiplied with."""
    export, _ = write_packed("qwen4_exp_text", tmp_path, grid_of, **OPTIONS["qwen4_exp_text"])
    convert(export, "gguf", tmp_path / "gguf")
    metadata, _ = read_file(tmp_path / "gguf" / NAME)
    found = metadata["qwen4exp.ple.layer_multipliers"]
    stored = tensors_of(export)["model.layers.0.ple.ple_embedding.layer_multipliers"]
    assert found == stored.tolist()
    assert max(found) > 2**32
    raw = bytearray((tmp_path / "gguf" / NAME).read_bytes())
    place = raw.index(found[0].to_bytes(8, "little"))
    raw[place] ^= 1
    (tmp_path / "gguf" / NAME).write_bytes(raw)
    with pytest.raises(ExportMismatchError, match=r"has other ple.layer_multipliers than the model"):
        FORMAT.verify(open_packed(export), tmp_path / "gguf", "exact", silent)


def test_of_a_wrapper_the_language_model_is_written_and_the_rest_counted(tmp_path: Path) -> None:
    made = write_tiny_packed("qwen3_vl_moe", tmp_path, lambda name: (4, 32, True))
    report = convert(made.folder, "gguf", tmp_path / "gguf")
    beside = [key for key in tensors_of(made.folder) if ".visual." in key]
    assert report.num_left_out == len(beside) > 0
    assert proof(report).endswith(f"equal bit for bit; {len(beside)} tensors beside the language model left out")
    assert "the file holds the language model alone" in (tmp_path / "gguf" / "README.md").read_text()
