"""Many sequences that the model writes as fast as it can, in the manner of corpus mode without its competition.

Beginnings are picked so that the set wakes every expert, and each is continued by one branch: text of all that the
model knows, at a quarter of the cost of a calibration set.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moeq.checkpoint.free_memory import free_bytes
from moeq.distributed import gather_lists
from moeq.models.adapter import Adapter
from moeq.models.residency import InMemory
from moeq.sampling.balance import is_degenerate
from moeq.sampling.candidates import first_token_candidates
from moeq.sampling.ebss_spec import EBSSSpec
from moeq.sampling.effective import measure_evidence
from moeq.sampling.next_token import ModelNextToken
from moeq.sampling.open_writer import use_writer, writer_sizes
from moeq.sampling.parts import SetWriter, sample_set
from moeq.sampling.writer import WRITERS, Writer, choose_writer

# Beginnings per sequence, of which the set gets those that it needs most.
STARTS = 4
# Seeds of a calibration set and of this one are apart, so that neither repeats the other.
SEEDS = 1 << 31


def plain_spec(num_sequences: int, length: int, seed: int) -> EBSSSpec:
    """Settings of such a set.

    Raises:
        ValueError: They are too small to be one.
    """
    return EBSSSpec(
        num_sequences, length, branches=1, mode="corpus", starts=STARTS, segment=length, seed=SEEDS + seed
    )  # fmt: skip


def write_sequences(
    adapter: Adapter,
    tokenizer: Any,
    spec: EBSSSpec,
    writer: Writer,
    sequences_at_once: int,
    folder: Path,
    device: torch.device,
    ranks: tuple[int, int],
    barrier: Callable[[], None],
) -> Tensor:
    """Token ids, int64 [N, T] on the CPU, the same on every rank.

    Args:
        adapter: Of the original.
        tokenizer: Of the model.
        spec: ``plain_spec``.
        writer: Which form of the model writes.
        sequences_at_once: Sequences of a forward pass, divided over ranks.
        folder: Of finished parts; a killed run goes on behind them.
        device: Where the model computes.
        ranks: This process and their number.
        barrier: Returns once every rank has called it.
    """

    def write(model: Any) -> Tensor:
        sampler = SetWriter(
            spec, sequences_at_once, first_token_candidates(model, tokenizer),
            lambda ids_NT: [is_degenerate(text) for text in tokenizer.batch_decode(ids_NT)],
            lambda ids_NT: measure_evidence(model, ids_NT.to(device)), folder, *ranks, barrier,
        )  # fmt: skip
        with ModelNextToken(model) as next_token:
            return sample_set(sampler, next_token, device).ids_NT

    return use_writer(adapter, writer, device, write)


def agreed_writer(
    adapter: Adapter, device: torch.device, sequences_at_once: int, length: int, ranks_here: int
) -> Writer:
    """Who writes, the same on all ranks: the model itself where it is in memory, else the best form that fits.

    Raises:
        ValueError: None does.
    """
    if isinstance(adapter.residency, InMemory):
        return "original"
    host = torch.device("cpu")
    host_free = free_bytes(host) // max(1, ranks_here)
    sizes = writer_sizes(
        adapter, device, rows=sequences_at_once, length=length,
        device_free=host_free if device == host else free_bytes(device), host_free=host_free,
    )  # fmt: skip
    return max(gather_lists([choose_writer(sizes)]), key=WRITERS.index)
