"""The ledger: what became of every tensor of a source's files, by name.

    quantized    all of it is on a grid in the packed export
    kept         every export holds the same dtype and bytes, or, where an export takes apart what the source has
                 together, the same values in parts
    changed      a step changed it on purpose; the ledger says which
    left out     no export holds it, for the reason that the ledger gives

A tensor that is none of these, or one of an export that comes from nowhere, is an error.  ``accounting.py`` finds out.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from moeq.checkpoint.affine import Readable

Fate = Literal["quantized", "kept", "changed", "left out"]
_SHOWN = 5


class LedgerError(ValueError):
    """Tensors are not accounted for."""


@dataclass(frozen=True)
class Entry:
    """What became of one tensor of the source.

    Attributes:
        fate: One word.
        detail: The weights and their grids, the step that changed it, or the reason why it is left out.
        parameter: Of the model that it is part of; None where no parameter is.
    """

    fate: Fate
    detail: str
    parameter: str | None


@dataclass
class Ledger:
    """All entries.

    Attributes:
        tensors: By key of the source.
        absent: Parameters that the source does not have, with the reason.
        added: Tensors of an export that the source does not have, by folder and key, with the reason.
        problems: What is not accounted for.
    """

    tensors: dict[str, Entry] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    added: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def counts(self) -> dict[str, int]:
        """Tensors by fate."""
        return dict(sorted(Counter(entry.fate for entry in self.tensors.values()).items()))

    def to_dict(self, stored: Mapping[str, Readable]) -> dict[str, Any]:
        """As plain values, with file, dtype and shape of each tensor."""
        return {
            "counts": self.counts,
            "tensors": {
                key: {**asdict(entry), "file": stored[key].path.name, "dtype": str(stored[key].dtype).removeprefix(
                    "torch."), "shape": list(stored[key].shape)}
                for key, entry in self.tensors.items()
            },
            "absent": self.absent,
            "added": self.added,
        }  # fmt: skip

    def check(self) -> None:
        """Raise LedgerError where something is not accounted for."""
        if self.problems:
            more = f", and {len(self.problems) - _SHOWN} more" if len(self.problems) > _SHOWN else ""
            raise LedgerError(
                f"{len(self.problems)} tensors are not accounted for: {'; '.join(self.problems[:_SHOWN])}{more}; "
                "the export is not what was made of the source: report it with ledger.json"
            )
