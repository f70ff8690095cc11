"""Every tensor of a source has one fate, which is true of the bytes in the files."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moeq.checkpoint.loading import load_model
from moeq.export.accounting import make_ledger
from moeq.export.assemble import packed_format
from moeq.export.dense import write_dense
from moeq.export.finished import FinishedModel
from moeq.export.ledger import Ledger, LedgerError
from moeq.export.moeq_format import write_packed
from moeq.models.adapter import Adapter
from tests.export.whole import DictBlocks, make_codes
from tests.families import DRAFT_LAYERS, PUBLISHED_AS, SUPPORTED, SUPPORTED_WRAPPERS
from tests.quantized import KINDS, make_fp8, save_quantized
from tests.test_wrappers import PUBLISHED_KEYS
from tests.tiny import MOE_FAMILIES, save_tiny


def export(family: str, folder: Path, *, keep_every: int = 7, **overrides: object) -> dict[str, str]:
    """Source and both exports below a folder, as a run writes them; returns the grids."""
    save_tiny(family, folder / "source", **overrides)
    return export_again(folder, keep_every)


def export_again(folder: Path, keep_every: int = 7) -> dict[str, str]:
    """Both exports of what is the source by now."""
    adapter = Adapter(load_model(str(folder / "source")))
    quantized = make_codes(adapter, keep_every=keep_every)
    source = FinishedModel(adapter, DictBlocks(adapter, quantized))
    grids = {name: packed_format(weight) for name, weight in quantized.items()}
    write_packed(source, None, grids, folder / "export", metadata={}, overwrite=True)
    write_dense(source, None, folder / "dense", overwrite=True)
    return {name: f"{weight.bits} bits" for name, weight in quantized.items()}


def ledger(folder: Path, grids: dict[str, str], reasons: dict[str, str] | None = None) -> Ledger:
    return make_ledger(folder / "source", {name: folder / name for name in ("export", "dense")}, grids, reasons or {})[
        0
    ]


def alter(folder: Path, change: Callable[[Any], Any]) -> None:
    """Change the tensors of a folder's file."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def rename(folder: Path, old: str, new: str) -> None:
    """Give a source the keys that it is published with, where transformers writes others."""

    def change(tensors: dict[str, Any]) -> None:
        for key in [key for key in tensors if old and key.startswith(old)]:
            tensors[key.replace(old, new)] = tensors.pop(key)

    alter(folder, change)


def cases() -> list[Any]:
    """Every family and wrapper in the dtypes in which it is published, and float32."""
    found = []
    for family in (*SUPPORTED, *SUPPORTED_WRAPPERS):
        for kind in ("bfloat16", "float32", *(["fp8"] if "FP8" in PUBLISHED_AS.get(family, "") else [])):
            quick = kind != "float32" and family in (*MOE_FAMILIES, "qwen3_5_moe")
            found.append(pytest.param(family, kind, marks=() if quick else pytest.mark.slow, id=f"{family}-{kind}"))
    return found


def add_draft_layer(folder: Path, family: str) -> list[str]:
    """Give a source what a layer for speculative decoding looks like in files of its family; returns the keys."""
    config = json.loads((folder / "config.json").read_text())
    blocks = config.get("text_config", config).get("num_hidden_layers", 0)
    prefix = DRAFT_LAYERS[family].replace(".N.", f".{blocks}.").rstrip("*")
    leaves = ("fc.weight", "enorm.weight", "layers.0.mlp.experts.0.up_proj.weight")
    drafts = {f"{prefix}{leaf}": torch.randn(32, 64).bfloat16() for leaf in leaves}
    alter(folder, lambda tensors: tensors.update(drafts))
    return sorted(drafts)


@pytest.mark.parametrize(("family", "kind"), cases())
def test_everything_is_accounted_for(family: str, kind: str, tmp_path: Path) -> None:
    source = save_tiny(family, tmp_path / "source", dtype=torch.float32 if kind == "float32" else torch.bfloat16)
    rename(source, *PUBLISHED_KEYS.get(family, ("", "")))
    drafts = add_draft_layer(source, family) if family in DRAFT_LAYERS else []
    if kind == "fp8":
        make_fp8(source)
    grids = export_again(tmp_path)
    found = ledger(tmp_path, grids)
    found.check()
    stored, dense = (load_file(tmp_path / name / "model.safetensors") for name in ("source", "dense"))
    assert found.tensors.keys() == stored.keys()
    for key, entry in found.tensors.items():
        if entry.fate == "kept" and "dequantized" not in entry.detail:
            assert stored[key].dtype == dense[key].dtype, key
            assert torch.equal(stored[key].float(), dense[key].float()), key
    # Each quantized weight stands in the ledger, alone or with the others of its tensor.
    details = {entry.detail for entry in found.tensors.values() if entry.fate == "quantized"}
    assert sum(int(text.split()[0]) if text[0].isdigit() else 1 for text in details) >= len(details) > 0
    assert not found.added
    assert all(found.tensors[key].fate == "kept" for key in stored if key.startswith(tuple(drafts) or "-"))
    assert (kind == "fp8") == any("dequantized" in entry.detail for entry in found.tensors.values())


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantized_source_is_accounted_for_tensor_by_tensor_of_its_files(kind: str, tmp_path: Path) -> None:
    quantized, _ = save_quantized(kind, tmp_path)
    quantized.rename(tmp_path / "source")
    found = ledger(tmp_path, export_again(tmp_path))
    found.check()
    stored = load_file(tmp_path / "source" / "model.safetensors")
    assert found.tensors.keys() == stored.keys()
    left_out = {key for key, entry in found.tensors.items() if entry.fate == "left out"}
    assert left_out == {key for key in stored if key.endswith("input_scale")}
    parts = {"_blocks", "_scales", "qweight", "qzeros", "g_idx", "weight_packed", "weight_scale", "weight_scale_inv"}
    assert all("dequantized" in found.tensors[key].detail for key in stored if key.endswith(tuple(parts)))


