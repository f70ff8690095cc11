import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from moeq.sampling.given_ids import check_ids, read_ids

IDS = torch.arange(12).view(3, 4) + 5


def write(path: Path, rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))  # type: ignore[attr-defined]
    return path


def tensors(path: Path, **given: Tensor) -> Path:
    save_file(given, path)
    return path


def array(path: Path, values: np.ndarray) -> Path:
    np.save(path, values)
    return path


def test_every_kind_of_file_gives_the_same_ids(tmp_path: Path) -> None:
    files = [
        tensors(tmp_path / "a.safetensors", input_ids=IDS.int()),
        tensors(tmp_path / "b.safetensors", ids_NT=IDS, nll_N=torch.zeros(3)),
        tensors(tmp_path / "c.safetensors", input_ids=IDS, attention_mask=torch.ones(3, 4, dtype=torch.int64)),
        array(tmp_path / "d.npy", IDS.numpy().astype(np.uint16)),
        write(tmp_path / "e.jsonl", IDS.tolist()),
        write(tmp_path / "f.jsonl", [{"input_ids": row, "attention_mask": [1] * 4} for row in IDS.tolist()]),
    ]
    for file in files:
        found = read_ids(file)
        assert found.dtype == torch.int64
        assert torch.equal(found, IDS), file


def test_what_is_wrong_with_a_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a.bin must end in .safetensors, .npy, .jsonl; convert"):
        read_ids(tmp_path / "a.bin")
    with pytest.raises(ValueError, match=r"no file a.npy in folder .*; it should contain token ids"):
        read_ids(tmp_path / "a.npy")
    with pytest.raises(ValueError, match=r"has tensors \['tokens'\]; token ids must be named input_ids"):
        read_ids(tensors(tmp_path / "names.safetensors", tokens=IDS))
    for file in ("cut.safetensors", "cut.npy"):
        (tmp_path / file).write_bytes(b"\x93NUMPY damaged")
        with pytest.raises(ValueError, match=f"{file} is not a complete"):
            read_ids(tmp_path / file)
    (tmp_path / "words.jsonl").write_text("[1, 2]\nthree\n")
    with pytest.raises(ValueError, match=r"line 2 is not JSON .*; write one list of token ids per line"):
        read_ids(tmp_path / "words.jsonl")
    for shape in [(0, 4), (4,), (1, 2, 3)]:
        with pytest.raises(ValueError, match=r"have shape .*; give \[sequences, length\], none empty"):
            read_ids(tensors(tmp_path / "shape.safetensors", input_ids=torch.zeros(shape, dtype=torch.int64)))
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="none empty"):
        read_ids(tmp_path / "empty.jsonl")


def test_numbers_that_are_no_ids_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"are torch.float32; they must be integers"):
        read_ids(tensors(tmp_path / "float.safetensors", input_ids=IDS.float()))
    with pytest.raises(ValueError, match=r"are float64; they must be integers"):
        read_ids(array(tmp_path / "float.npy", IDS.numpy().astype(float)))
    for row, shown in [([1, 2.5], "2.5"), ([True], "True"), (["a"], "'a'"), ([1, 2**70], str(2**70))]:
        with pytest.raises(ValueError, match=f"line 1 has {shown}, which is no token id"):
            read_ids(write(tmp_path / "rows.jsonl", [row]))
    for row in ([], {"text": "words"}, 7):
        with pytest.raises(ValueError, match="line 1 has no list of token ids"):
            read_ids(write(tmp_path / "rows.jsonl", [row]))


def test_padding_is_refused(tmp_path: Path) -> None:
    mask = torch.ones(3, 4, dtype=torch.int64)
    mask[1, 2:] = 0
    with pytest.raises(ValueError, match=r"attention_mask that leaves out 2 tokens; .* cut all to one length"):
        read_ids(tensors(tmp_path / "mask.safetensors", input_ids=IDS, attention_mask=mask))
    with pytest.raises(ValueError, match=r"line 1 has an attention_mask that leaves out 1 tokens"):
        read_ids(write(tmp_path / "mask.jsonl", [{"input_ids": [1, 2], "attention_mask": [0, 1]}]))
    with pytest.raises(ValueError, match=r"have 2 to 4 ids; all must have one length, .*; cut them to 2"):
        read_ids(write(tmp_path / "ragged.jsonl", [[1, 2, 3, 4], [1, 2, 3], [1, 2]]))


def test_ids_of_another_vocabulary_are_refused() -> None:
    check_ids(IDS, "a.npy", 17)
    with pytest.raises(ValueError, match=r"a.npy has 1 ids .* first 16 at position 3 of sequence 2; ids .* to 15"):
        check_ids(IDS, "a.npy", 16)
    with pytest.raises(ValueError, match=r"12 ids that are no tokens .*, first -5 at position 0 of sequence 0"):
        check_ids(-IDS, "a.npy", 17)
