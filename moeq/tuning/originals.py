"""What tuning learns from: sequences, and the original's last hidden states on them, in files of the run folder.

The original is needed as a teacher long after its weights have become codes.  It runs once on all sequences, one block
at a time, before anything is quantized, and what its last block returned is kept: hidden states in the dtype of the
model.  Behind them no weight changes, so the model's own head makes the original's exact predictions of them whenever
they are asked for.  A token takes as many bytes as its hidden state (4 KB at a width of 2048), where its logits would
take 300 KB at a vocabulary of 150,000, and the likeliest of them alone would be a bound and not the divergence.

Shapes: N sequences, B sequences of a batch, T tokens of a sequence; hidden states [B, T, ...].
"""

import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from moeq.disk.checked import DamagedFile, read_checked, write_checked
from moeq.disk.waiting import WaitingStates
from moeq.distributed import rank_and_world
from moeq.fit.activations import ActivationStore
from moeq.models.adapter import Adapter
from moeq.models.blocks import capture_calls

# Shows how far a loop is: gives its items on, under a name.
Show = Callable[[Iterable[int], str], Iterable[int]]
_FINGERPRINT = "fingerprint"
_REMEDY = "it is made again"


def batch_path(folder: Path, batch: int) -> Path:
    """File of one batch."""
    return folder / f"batch_{batch:05d}.safetensors"


def read_batch(folder: Path, batch: int) -> tuple[Tensor, Tensor]:
    """Token ids, int64 [B, T], and the original's last hidden states, mapped into memory.

    Raises:
        ValueError: The file is damaged.
    """
    tensors = read_checked(batch_path(folder, batch), "start again with --model.restart true")[1]
    return tensors["ids"], tensors["last"]


def is_recorded(folder: Path, num_batches: int, fingerprint: Mapping[str, str]) -> bool:
    """Whether all batches of this run are there, and none is damaged."""
    with suppress(DamagedFile):
        told = (json.loads(read_checked(batch_path(folder, n), _REMEDY)[0][_FINGERPRINT]) for n in range(num_batches))
        return all(before == fingerprint for before in told)
    return False


@torch.no_grad()
def record_originals(
    adapter: Adapter,
    ids_NT: Tensor,
    batch_size: int,
    folder: Path,
    fingerprint: Mapping[str, str],
    waiting: WaitingStates,
    show: Show,
) -> None:
    """Run this rank's batches through the original, block by block, and write what comes out.

    Args:
        adapter: Of the original, in memory or streamed.
        ids_NT: All sequences, a whole number of batches.
        batch_size: B.
        folder: Of the files.
        fingerprint: Of the run, which the files carry.
        waiting: Where hidden states wait between blocks.
        show: Shows how far this is.
    """
    rank, world = rank_and_world()
    device = adapter.model.get_input_embeddings().weight.device  # type: ignore[operator]
    batches = dict(list(enumerate(ids_NT.split(batch_size)))[rank::world])
    with waiting:
        store = ActivationStore(waiting)
        for block in show(range(len(adapter.blocks)), "original"):
            adapter.residency.read_ahead(block + 1)
            with adapter.resident(block):
                for batch, ids_BT in batches.items():
                    inputs = {"input_ids": ids_BT.to(device)}
                    call = capture_calls(adapter.model, adapter.blocks, inputs, last=block)[-1]
                    store.advance(batch, block, call, adapter.blocks[block])
        for batch, ids_BT in batches.items():
            tensors = {"ids": ids_BT, "last": store.at(batch, "cpu")}
            write_checked(batch_path(folder, batch), tensors, {_FINGERPRINT: json.dumps(dict(fingerprint))})
