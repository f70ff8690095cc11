"""A calibration set written chunk by chunk, each a file of its own: a killed run goes on where it stopped.

A chunk is ``sequences_at_once`` sequences, and every rank writes its share of it as one part file, which appears
complete or not at all.  Whatever is drawn for a part follows from the settings, the chunk, the rank and (where the
settings make chunks depend on each other) the parts of earlier chunks, never from what this process did before; so a
continued run ends with the ids of an uninterrupted one.  Parts are the only thing that ranks exchange: after a barrier
every rank reads those of all, in the order of the ranks.

Paper and stochastic mode: every sequence has its own random stream, and ranks take whole chunks in turn.  Products
round differently in batches of other sizes, which moves a draw now and then (in bfloat16 on AMX one sequence of four);
so a sequence is always written in the same company, and ids do not depend on the number of ranks.  Corpus mode (and
sigma of the corpus): chunks follow each other, ranks divide a chunk (its files name their number), a rank sees the
running sequences of its own share only, and the use of experts is summed after each chunk; the same number of ranks and
sequences at once gives the same ids, another gives others.

Corpus mode draws sequences again that are loops (``is_degenerate``), at most ``REDRAWS`` times each; a sequence that
still loops stays, and the report counts it.  Legend: N sequences, T tokens, L blocks, E experts.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from moeq.disk.digest import digest
from moeq.sampling.corpus import search_corpus
from moeq.sampling.ebss import draw_first_tokens, search
from moeq.sampling.ebss_spec import EBSSSpec, NextToken, Sampled, Usage
from moeq.sampling.effective import ExpertEvidence
from moeq.sampling.store import load_part, save_sampled

REDRAWS = 4


@dataclass(frozen=True)
class SetWriter:
    """What writing a set needs beside the model.

    Attributes:
        spec: Settings.
        sequences_at_once: Sequences of a chunk.
        candidates_V: Ids that a sequence may start with.
        is_degenerate: Which sequences are loops, from ids_NT.
        evidence: Affinities by expert of ids_NT, for the stop rule; called only where there is one.
        folder: Of the part files, shared by the ranks.
        rank: This process.
        world_size: Number of ranks.
        barrier: Returns once every rank has called it.
    """

    spec: EBSSSpec
    sequences_at_once: int
    candidates_V: Tensor
    is_degenerate: Callable[[Tensor], list[bool]]
    evidence: Callable[[Tensor], ExpertEvidence]
    folder: Path
    rank: int = 0
    world_size: int = 1
    barrier: Callable[[], None] = lambda: None

    def shares(self, chunk: range) -> list[range]:
        """Sequences of a chunk that each rank writes."""
        if not self.spec.sequential:
            writer = chunk.start // self.sequences_at_once % self.world_size
            return [chunk if rank == writer else chunk[:0] for rank in range(self.world_size)]
        bounds = [len(chunk) * rank // self.world_size for rank in range(self.world_size + 1)]
        return [chunk[a:b] for a, b in pairwise(bounds)]

    def chunks(self) -> list[range]:
        """Sequences of each chunk."""
        every = range(self.spec.num_sequences)
        return [every[i : i + self.sequences_at_once] for i in every[:: self.sequences_at_once]]

    def missing(self) -> int:
        """Sequences of this rank that are not written yet."""
        shares = [self.shares(chunk)[self.rank] for chunk in self.chunks()]
        return sum(len(share) for share in shares if not self.path(share).is_file())

    def path(self, share: range) -> Path:
        """Part file of a share."""
        ranks = f"-of-{self.world_size}-ranks" if self.spec.sequential else ""
        return self.folder / f"{share.start:06d}-{share.stop:06d}{ranks}.safetensors"


def sample_set(sampler: SetWriter, next_token: NextToken, device: torch.device) -> Sampled:
    """Write what is missing of this rank's shares; the whole set, on the CPU, on every rank.

    Args:
        sampler: Settings and folder.
        next_token: The model.
        device: Of its embeddings.

    Raises:
        ValueError: Fewer possible first tokens than sequences, or a part that is damaged or was written elsewhere.
    """
    spec = sampler.spec
    paths: list[Path] = []
    usage: Usage | None = None
    evidence: ExpertEvidence | None = None
    for index, chunk in enumerate(sampler.chunks()):
        shares = sampler.shares(chunk)
        share = shares[sampler.rank]
        if share and not sampler.path(share).is_file():
            save_sampled(sampler.path(share), *_write(sampler, next_token, index, share, device, usage))
        paths += (new := [sampler.path(share) for share in shares if share])
        if not spec.sequential:
            continue
        sampler.barrier()
        for part, found in map(load_part, new):
            usage = _add(usage, part)
            evidence = found if evidence is None or found is None else evidence + found
        if evidence is not None and float(evidence.effective_LE().min()) >= spec.min_tokens_per_expert:
            break
    sampler.barrier()
    parts = [load_part(path)[0] for path in paths]
    return Sampled(**{f.name: torch.cat([getattr(part, f.name) for part in parts]) for f in fields(Sampled)})


def _add(usage: Usage | None, part: Sampled) -> Usage:
    counts_LE, num_tokens = part.counts_NLE.sum(0), part.ids_NT.numel()
    if usage is None:
        return Usage(counts_LE, num_tokens)
    return Usage(usage.counts_LE + counts_LE, usage.num_tokens + num_tokens)


def _write(
    sampler: SetWriter, next_token: NextToken, index: int, share: range, device: torch.device, usage: Usage | None
) -> tuple[Sampled, ExpertEvidence | None]:
    """The sequences of one share, and their evidence where the stop rule asks for it."""
    spec = sampler.spec
    if usage is not None:
        usage = replace(usage, counts_LE=usage.counts_LE.to(device))
    if spec.mode == "corpus":
        part = _write_corpus(sampler, next_token, index, len(share), device, usage)
        return part, sampler.evidence(part.ids_NT) if spec.min_tokens_per_expert else None
    generator = torch.Generator().manual_seed(spec.seed)
    first_N = draw_first_tokens(sampler.candidates_V, spec.num_sequences, generator)[share.start : share.stop]
    # The seeds of the sequences before it, which the search would have drawn.
    torch.randint(2**62, (share.start,), generator=generator)
    if usage is None:
        return search(next_token, spec, first_N.to(device), generator), None
    return search(next_token, spec, first_N.to(device), generator, usage), None


def _write_corpus(
    sampler: SetWriter, next_token: NextToken, index: int, num: int, device: torch.device, usage: Usage | None
) -> Sampled:
    """``num`` sequences, those that are loops drawn again."""
    part: Sampled | None = None
    again = torch.arange(num, device=device)
    for attempt in range(REDRAWS + 1):
        name = digest([sampler.spec.seed, index, sampler.rank, sampler.world_size, attempt])
        generator = torch.Generator().manual_seed(int(name, 16) % 2**63)
        starts = sampler.spec.starts if sampler.spec.balance else 1
        pool = max(len(again), min(len(again) * starts, sampler.candidates_V.numel()))
        first_M = draw_first_tokens(sampler.candidates_V, pool, generator).to(device)
        finished_LE = torch.zeros((), dtype=torch.int64, device=device) if usage is None else usage.counts_LE
        if part is not None:
            kept_N = torch.ones(num, dtype=torch.bool, device=device)
            kept_N[again] = False
            finished_LE = finished_LE + part.counts_NLE[kept_N].sum(0)
        drawn = search_corpus(next_token, sampler.spec, len(again), first_M, generator, finished_LE)
        part = drawn if part is None else _replace(part, again, drawn)
        again = again[torch.tensor(sampler.is_degenerate(part.ids_NT[again]), device=device)]
        if not len(again):
            break
    assert part is not None
    return part


def _replace(part: Sampled, index: Tensor, drawn: Sampled) -> Sampled:
    """Rows ``index`` of a part become those that were drawn anew; their count of redrawn sequences goes up."""
    columns = {f.name: getattr(part, f.name).clone() for f in fields(Sampled)}
    for name, column in columns.items():
        column[index] = column[index] + 1 if name == "redrawn_N" else getattr(drawn, name)
    return Sampled(**columns)
