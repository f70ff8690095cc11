"""The ledger: what became of every tensor of a source's files, by name, compared with those files bit for bit.

    quantized    all of it is on a grid in the packed export
    kept         every export holds the same dtype and bytes, or, where an export takes apart what the source has
                 together, the same values in parts
    changed      a step changed it on purpose; the ledger says which
    left out     no export holds it, for the reason that the ledger gives

A tensor that is none of these, or one of an export that comes from nowhere, is an error.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from moeq.checkpoint.names import expert_leaves, owned_weights
from moeq.disk.tensor_file import StoredTensor
from moeq.export.contents import Contents, read_contents
from moeq.models.experts import expert_modules, projections_of

Fate = Literal["quantized", "kept", "changed", "left out"]
# Of tensors that no model reads: made anew from the configuration by every library.
_KNOWN = {"*.rotary_emb.inv_freq": "computed from the configuration"}
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

    def to_dict(self, stored: Mapping[str, StoredTensor]) -> dict[str, Any]:
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


def make_ledger(
    source: Path, exports: Sequence[Path], grids: Mapping[str, str], reasons: Mapping[str, str]
) -> tuple[Ledger, Mapping[str, StoredTensor]]:
    """Account for every tensor of a source.

    Args:
        source: Its folder.
        exports: Folders that were made of it, packed or dense.
        grids: Grid of every quantized weight, for people, by canonical name.
        reasons: What steps changed or left out on purpose: by name of a parameter, key, or pattern of either.

    Returns:
        The ledger, not checked yet, and the tensors of the source by key.
    """
    contents = read_contents(source)
    accountant = _Accountant(contents, {path.name: read_contents(path) for path in exports}, grids, reasons)
    ledger = Ledger()
    for key in sorted(contents.stored):
        try:
            ledger.tensors[key] = accountant.entry(key)
        except LedgerError as problem:
            ledger.problems.append(str(problem))
    accountant.note_absent(ledger)
    accountant.note_added(ledger)
    return ledger, contents.stored


class _Accountant:
    def __init__(
        self, source: Contents, exports: Mapping[str, Contents], grids: Mapping[str, str], reasons: Mapping[str, str]
    ) -> None:
        self.source, self.exports, self.grids = source, exports, grids
        self.reasons = reasons
        self.patterns = {name: why for name, why in {**_KNOWN, **reasons}.items() if "*" in name}
        self.experts, self.leaves = expert_modules(source.model), expert_leaves(source.model)
        self.packed = {folder: _packed_keys(export) for folder, export in exports.items()}
        # Names that stand for one tensor, by its identity.
        self.names: dict[int, list[str]] = {}
        for name, tensor in source.model.state_dict(keep_vars=True).items():
            self.names.setdefault(id(tensor), []).append(name)
        self.known = {name for names in self.names.values() for name in names}
        self.explained: set[tuple[str, str]] = set()

    def entry(self, key: str) -> Entry:
        """What became of a tensor; raises LedgerError where that is not known."""
        parameter = self.source.parameter_of.get(key)
        if parameter is None:
            return self._unused(key)
        weights = owned_weights(parameter, key, self.experts, self.leaves)
        quantized = [name for name in weights if name in self.grids]
        if quantized and len(quantized) == len(weights):
            self._explain_quantized(key, quantized)
            return Entry("quantized", self._grid_text(quantized), parameter)
        fates = {folder: self._fate_in(folder, key, parameter, set(quantized)) for folder in self.exports}
        if set(fates.values()) == {"kept"}:
            others = f"{self._grid_text(quantized)}; {len(weights) - len(quantized)} kept"
            return Entry("quantized" if quantized else "kept", others if quantized else "", parameter)
        if set(fates.values()) <= {"kept", "tied"}:
            return Entry("left out", f"the same values as {self._tied(parameter)}", parameter)
        if "missing" not in fates.values() and (reason := self._reason(parameter, key)):
            return Entry("changed", reason, parameter)
        raise LedgerError(f"{key} ({', '.join(f'{fate} in {folder}' for folder, fate in fates.items())})")

    def _unused(self, key: str) -> Entry:
        """A tensor that no parameter is made of: carried through, or left out for a reason."""
        there = [folder for folder, export in self.exports.items() if key in export.stored]
        if not there and (reason := self._reason(key)):
            return Entry("left out", reason, None)
        if len(there) < len(self.exports):
            raise LedgerError(f"{key} (no parameter of the model, and not in every export)")
        if differing := [f for f in there if not same_bytes(self.source.stored[key], self.exports[f].stored[key])]:
            raise LedgerError(f"{key} (differs in {', '.join(differing)})")
        self.explained |= {(folder, key) for folder in there}
        return Entry("kept", "no parameter of the model", None)

    def _fate_in(self, folder: str, key: str, parameter: str, quantized: set[str]) -> str:
        """kept, tied (to another that is), differs or missing."""
        export = self.exports[folder]
        if key in export.stored and not quantized:
            self.explained.add((folder, key))
            return "kept" if same_bytes(self.source.stored[key], export.stored[key]) else "differs"
        path = parameter.rpartition(".")[0]
        if parameter in export.sources or path in self.experts:
            return "kept" if self._same_values(folder, parameter, quantized) else "differs"
        tied = self._tied(parameter)
        if tied is None or tied not in export.sources:
            return "missing"
        ours, theirs = self.source.values(parameter)[parameter], export.values(tied)[tied]
        return "tied" if torch.equal(ours, theirs) else "differs"

    def _same_values(self, folder: str, parameter: str, quantized: set[str]) -> bool:
        """Whether an export has what is not quantized of a parameter, whole or by expert and projection."""
        self._explain_codes(folder, quantized)
        return all(
            self._same_value(folder, name, value, quantized) for name, value in self.source.values(parameter).items()
        )

    def _same_value(self, folder: str, name: str, ours: Tensor, quantized: set[str]) -> bool:
        export, (path, _, leaf) = self.exports[folder], name.rpartition(".")
        if name in export.sources:
            self._explain(folder, name)
            theirs = export.values(name)[name]
            if not quantized:
                return torch.equal(ours, theirs)
            pieces = dict(projections_of(self.experts[path], leaf, theirs))
        elif path in self.experts:
            there = [piece for piece, _ in projections_of(self.experts[path], leaf, ours)]
            there = [piece for piece in there if f"{path}.{piece}" in export.sources]
            pieces = {piece: export.values(f"{path}.{piece}")[f"{path}.{piece}"] for piece in there}
            for piece in there:
                self._explain(folder, f"{path}.{piece}")
        else:
            return False
        return all(
            piece in pieces and torch.equal(value, pieces[piece])
            for piece, value in projections_of(self.experts[path], leaf, ours)
            if f"{path}.{piece}".removesuffix(".weight") not in quantized
        )

    def _explain_quantized(self, key: str, weights: Sequence[str]) -> None:
        """A dense export has values of its own under the same key; their shape must be that of the source."""
        for folder, export in self.exports.items():
            if key in export.stored:
                if self.source.stored[key].shape != export.stored[key].shape:
                    raise LedgerError(f"{key} (of another shape in {folder})")
                self.explained.add((folder, key))
            elif not all(self.packed[folder].get(weight) for weight in weights):
                raise LedgerError(f"{key} (neither codes nor values in {folder})")
            self._explain_codes(folder, weights)

    def _explain(self, folder: str, parameter: str) -> None:
        self.explained |= {(folder, tensor.name) for tensor, _ in self.exports[folder].sources[parameter].tensors}

    def _explain_codes(self, folder: str, weights: Iterable[str]) -> None:
        self.explained |= {(folder, key) for weight in weights for key in self.packed[folder].get(weight, ())}

    def _tied(self, parameter: str) -> str | None:
        tensor = self.source.model.get_parameter_or_buffer(parameter)  # type: ignore[operator]
        return next((name for name in self.names[id(tensor)] if name != parameter), None)

    def _reason(self, *names: str) -> str | None:
        """Why something is not as it was: by a name, or else by the first pattern that one matches."""
        if exact := next((self.reasons[name] for name in names if name in self.reasons), None):
            return exact
        return next((why for p, why in self.patterns.items() if any(fnmatchcase(name, p) for name in names)), None)

    def _grid_text(self, names: Sequence[str]) -> str:
        grids = ", ".join(sorted({self.grids[name] for name in names}))
        return f"{names[0] if len(names) == 1 else f'{len(names)} weights'}: {grids}"

    def note_absent(self, ledger: Ledger) -> None:
        """Parameters that no tensor of the source makes."""
        for names in self.names.values():
            if self.source.sources.keys().isdisjoint(names):
                ledger.absent[names[0]] = "not in the source's files"

    def note_added(self, ledger: Ledger) -> None:
        """Tensors of the exports that are none of the source's."""
        for folder, export in self.exports.items():
            for key in sorted(export.stored):
                if (folder, key) in self.explained:
                    continue
                parameter = export.parameter_of.get(key, "")
                if parameter in self.known and (reason := self._reason(parameter, key)):
                    ledger.added[f"{folder}/{key}"] = reason
                else:
                    ledger.problems.append(f"{folder}/{key} (not of the source)")


def same_bytes(ours: StoredTensor, theirs: StoredTensor) -> bool:
    """Whether two tensors of files have one dtype, one shape and the same bytes."""
    if (ours.dtype, ours.shape) != (theirs.dtype, theirs.shape):
        return False
    return torch.equal(ours.read().flatten().view(torch.uint8), theirs.read().flatten().view(torch.uint8))


def _packed_keys(export: Contents) -> dict[str, list[str]]:
    """Keys of the parts of every quantized weight (codes, scales, zero points, shape) by its canonical name."""
    found: dict[str, list[str]] = {}
    for name, source in export.sources.items():
        weight, packed, _ = name.rpartition(".weight_")
        if packed:
            found.setdefault(weight, []).extend(tensor.name for tensor, _ in source.tensors)
    return found
