"""The file of a finished block holds what was put into it, and says so where it does not."""

from pathlib import Path

import pytest
import torch

from moeq.fit.block_files import block_path, check_fingerprint, read_block, save_block, take_records
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
    file = read_block(tmp_path, 0)
    take_records(file.without_codes(), again)
    assert list(file) == ["layers.0.a", "layers.0.b"]
    assert file.grids == {"layers.0.a": (3, 4, "uniform"), "layers.0.b": (4, None, "uniform")}
    for name, weight in file.items():
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


def test_codes_are_packed_on_disk(tmp_path: Path) -> None:
    codes = torch.randint(0, 8, (64, 4096), dtype=torch.uint8)
    run = Run(quantized={"a": QuantizedWeight(codes, torch.rand(64, 1).bfloat16(), None, 3, None)})
    save_block(tmp_path, 0, run, ["a"], [], FINGERPRINT)
    assert block_path(tmp_path, 0).stat().st_size < 64 * 4096 * 3 / 8 + 2000
    assert torch.equal(read_block(tmp_path, 0)["a"].codes_OI, codes)


@pytest.mark.parametrize("key", list(FINGERPRINT))
def test_a_block_of_another_run_is_refused_by_what_changed(key: str, tmp_path: Path) -> None:
    save_block(tmp_path, 0, finished_run(), ["layers.0.a"], [], FINGERPRINT)
    before = read_block(tmp_path, 0).fingerprint
    with pytest.raises(ValueError, match=f"holds blocks of a run with another {key}; set --trainer.default_root_dir"):
        check_fingerprint(tmp_path, "blocks", before, {**FINGERPRINT, key: "changed"})
    check_fingerprint(tmp_path, "blocks", before, FINGERPRINT)


def damage(path: Path, position: int) -> None:
    """Flip one bit."""
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_one_flipped_bit_anywhere_is_seen(share: float, tmp_path: Path) -> None:
    save_block(tmp_path, 0, finished_run(), ["layers.0.a", "layers.0.b"], [], FINGERPRINT)
    path = block_path(tmp_path, 0)
    damage(path, int(share * (path.stat().st_size - 1)))
    with pytest.raises(ValueError, match=r"block_000.safetensors is (truncated or )?damaged.*quantized again"):
        read_block(tmp_path, 0)


@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 0.99])
def test_a_truncated_file_is_a_value_error(share: float, tmp_path: Path) -> None:
    save_block(tmp_path, 0, finished_run(), ["layers.0.a"], [], FINGERPRINT)
    path = block_path(tmp_path, 0)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(ValueError, match=r"block_000.safetensors is truncated or damaged"):
        read_block(tmp_path, 0)