@pytest.fixture
def exported(tmp_path: Path) -> tuple[Path, dict[str, str]]:
    return tmp_path, export("mixtral", tmp_path, num_hidden_layers=1)


ROUTER = "model.layers.0.block_sparse_moe.gate.weight"


def test_a_tensor_that_differs_is_a_problem_unless_a_step_changed_it(exported: tuple) -> None:
    folder, grids = exported
    for name in ("export", "dense"):
        alter(folder / name, lambda tensors: tensors[ROUTER].view(-1)[0].add_(1))
    found = ledger(folder, grids)
    with pytest.raises(LedgerError, match=rf"1 tensors are not.*{ROUTER} \(differs in export, differs in dense\)"):
        found.check()
    explained = ledger(folder, grids, {"model.layers.0.mlp.gate.weight": "refitted"})
    explained.check()
    assert (explained.tensors[ROUTER].fate, explained.tensors[ROUTER].detail) == ("changed", "refitted")


def test_bytes_are_compared_not_values(exported: tuple) -> None:
    folder, grids = exported
    alter(folder / "dense", lambda tensors: tensors.update({ROUTER: tensors[ROUTER].float()}))
    with pytest.raises(LedgerError, match="kept in export, differs in dense"):
        ledger(folder, grids).check()


def test_a_tensor_from_nowhere_is_a_problem(exported: tuple) -> None:
    folder, grids = exported
    alter(folder / "export", lambda tensors: tensors.update(extra=torch.zeros(2)))
    with pytest.raises(LedgerError, match=r"export/extra \(not of the source\)"):
        ledger(folder, grids).check()


def test_a_tensor_that_no_parameter_uses_is_carried_or_left_out_for_a_reason(exported: tuple) -> None:
    folder, grids = exported
    draft = torch.arange(6.0).view(2, 3)
    alter(folder / "source", lambda tensors: tensors.update({"mtp.fc.weight": draft}))
    with pytest.raises(LedgerError, match=r"mtp.fc.weight \(no parameter of the model, missing in export"):
        ledger(folder, grids).check()
    left = ledger(folder, grids, {"mtp.*": "draft layers are dropped as asked"})
    left.check()
    assert left.tensors["mtp.fc.weight"].fate == "left out"
    for name in ("export", "dense"):
        alter(folder / name, lambda tensors: tensors.update({"mtp.fc.weight": draft}))
    assert ledger(folder, grids).tensors["mtp.fc.weight"].fate == "kept"
    alter(folder / "dense", lambda tensors: tensors["mtp.fc.weight"].add_(1))
    with pytest.raises(LedgerError, match=r"mtp.fc.weight \(.*differs in dense\)"):
        ledger(folder, grids).check()


def test_a_missing_codebook_is_a_problem(exported: tuple) -> None:
    folder, grids = exported
    key = next(key for key in load_file(folder / "export" / "model.safetensors") if key.endswith("w1.weight_packed"))
    base = key.removesuffix("_packed")
    alter(folder / "export", lambda tensors: [tensors.pop(k) for k in list(tensors) if k.startswith(f"{base}_")])
    with pytest.raises(LedgerError, match="neither codes nor values in export"):
        ledger(folder, grids).check()


def test_a_head_that_is_written_twice_is_left_out_once(tmp_path: Path) -> None:
    save_tiny("mixtral", tmp_path / "source", num_hidden_layers=1, tie_word_embeddings=True)
    alter(tmp_path / "source", lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    found = ledger(tmp_path, export_again(tmp_path))
    found.check()
    assert found.tensors["lm_head.weight"].fate == "left out"
    assert "model.embed_tokens.weight" in found.tensors["lm_head.weight"].detail


def test_entries_are_plain_values(exported: tuple) -> None:
    folder, grids = exported
    found, stored = make_ledger(folder / "source", {"export": folder / "export"}, grids, {})
    written = found.to_dict(stored)
    assert written["counts"] == found.counts
    assert written["tensors"][ROUTER] == {
        "fate": "kept", "detail": "", "parameter": "model.layers.0.mlp.gate.weight", "file": "model.safetensors",
        "dtype": "bfloat16", "shape": [8, 64],
    }  # fmt: skip
