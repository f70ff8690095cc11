"""Finding out what became of every tensor of a source: its files and those of its exports, compared bit for bit."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor

from moeq.checkpoint.affine import Readable
from moeq.checkpoint.names import expert_leaves, owned_weights
from moeq.checkpoint.sources import raw_tensors
from moeq.export.carried import same_bytes
from moeq.export.contents import Contents, read_contents
from moeq.export.ledger import Entry, Ledger, LedgerError
from moeq.models.experts import expert_modules, projections_of


def make_ledger(
    source: Path,
    exports: Mapping[str, Path],
    grids: Mapping[str, str],
    reasons: Mapping[str, str],
    rounded: torch.dtype | None = None,
    *,
    trust_remote_code: bool = False,
) -> tuple[Ledger, Mapping[str, Readable]]:
    """Account for every tensor of a source.

    Args:
        source: Its folder.
        exports: Folders that were made of it, packed or dense, by name.
        grids: Grid of every quantized weight, for people, by canonical name.
        reasons: What steps changed or left out on purpose: by name of a parameter, key, or pattern of either.
        rounded: Dtype that the user asked for in the place of the source's.
        trust_remote_code: Run code that comes with the source, of which exports have a copy.

    Returns:
        The ledger, not checked yet, and the tensors of the source by key.
    """
    contents = read_contents(source, trust_remote_code=trust_remote_code)
    made = {name: read_contents(folder, trust_remote_code=trust_remote_code) for name, folder in exports.items()}
    accountant = _Accountant(contents, made, grids, reasons, rounded)
    ledger, raw, used = Ledger(), raw_tensors(source), set()
    for key in sorted(contents.stored):
        parts = contents.stored[key].parts
        try:
            entry = accountant.entry(key)
        except LedgerError as problem:
            ledger.problems.append(str(problem))
        else:
            ledger.tensors |= {part.name: _of_part(entry, key, parts) for part in parts}
        used |= {part.name for part in parts}
    unused = Entry("left out", "of activations or caches, which are not quantized", None)
    ledger.tensors |= dict.fromkeys(sorted(raw.keys() - used), unused)
    accountant.note_absent(ledger)
    accountant.note_added(ledger)
    return ledger, raw


def _of_part(entry: Entry, key: str, parts: Sequence[Readable]) -> Entry:
    """The entry of a tensor of the files, of several that are one weight where the source is quantized."""
    if entry.parameter is None or [part.name for part in parts] == [key]:
        return entry
    dtypes = ", ".join(str(part.dtype).removeprefix("torch.") for part in parts)
    return replace(entry, detail="; ".join([*filter(None, [entry.detail]), f"dequantized ({dtypes})"]))


class _Accountant:
    def __init__(
        self,
        source: Contents,
        exports: Mapping[str, Contents],
        grids: Mapping[str, str],
        reasons: Mapping[str, str],
        rounded: torch.dtype | None,
    ) -> None:
        self.source, self.exports, self.grids = source, exports, grids
        self.reasons, self.rounded = reasons, rounded
        self.patterns = {name: why for name, why in reasons.items() if "*" in name}
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
        if set(fates.values()) == {"rounded"}:
            return Entry("changed", f"rounded to {str(self.rounded).removeprefix('torch.')} as asked", parameter)
        if "missing" not in fates.values() and (reason := self._reason(parameter, key)):
            return Entry("changed", reason, parameter)
        raise LedgerError(f"{key} ({', '.join(f'{fate} in {folder}' for folder, fate in fates.items())})")

    def _unused(self, key: str) -> Entry:
        """A tensor that no parameter is made of: carried through as it is, or left out for a reason."""
        parts = self.source.stored[key].parts
        raw = [
            (folder, part, export.stored.get(part.name)) for folder, export in self.exports.items() for part in parts
        ]
        if not any(theirs for *_, theirs in raw) and (reason := self._reason(*(part.name for part in parts))):
            return Entry("left out", reason, None)
        for folder, part, theirs in raw:
            if theirs is None or not same_bytes(part, theirs):
                fate = "missing" if theirs is None else "differs"
                raise LedgerError(f"{part.name} (no parameter of the model, {fate} in {folder})")
            self.explained.add((folder, part.name))
        return Entry("kept", "no parameter of the model", None)

    def _fate_in(self, folder: str, key: str, parameter: str, quantized: set[str]) -> str:
        """kept, rounded (as asked), tied (to another that is), differs or missing."""
        export = self.exports[folder]
        if key in export.stored and not quantized:
            self.explained.add((folder, key))
            ours, theirs = self.source.stored[key], export.stored[key]
            return "kept" if same_bytes(ours, theirs) else "rounded" if self._is_rounded(ours, theirs) else "differs"
        path = parameter.rpartition(".")[0]
        if parameter in export.sources or path in self.experts:
            return "kept" if self._same_values(folder, parameter, quantized) else "differs"
        tied = self._tied(parameter)
        if tied is None or tied not in export.sources:
            return "missing"
        same = torch.equal(self.source.values(parameter)[parameter], export.values(tied)[tied])
        return "tied" if same else "differs"

    def _is_rounded(self, ours: Readable, theirs: Readable) -> bool:
        return theirs.dtype == self.rounded and torch.equal(ours.read().to(theirs.dtype), theirs.read())

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
        tensor = self.source.model.get_parameter_or_buffer(parameter)
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


def _packed_keys(export: Contents) -> dict[str, list[str]]:
    """Keys of the parts of every quantized weight (codes, scales, zero points, shape) by its canonical name."""
    found: dict[str, list[str]] = {}
    for name, source in export.sources.items():
        weight, packed, _ = name.rpartition(".weight_")
        if packed:
            found.setdefault(weight, []).extend(tensor.name for tensor, _ in source.tensors)
    return found
