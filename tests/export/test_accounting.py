"""Every tensor of a source has one fate, which is true of the bytes in the files."""

from pathlib import Path

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
from tests.families import SUPPORTED
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


def alter(folder: Path, change: object) -> None:
    """Change the tensors of a folder's file."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=() if f in MOE_FAMILIES else pytest.mark.slow) for f in SUPPORTED]
)
def test_everything_is_accounted_for(family: str, tmp_path: Path) -> None:
    grids = export(family, tmp_path)
    found = ledger(tmp_path, grids)
    found.check()
    source = load_file(tmp_path / "source" / "model.safetensors")
    assert found.tensors.keys() == source.keys()
    dense = load_file(tmp_path / "dense" / "model.safetensors")
    for key, entry in found.tensors.items():
        if entry.fate == "kept":
            assert torch.equal(source[key], dense[key]), key
    # Each quantized weight stands in the ledger, alone or with the others of its tensor.
    details = [entry.detail for entry in found.tensors.values() if entry.fate == "quantized"]
    assert sum(int(text.split()[0]) if text[0].isdigit() else 1 for text in details) == len(grids)
    assert not found.added


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
