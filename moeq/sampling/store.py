"""Sampled sequences on disk: token ids, never text, which another tokenization would change.

While a set is being written, each part of it is a file of the same kind (``moeq.sampling.parts``).  The file name
holds a fingerprint of everything the sequences depend on (weights, tokenizer, settings), so a stale file is never read.
"""

from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from moeq.disk.atomic import write_tensors
from moeq.disk.digest import digest, model_digest
from moeq.models.storage import storage_dtype
from moeq.sampling.ebss_spec import EBSSSpec, Sampled
from moeq.sampling.effective import ExpertEvidence

SET_VERSION = 4


def set_fingerprint(model: nn.Module, tokenizer: Any, spec: EBSSSpec, sequences_at_once: int, world_size: int) -> str:
    """Short digest of the model's parameters and the dtype that it computes in, tokenizer, settings and batch size.

    The number of ranks counts where sequences depend on those of the same rank; elsewhere a run that goes on with
    other ranks keeps its sequences.
    """
    vocabulary = digest([sorted(tokenizer.get_vocab().items()), sorted(tokenizer.all_special_ids)])
    ranks = world_size if spec.sequential else 1
    computed_in = str(next(model.parameters()).dtype)
    weights = model_digest(model, partial(storage_dtype, model))
    return digest([SET_VERSION, weights, computed_in, vocabulary, asdict(spec), sequences_at_once, ranks])


def save_sampled(path: Path, sampled: Sampled) -> None:
    """Write the sequences, their log-likelihoods and their expert counts, atomically."""
    _save(path, vars(sampled))


def load_sampled(path: Path) -> Sampled:
    """Read sequences back, on the CPU; raises ValueError where the file is damaged or not one of ours."""
    try:
        return Sampled(**load_file(path))
    except (SafetensorError, TypeError) as error:
        raise ValueError(f"{path} is not a complete file of sampled sequences ({error}); delete it") from error


def save_part(path: Path, sampled: Sampled, evidence: ExpertEvidence | None) -> None:
    """Write a part of a set, atomically."""
    _save(path, {**vars(sampled), **({} if evidence is None else vars(evidence))})


def load_part(path: Path) -> tuple[Sampled, ExpertEvidence | None]:
    """Read a part back, on the CPU.

    Raises:
        ValueError: The file is damaged, or on a disk that this rank does not see.
    """
    if not path.is_file():
        raise ValueError(f"there is no part {path} though its rank has written it; choose a run folder all ranks share")
    try:
        tensors = load_file(path)
        given = {f.name: tensors.pop(f.name) for f in fields(ExpertEvidence) if f.name in tensors}
        return Sampled(**tensors), ExpertEvidence(**given) if given else None
    except (SafetensorError, TypeError) as error:
        raise ValueError(f"{path} is not a complete part of sampled sequences ({error}); delete it") from error


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


def _save(path: Path, tensors: dict[str, Tensor]) -> None:
    # Cloned, because the format refuses tensors that share memory; several runs may share a folder.
    own = {name: tensor.cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    write_tensors(path, own, shared=True)
