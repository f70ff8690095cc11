"""Tensors of a source's files that no parameter of the model is made of: they travel into exports byte by byte.

Draft layers for speculative decoding are the usual ones: transformers does not make them, servers do.  Left out, with a
reason, are rotary frequencies, which a model computes.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from moeq.checkpoint.affine import Readable
from moeq.checkpoint.sources import raw_tensors

_COMPUTED = re.compile(r"(^|\.)(\w*inv_freq|rotary_emb\.(cos|sin)_cached)$")
_DRAFT_PART = re.compile(r"(^|\.)(mtp|nextn)(_\w+)?(\.|$)")
# Of the language model, not of a tower beside it.
_LAYER = re.compile(r"^(model\.)?(language_model\.)?(model\.)?layers\.(\d+)\.")


@dataclass(frozen=True)
class Unused:
    """Tensors of files that no parameter of a model is made of, by key.

    Attributes:
        draft: Of layers for speculative decoding.
        others: Of anything else that the model does not have.
        reasons: Why a key is neither.
    """

    draft: dict[str, Readable]
    others: dict[str, Readable]
    reasons: dict[str, str]


def unused_tensors(model: PreTrainedModel, stored: Mapping[str, Readable], mapping: Iterable[Any]) -> Unused:
    """Sort out what a model does not take from files.

    Args:
        model: The model, with or without values.
        stored: Tensors of the files by key.
        mapping: Conversions from the files to the model, in loading direction.
    """
    rename = _Renaming(model, list(mapping))
    num_blocks = int(model.config.get_text_config().num_hidden_layers)
    found = Unused({}, {}, {})
    for key, tensor in stored.items():
        if rename.is_used(key):
            continue
        if _COMPUTED.search(key):
            found.reasons[key] = "rotary frequencies, which the model computes"
            continue
        kind = found.draft if is_draft(key, num_blocks) else found.others
        # What the files hold of it: a quantized weight is several tensors.
        kind.update({part.name: part for part in tensor.parts})
    return found


def is_draft(key: str, num_blocks: int) -> bool:
    """Whether a tensor of a file belongs to a draft layer: by name, or behind the last block of the model."""
    layer = _LAYER.search(key)
    return bool(_DRAFT_PART.search(key)) or (layer is not None and int(layer[4]) >= num_blocks)


def check_carried(directory: Path | str, carried: Mapping[str, Readable]) -> None:
    """Compare what an export carries with its source, byte by byte.

    Raises:
        ValueError: A tensor is missing or differs; it is named.
    """
    ours = raw_tensors(Path(directory))
    for key, theirs in carried.items():
        if key not in ours or not same_bytes(ours[key], theirs):
            raise ValueError(f"{key} of {directory} is not that of {theirs.path}; export again")


def same_bytes(ours: Readable, theirs: Readable) -> bool:
    """Whether two tensors of files have one dtype, one shape and the same bytes."""
    if (ours.dtype, ours.shape) != (theirs.dtype, theirs.shape):
        return False
    return torch.equal(ours.read().flatten().view(torch.uint8), theirs.read().flatten().view(torch.uint8))


class _Renaming:
    """Keys of files as transformers renames them for a model."""

    def __init__(self, model: PreTrainedModel, mapping: list[Any]) -> None:
        self._renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self._known, self._prefix = model.state_dict(), model.base_model_prefix

    def is_used(self, key: str) -> bool:
        """Whether a parameter or buffer is made of a key."""
        if key in self._known:
            return True
        renamings, converters = self._renamings, self._converters
        name, _ = rename_source_key(key, renamings, converters, self._prefix, self._known)
        return name in self._known or rename_source_key(key, [], [], self._prefix, self._known)[0] in self._known
