import pytest
import torch

from moeq.sampling.writer import (
    BITS,
    WRITERS,
    Writer,
    WriterSizes,
    choose_writer,
    describe_writer,
    identity_of,
    rounded_fallback,
    settle_writer,
    work_bytes,
)
from tests.tiny import tiny_config, tiny_model

GIB = 1 << 30


def sizes(device: float, host: float | None = None, work: float = 2.0) -> WriterSizes:
    """Of a model of 60 GiB with blocks of 1; without ``host`` the device is the CPU."""
    on_host = host is None
    return WriterSizes(
        original=60 * GIB, packed={"packed8": 32 * GIB, "packed4": 17 * GIB}, block=GIB, work=int(work * GIB),
        device_free=int(device * GIB), host_free=int((device if host is None else host) * GIB), on_host=on_host,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("device", "host", "writer"),
    [
        (80, 256, "original"),
        (62, 16, "original"),
        (61, 64, "lockstep"),
        (4, 60, "lockstep"),
        (3, 60, None),
        (61, 32, "packed8"),
        (35, 32, "packed8"),
        (34, 32, "packed4"),
        (20, 16, "packed4"),
        (19, 16, None),
        (62, None, "original"),
        (61, None, "packed8"),
        (34, None, "packed4"),
        (20, None, "packed4"),
        (19, None, None),
    ],
)
def test_auto_takes_the_first_writer_that_fits(device: float, host: float | None, writer: Writer | None) -> None:
    if writer is None:
        with pytest.raises(ValueError, match=r"rounded to 4 bits it takes 17.0 GiB, .* are free; .*GivenIdsDataModule"):
            choose_writer(sizes(device, host))
    else:
        assert choose_writer(sizes(device, host)) == writer


def settled(
    device: float, finished: list[Writer] | None = None, begun: list[Writer] | None = None,
    shared: list[Writer] | None = None,
) -> Writer:  # fmt: skip
    return settle_writer(sizes(device), finished=finished or [], begun=begun or [], shared=shared or [])


def test_a_run_keeps_its_writer_whatever_is_free_by_now() -> None:
    assert settled(62, finished=["packed4"]) == "packed4"
    assert settled(10, finished=["original", "lockstep"]) == "original"
    assert settled(62, begun=["packed8"]) == "packed8"
    # Parts of the original are of no use where it does not fit any more.
    assert settled(61, begun=["original", "lockstep"]) == "packed8"
    assert settled(62, begun=["original", "lockstep"]) == "original"


def test_a_shared_set_is_taken_where_it_is_as_good_as_a_new_one() -> None:
    assert settled(34, shared=["original", "lockstep"]) == "original"
    assert settled(34, shared=["packed8"]) == "packed8"
    assert settled(62, shared=["packed4"]) == "original"
    assert settled(10, shared=["packed4"]) == "packed4"
    with pytest.raises(ValueError, match="cannot write its calibration data"):
        settled(10)


def test_blocks_in_lockstep_are_the_original_and_rounded_writers_are_others() -> None:
    assert [identity_of(writer) for writer in WRITERS] == ["original", "original", "packed8", "packed4"]


def test_what_was_chosen_is_said_with_the_numbers_and_the_price() -> None:
    assert "whole (60.0 GiB and 2.0 GiB of caches, 62.0 GiB free)" in describe_writer("original", sizes(62))
    assert "visit the device in turn" in describe_writer("lockstep", sizes(20, 64))
    for writer, bits in BITS.items():
        assert f"rounded to {bits} bits" in describe_writer(writer, sizes(40))
        fallback = rounded_fallback(writer)
        assert fallback.weight == "calibration data"
        assert fallback.reason == f"written by the model rounded to {bits} bits"
        assert "benchmarks/results/writers" in fallback.detail


@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss", "deepseek_v3", "deepseek_v32"])
@torch.no_grad()
def test_work_is_at_least_the_keys_and_values_of_all_rows(family: str) -> None:
    ids = torch.ones(3, 16, dtype=torch.int64)
    cache = tiny_model(family)(input_ids=ids, use_cache=True).past_key_values
    held = sum(
        tensor.nbytes for layer in cache.layers for tensor in vars(layer).values()
        if isinstance(tensor, torch.Tensor) and tensor.ndim > 1
    )  # fmt: skip
    log_probs = 3 * 264 * 12
    expected = work_bytes(tiny_config(family), rows=3, length=16, itemsize=4) - log_probs
    assert expected == held
