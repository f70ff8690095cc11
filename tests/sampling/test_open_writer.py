import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moeq.checkpoint.packed_self import packed_bytes
from moeq.checkpoint.stream import open_stream
from moeq.models.adapter import Adapter
from moeq.sampling.ebss_spec import EBSSSpec
from moeq.sampling.effective import ExpertEvidence
from moeq.sampling.next_token import ModelNextToken
from moeq.sampling.open_writer import use_writer, writer_sizes
from moeq.sampling.parts import SetWriter, sample_set
from moeq.sampling.writer import Writer
from tests.tiny import save_tiny, tiny_model

CPU = torch.device("cpu")
SPEC = EBSSSpec(num_sequences=2, length=8, branches=2, starts=1, segment=4)


def streamed(folder: Path) -> Adapter:
    save_tiny("qwen2_moe", folder)
    model, stream = open_stream(folder, None, lambda dtype: dtype)
    return Adapter(model, stream)


def in_memory() -> Adapter:
    return Adapter(tiny_model("qwen2_moe", dtype=torch.bfloat16))


def no_evidence(_: Tensor) -> ExpertEvidence:
    raise AssertionError("there is no stop rule")


def written(adapter: Adapter, writer: Writer, folder: Path) -> dict[str, Tensor]:
    """The set that a writer writes."""

    def use(model: Any) -> dict[str, Tensor]:
        sampler = SetWriter(
            SPEC, 4, torch.arange(1, 257), lambda ids_NT: [False] * len(ids_NT), no_evidence, folder / writer
        )
        with ModelNextToken(model) as next_token:
            return vars(sample_set(sampler, next_token, CPU))

    return use_writer(adapter, writer, CPU, use)


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, second[name]) for name, value in first.items())


def test_every_writer_writes_the_same_streamed_and_in_memory(tmp_path: Path) -> None:
    away, here = streamed(tmp_path / "model"), in_memory()
    original = written(here, "original", tmp_path / "here")
    assert same(written(away, "original", tmp_path / "away"), original)
    assert same(written(here, "lockstep", tmp_path / "here"), original)
    assert same(written(away, "lockstep", tmp_path / "away"), original)
    packed = written(here, "packed4", tmp_path / "here")
    assert same(written(away, "packed4", tmp_path / "away"), packed)
    assert not torch.equal(packed["ids_NT"], original["ids_NT"])


@pytest.mark.parametrize("writer", ["original", "lockstep", "packed8"])
def test_nothing_of_a_writer_is_left(tmp_path: Path, writer: Writer) -> None:
    adapter = streamed(tmp_path)
    seen: list[weakref.ref[Tensor]] = []

    def use(model: Any) -> None:
        layer = model.model.layers[1]
        seen.extend(weakref.ref(parameter) for parameter in layer.parameters() if not parameter.is_meta)
        model(input_ids=torch.ones(1, 4, dtype=torch.int64))

    use_writer(adapter, writer, CPU, use)
    gc.collect()
    assert len(seen) > 5
    assert not any(ref() is not None for ref in seen)
    assert all(parameter.is_meta for parameter in adapter.blocks.parameters())
    assert not adapter.model.get_input_embeddings().weight.is_meta


def test_a_writer_that_fails_is_gone_as_well(tmp_path: Path) -> None:
    adapter = streamed(tmp_path)

    def use(model: Any) -> None:
        raise InterruptedError("killed")

    with pytest.raises(InterruptedError):
        use_writer(adapter, "lockstep", CPU, use)
    assert all(parameter.is_meta for parameter in adapter.blocks.parameters())


def test_changes_of_the_blocks_are_in_what_is_written(tmp_path: Path) -> None:
    def double(adapter: Adapter) -> Adapter:
        adapter.residency.change_blocks(lambda block: adapter.blocks[block].input_layernorm.weight.mul_(2))
        return adapter

    away, here = double(streamed(tmp_path / "model")), double(in_memory())
    original = written(here, "original", tmp_path / "here")
    assert same(written(away, "original", tmp_path / "away"), original)
    assert same(written(away, "packed8", tmp_path / "away"), written(here, "packed8", tmp_path / "here"))
    assert not torch.equal(written(in_memory(), "original", tmp_path / "plain")["ids_NT"], original["ids_NT"])


def test_sizes_are_told_from_shapes(tmp_path: Path) -> None:
    away, here = streamed(tmp_path), in_memory()
    given = {"rows": 8, "length": 64, "device_free": 1, "host_free": 2}
    found = writer_sizes(away, CPU, **given)
    assert found == writer_sizes(here, CPU, **given)
    assert found.original == sum(tensor.nbytes for tensor in (*here.model.parameters(), *here.model.buffers()))
    # A prepared model may be a twentieth larger.
    assert found.packed == {f"packed{bits}": int(1.05 * packed_bytes(here, bits)) for bits in (8, 4)}
    assert found.packed["packed4"] < found.packed["packed8"] < found.original
    assert found.on_host
