"""From the finished blocks of a run to tuned ones, which take their place."""

import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moeq.disk.waiting import WaitingStates
from moeq.distributed import gather_lists, rank_and_world, wait_for_ranks
from moeq.fit.resume import Resume
from moeq.fit.run import Run
from moeq.models.adapter import Adapter
from moeq.models.residency import InMemory
from moeq.tuning.keeper import LeafKeeper
from moeq.tuning.leaves import BlockLeaves
from moeq.tuning.originals import Show, is_recorded, record_originals
from moeq.tuning.tune_model import Progress, Tuning
from moeq.tuning.tuned_blocks import TuningFolder
from moeq.tuning.tuning_spec import TuningSpec


def prepare_originals(
    adapter: Adapter,
    folder: TuningFolder,
    spec: TuningSpec,
    write_ids: Callable[[], Tensor],
    waiting: WaitingStates,
    show: Show,
) -> None:
    """Write sequences and what the original makes of them, where that is not done yet.

    Args:
        adapter: Of the original.
        folder: Of the tuning.
        spec: Settings.
        write_ids: Has the original write the sequences, int64 [N, T] on the CPU, the same on every rank.
        waiting: Where hidden states wait between blocks.
        show: Shows how far this is.
    """
    if all(gather_lists([is_recorded(folder.originals, spec.num_batches, folder.fingerprint)])):
        return
    ids_NT = write_ids()
    # Sequences that were written together resemble each other; those of a batch should not.
    order_N = torch.randperm(len(ids_NT), generator=torch.Generator().manual_seed(spec.seed))
    ids_NT = ids_NT[order_N[: spec.num_batches * spec.batch_size]]
    record_originals(adapter, ids_NT, spec.batch_size, folder.originals, folder.fingerprint, waiting, show)
    wait_for_ranks()
    if rank_and_world()[0] == 0:
        shutil.rmtree(folder.sequences, ignore_errors=True)  # they are in the batches now


def tune(
    adapter: Adapter, run: Run, resume: Resume, folder: TuningFolder, spec: TuningSpec, waiting: WaitingStates,
    show: Show,
) -> dict[str, Any]:  # fmt: skip
    """Tune the finished blocks of a run, and put the result in their place where it is better.

    All ranks must call it.

    Args:
        adapter: The model; ``prepare_originals`` has run with it.
        run: Its plan and changed parameters; those that learn are changed.
        resume: Its finished blocks.
        folder: Of the tuning; what an earlier process finished is taken from there.
        spec: Settings.
        waiting: Where leaves of a streamed model wait.
        show: Shows how far this is.

    Returns:
        What was found: ``kept``, loss per held-out token ``before`` and ``after``, ``checks`` on the way, ``steps``,
        ``tokens`` learned from, ``fewest_tokens`` of any expert, ``codes_changed`` as a share.
    """
    blocks = range(len(adapter.blocks))
    record = folder.record(len(blocks))
    if not all(gather_lists([record is not None])):
        record = _tune(adapter, run, resume, folder, spec, waiting, show)
    assert record is not None
    if record["kept"]:
        resume.replace_blocks(folder.path)
        if isinstance(adapter.residency, InMemory):
            for block in blocks:
                resume.commit(block)
    return record


def _tune(
    adapter: Adapter, run: Run, resume: Resume, folder: TuningFolder, spec: TuningSpec, waiting: WaitingStates,
    show: Show,
) -> dict[str, Any]:  # fmt: skip
    streamed = not isinstance(adapter.residency, InMemory)
    changed: dict[int, int] = {}

    def make(block: int) -> BlockLeaves:
        return BlockLeaves(adapter, run, block, resume.quantized(block), spec)

    keeper = LeafKeeper(make, waiting if streamed else None)
    is_first = rank_and_world()[0] == 0

    def better() -> None:
        for block in range(len(adapter.blocks)) if is_first else ():
            with adapter.resident(block):
                leaves = keeper.leaves(block)
                changed[block] = folder.save(adapter, run, block, leaves, resume.quantized(block))

    with waiting:
        progress = Tuning(adapter, keeper, spec, folder.originals, streamed=streamed).run(better, show)
    record = _record(adapter, spec, progress, sum(changed.values()))
    wait_for_ranks()  # nobody reads the originals any more
    if is_first:
        folder.finish(record)
    wait_for_ranks()
    (record,) = gather_lists([record] if is_first else [])
    return record


def _record(adapter: Adapter, spec: TuningSpec, progress: Progress, num_changed: int) -> dict[str, Any]:
    world = rank_and_world()[1]
    steps = spec.num_steps(world)
    sites = adapter.all_sites()
    num_codes = sum(sum(site.rows) * site.in_features * site.num_experts for site in sites)
    return {
        "kept": progress.best < progress.before,
        "before": progress.before,
        "after": progress.best,
        "checks": progress.checks,
        "steps": steps,
        "tokens": steps * world * spec.batch_size * spec.length,
        "fewest_tokens": min((int(tokens_E.min()) for tokens_E in progress.tokens.values()), default=0),
        "codes_changed": num_changed / num_codes,
    }
