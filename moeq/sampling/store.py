"""Sampled sequences on disk: token ids, never text, which another tokenization would change.

While a set is being written, each part of it is a file of the same kind (``moeq.sampling.parts``).  The file name
holds a fingerprint of everything the sequences depend on (weights, tokenizer, settings, writer), so a stale file is
never read.
"""

from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from moeq.disk.atomic import write_tensors
from moeq.disk.digest import digest, tensor_digest
from moeq.disk.identity import model_identity
from moeq.models.adapter import Adapter
from moeq.sampling.ebss_spec import EBSSSpec, Sampled
from moeq.sampling.effective import ExpertEvidence
from moeq.sampling.writer import Writer, identity_of

SET_VERSION = 5
# Of each tensor so many values count, evenly strided: enough to tell a changed model from its files.
_VALUES = 1 << 12


def model_mark(adapter: Adapter, name: str, revision: str | None = None) -> list[Any]:
    """What tells one model from another without having all of it in memory.

    The identity of its files, the dtype that it computes in, and a sample of the values outside of its blocks and in
    the first one, which differ where the model was changed since it was opened (a rotation changes every block).

    Args:
        adapter: Of the model.
        name: Hub id or folder of its files.
        revision: Branch, tag or commit at the hub.
    """
    first, every = f"{adapter.block_prefix}.0.", f"{adapter.block_prefix}."
    with adapter.resident(0):
        state = adapter.model.state_dict()
        sample = {
            key: tensor_digest(value.flatten()[:: max(1, value.numel() // _VALUES)])
            for key, value in state.items()
            if key.startswith(first) or not key.startswith(every)
        }
    return [model_identity(name, revision), str(next(adapter.model.parameters()).dtype), digest(sample)]


def set_fingerprint(
    mark: list[Any], tokenizer: Any, spec: EBSSSpec, sequences_at_once: int, world_size: int, writer: Writer
) -> str:
    """Short digest of the model (``model_mark``), tokenizer, settings, batch size, and who writes.

    The number of ranks counts where sequences depend on those of the same rank; elsewhere a run that goes on with
    other ranks keeps its sequences.
    """
    vocabulary = digest([sorted(tokenizer.get_vocab().items()), sorted(tokenizer.all_special_ids)])
    ranks = world_size if spec.sequential else 1
    return digest([SET_VERSION, mark, vocabulary, asdict(spec), sequences_at_once, ranks, identity_of(writer)])


def save_sampled(path: Path, sampled: Sampled, evidence: ExpertEvidence | None = None) -> None:
    """Write sequences, their log-likelihoods, expert counts and perhaps affinities, atomically."""
    tensors = {**vars(sampled), **({} if evidence is None else vars(evidence))}
    # Cloned, because the format refuses tensors that share memory; several runs may share a folder.
    own = {name: tensor.cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    write_tensors(path, own, shared=True)


def load_sampled(path: Path) -> Sampled:
    """Read sequences back, on the CPU; raises ValueError where the file is damaged or not one of ours."""
    return _load(path, f"{path} is not a complete file of sampled sequences")[0]


def load_scored(path: Path) -> tuple[Sampled, ExpertEvidence]:
    """Read sequences back with their affinities; raises ValueError as above, or where the file has none."""
    problem = f"{path} is not a complete file of scored sequences"
    sampled, evidence = _load(path, problem)
    if evidence is None:
        raise ValueError(f"{problem} (no affinities); delete it")
    return sampled, evidence


def load_part(path: Path) -> tuple[Sampled, ExpertEvidence | None]:
    """Read a part of a set back.

    Raises:
        ValueError: The file is damaged, or on a disk that this rank does not see.
    """
    if not path.is_file():
        raise ValueError(f"there is no part {path} though its rank has written it; choose a run folder all ranks share")
    return _load(path, f"{path} is not a complete part of sampled sequences")


def _load(path: Path, problem: str) -> tuple[Sampled, ExpertEvidence | None]:
    try:
        tensors = load_file(path)
        given = {f.name: tensors.pop(f.name) for f in fields(ExpertEvidence) if f.name in tensors}
        return Sampled(**tensors), ExpertEvidence(**given) if given else None
    except (SafetensorError, TypeError) as error:
        raise ValueError(f"{problem} ({error}); delete it") from error


def check_cache(folder: Path) -> None:
    """Refuse a folder for shared sequences that holds anything else; one that does not exist yet is fine.

    Raises:
        ValueError: It is a file, or has other files in it.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"cache_dir ({folder}) is a file; choose a folder that is new or holds sampled sequences only")
    foreign = sorted(p.name for p in folder.glob("*") if not p.name.lstrip(".").startswith("ebss-"))
    if foreign:
        raise ValueError(
            f"cache_dir ({folder}) holds {len(foreign)} files that are not sampled sequences, such as {foreign[0]}; "
            "choose a folder that is new or holds sampled sequences only"
        )
