"""Which weights each module of mlx-lm holds: all experts of a projection, one linear, some of its rows, or several.

Groups run along the inputs, so that rows of a quantized weight can be taken, moved and put below others' exactly.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moeq.checkpoint.names import weight_names
from moeq.formats.language_model import is_beside
from moeq.formats.mlx_family import MlxFamily
from moeq.formats.source import PackedExport, stacks

_EXPERT = re.compile(r"\.experts\.\d+\.\w+$")


@dataclass(frozen=True)
class Held:
    """What a module of mlx-lm holds.

    Attributes:
        names: Canonical names, of all experts of a projection or of linears.
        stacked: Whether they are experts, one behind the other; else the rows of one are below those of another.
        rows: Numbers of the rows of each that are here, in their order, int64 [R]; None for all as they are.
    """

    names: tuple[str, ...]
    stacked: bool
    rows: tuple[Tensor | None, ...]

    @property
    def is_whole(self) -> bool:
        """Whether it is one linear as it is."""
        return not self.stacked and self.rows == (None,)

    def shape(self, num_rows: Sequence[int], *ends: int) -> tuple[int, ...]:
        """Shape of a tensor of the module that has one row for each row of the weights.

        Args:
            num_rows: Of each whole weight.
            ends: Sizes of the dimensions behind.
        """
        here = [count if rows is None else len(rows) for count, rows in zip(num_rows, self.rows, strict=True)]
        return (len(here), here[0], *ends) if self.stacked else (sum(here), *ends)

    def take(self, index: int, tensor: Tensor) -> Tensor:
        """Those of the rows of one weight's tensor, [O, ...], that are here."""
        rows = self.rows[index]
        return tensor if rows is None else tensor[rows]

    def places(self, tensor: Tensor, num_rows: Sequence[int]) -> Iterator[Tensor]:
        """Views of a tensor of the module, see ``shape``, one for each weight."""
        if self.stacked:
            yield from tensor.unbind()
            return
        here = [count if rows is None else len(rows) for count, rows in zip(num_rows, self.rows, strict=True)]
        yield from tensor.split(here)


def find_modules(export: PackedExport, family: MlxFamily) -> dict[str, Held]:
    """What each module of mlx-lm holds, by its path there."""
    config = export.model.config.get_text_config()
    found: dict[str, Held] = {}
    for names in stacks(export).values():
        if is_beside(export.model, names[0]):
            continue
        key, leaf = export.key(names[0]), names[0].rpartition(".")[2]
        if len(names) > 1 or ".experts." in names[0]:
            path = renamed_path(_EXPERT.sub(f".{family.experts}.{family.leaves.get(leaf, leaf)}", key), family, config)
            found[path] = Held(tuple(names), len(names) > 1, (None,) * len(names))
            continue
        rows = export.shape(names[0])[0]
        for part, (target, chosen) in enumerate(_targets(leaf, rows, family, config)):
            # Files may call a weight after what it is made of, which is then of the same block.
            path = key if part == 0 and target == leaf else f"{key.rpartition('.')[0]}.{target}"
            path = renamed_path(path, family, config)
            before = found.get(path, Held((), stacked=False, rows=()))
            found[path] = Held((*before.names, names[0]), stacked=False, rows=(*before.rows, chosen))
    return found


def renamed_path(path: str, family: MlxFamily, config: Any) -> str:
    """A path or key as mlx-lm has it."""
    for old, new in family.renamed.items():
        path = path.replace(old, new)
    return family.moved(path, config)


def merged_units(model: PreTrainedModel, family: MlxFamily) -> list[list[str]]:
    """Canonical names of the linears that are one module of mlx-lm, by module."""
    found: dict[str, list[str]] = {}
    for name in weight_names(model):
        parent, _, leaf = name.rpartition(".")
        if ".experts." not in name and leaf in family.merged and not is_beside(model, name):
            found.setdefault(f"{parent}.{family.merged[leaf]}", []).append(name)
    return list(found.values())


def _targets(leaf: str, num_rows: int, family: MlxFamily, config: Any) -> list[tuple[str, Tensor | None]]:
    """Names of the modules that a linear's rows go to, and which of these."""
    if (parts := family.split.get(leaf)) is not None:
        return list(zip(parts, torch.arange(num_rows).chunk(len(parts)), strict=True))
    make: Mapping[str, Any] = family.rows
    return [(family.merged.get(leaf, leaf), make[leaf](num_rows, config) if leaf in make else None)]
