"""Sampled sequences on disk: token ids, never text, which another tokenization would change.

The file name holds a fingerprint of everything the sequences depend on (weights, tokenizer, settings), so a stale file
is never read.  Files appear complete or not at all (written under a temporary name, then renamed).
"""

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from moeq.calibration.spec import EBSSSpec, Sampled
from moeq.models.digest import model_digest
from moeq.run import digest

FORMAT_VERSION = 2


def fingerprint(model: nn.Module, tokenizer: Any, spec: EBSSSpec, sequences_at_once: int) -> str:
    """Short digest of the model's parameters, the tokenizer, the settings and the batch, whose size moves rounding."""
    vocabulary = digest([sorted(tokenizer.get_vocab().items()), sorted(tokenizer.all_special_ids)])
    return digest([FORMAT_VERSION, model_digest(model), vocabulary, asdict(spec), sequences_at_once])


def save_sampled(path: Path, sampled: Sampled) -> None:
    """Write the sequences, their log-likelihoods and their expert counts, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # The process id, because several runs may share a folder.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    save_file({name: tensor.contiguous().cpu() for name, tensor in vars(sampled).items()}, temporary)
    os.replace(temporary, path)


def load_sampled(path: Path) -> Sampled:
    """Read sequences back, on the CPU; raises ValueError where the file is damaged or not one of ours."""
    try:
        return Sampled(**load_file(path))
    except (SafetensorError, TypeError) as error:
        raise ValueError(f"{path} is not a complete file of sampled sequences ({error}); delete it") from error
