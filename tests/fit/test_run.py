import json
import os
from pathlib import Path

import pytest
import torch

from moeq.disk.atomic import write_csv, write_json
from moeq.disk.digest import digest
from moeq.fit.block_files import block_path, load_block, save_block
from moeq.fit.run import Run
from moeq.quant.spec import Fallback, QuantizedWeight

FINGERPRINT = {"configuration": "a", "model": "b", "data": "c"}


def finished_run() -> Run:
    codes = torch.arange(32, dtype=torch.uint8).reshape(4, 8) % 8
    weight = QuantizedWeight(codes, torch.rand(4, 2).bfloat16(), torch.ones(4, 2, dtype=torch.uint8), 3, 4)
    symmetric = QuantizedWeight(codes.clone(), torch.rand(4, 1).bfloat16(), None, 4, None)
    return Run(
        quantized={"layers.0.a": weight, "layers.0.b": symmetric, "layers.1.a": weight},
        usage={"layers.0.mlp.experts": torch.tensor([3, 1]), "layers.1.mlp.experts": torch.tensor([2, 2])},
        changed={"layers.0.norm.weight": torch.rand(8), "layers.1.norm.weight": torch.rand(8)},
        errors=[{"weight": "layers.0.a", "relative_error": 0.125}, {"weight": "layers.1.a", "relative_error": 0.5}],
        fallbacks=[Fallback("layers.0.b", "few", "3 tokens"), Fallback("layers.1.a", "few", "4 tokens")],
    )


def test_a_saved_block_is_read_back_whole(tmp_path: Path) -> None:
    run, again = finished_run(), Run()
    save_block(tmp_path, 0, run, ["layers.0.a", "layers.0.b"], ["layers.0.norm.weight"], FINGERPRINT)
    assert load_block(tmp_path, 0, again, FINGERPRINT) == ["layers.0.a", "layers.0.b"]
    for name, weight in again.quantized.items():
        expected = run.quantized[name]
        assert torch.equal(weight.codes_OI, expected.codes_OI)
        assert torch.equal(weight.scale_OG, expected.scale_OG)
        assert (weight.zero_point_OG is None) == (expected.zero_point_OG is None)
        assert (weight.bits, weight.group_size) == (expected.bits, expected.group_size)
    assert again.errors == run.errors[:1]
    assert again.fallbacks == run.fallbacks[:1]
    assert again.changed.keys() == {"layers.0.norm.weight"}
    assert torch.equal(again.changed["layers.0.norm.weight"], run.changed["layers.0.norm.weight"])
    # A survey has counted the blocks to come, and a resumed run does not repeat it.
    assert again.usage.keys() == run.usage.keys()


@pytest.mark.parametrize("key", list(FINGERPRINT))
def test_a_block_of_another_run_is_refused_by_what_changed(key: str, tmp_path: Path) -> None:
    save_block(tmp_path, 0, finished_run(), ["layers.0.a"], [], FINGERPRINT)
    with pytest.raises(ValueError, match=f"with another {key}; set --trainer.default_root_dir"):
        load_block(tmp_path, 0, Run(), {**FINGERPRINT, key: "changed"})


def test_files_appear_complete_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def power_cut(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", power_cut)
    for write in (
        lambda: write_json(tmp_path / "a.json", {"a": 1}),
        lambda: write_csv(tmp_path / "a.csv", [{"a": 1}]),
        lambda: save_block(tmp_path, 0, finished_run(), ["layers.0.a"], [], FINGERPRINT),
    ):
        with pytest.raises(KeyboardInterrupt):
            write()
    assert not any((tmp_path / name).exists() for name in ("a.json", "a.csv"))
    assert not block_path(tmp_path, 0).exists()


def test_json_and_csv_hold_what_was_given(tmp_path: Path) -> None:
    write_json(tmp_path / "deep/a.json", {"a": [1, None]})
    assert json.loads((tmp_path / "deep/a.json").read_text()) == {"a": [1, None]}
    write_csv(tmp_path / "a.csv", [{"x": 1, "y": "b"}, {"x": 2, "y": "c"}])
    assert (tmp_path / "a.csv").read_text().split() == ["x,y", "1,b", "2,c"]
    write_csv(tmp_path / "none.csv", [])
    assert not (tmp_path / "none.csv").exists()


def test_digest_ignores_the_order_of_keys_and_nothing_else() -> None:
    assert digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1})
    assert len({digest(x) for x in ({"a": 1}, {"a": "1"}, {"a": 2}, {"b": 1}, [1])}) == 5
