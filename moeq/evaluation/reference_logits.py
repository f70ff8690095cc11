"""Logits and routing of the original: it runs on every batch too, or it has run before and they are on disk.

The disk is for when the two models do not both fit.  The original runs first, over all batches, and is then released;
its logits (in its own dtype, bit for bit) and the experts that it chose (in the smallest integer dtype) wait in one
file per batch.  A file is named after the requests of its batch, so that any later evaluation with the same batches, of
another quantization say, reads it again; when it is read it is mapped into memory, not copied.

    bytes = P * V * bytes of the dtype + 2 * T * chosen experts per token, over all blocks

for P different positions whose logits are compared; 2048 of a vocabulary of 150k are 0.6 GB in bfloat16.

Shapes: P positions whose logits are computed, N predicted tokens (several may be at one position), V vocabulary, T
tokens that an experts module saw, K experts per token.
"""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Literal, cast

import torch

from moeq.disk.atomic import write_json
from moeq.disk.checked import read_checked, smallest, write_checked
from moeq.disk.digest import digest
from moeq.evaluation.result_digest import differences
from moeq.scoring.forward_plan import Plan, plan_requests
from moeq.scoring.likelihood import Scored
from moeq.scoring.pass_cost import Layout
from moeq.scoring.scorer import Said, Scorer

OriginalPlace = Literal["memory", "disk"]
# Models need room to run in: activations, caches and logits.
ROOM = 1.15
LOGITS_MANIFEST = "manifest.json"
LOGITS = "logits_PV"
ROUTING = "ids_TK:"
# Left free on the disk beyond what is needed.
SPARE_BYTES = 1 << 28
# Names, shapes and sums at the beginning of a file.
HEADER_BYTES = 1 << 15
_REMEDY = "delete it and start again: the original then runs on its batch"


def choose_mode(
    requested: Literal["auto", "memory", "disk"], model_bytes: int, original_bytes: int, free_bytes: int
) -> OriginalPlace:
    """Whether the original runs beside the model ("memory") or before it, leaving its logits ("disk").

    Args:
        requested: What the user asked for; "auto" is memory where both fit.
        model_bytes: Parameters and buffers of the model.
        original_bytes: Those of the original.
        free_bytes: Memory of the device before either is loaded.

    Raises:
        ValueError: Memory was asked for, and not even the parameters of the two fit.
    """
    both = model_bytes + original_bytes
    if requested == "memory" and both > free_bytes:
        raise ValueError(
            f"the model ({model_bytes / 1e9:.1f} GB) and its original ({original_bytes / 1e9:.1f} GB) do not both fit "
            f"into {free_bytes / 1e9:.1f} GB; choose 'disk' or 'auto'"
        )
    if requested == "auto":
        return "memory" if both * ROOM <= free_bytes else "disk"
    return requested


def plan_key(plan: Plan) -> str:
    """SHA-256 of the requests of a batch, whatever the passes that compute them."""
    return hashlib.sha256(repr((plan.requests, plan.owners)).encode()).hexdigest()[:32]


def num_bytes(plan: Plan, vocab_size: int, dtype: torch.dtype, num_choices: int = 0) -> int:
    """Bytes that a batch takes at most.

    Args:
        plan: The passes that the original runs.
        vocab_size: V.
        dtype: Dtype of its logits.
        num_choices: Experts that a token goes to, over all blocks.
    """
    num_positions = sum(len(segment.read_K) for segment in plan.segments)
    return num_positions * vocab_size * dtype.itemsize + 2 * plan.num_tokens * num_choices + HEADER_BYTES


class LiveOriginal:
    """The original in memory, as a source of what it said like ``StoredOriginal``.

    Args:
        scorer: Of the original.
    """

    def __init__(self, scorer: Scorer) -> None:
        self.scorer = scorer

    def said(self, plan: Plan) -> Said:
        """What the original says of a batch."""
        return self.scorer.said(plan)


class StoredOriginal:
    """The original's answers in a folder, which several ranks may share.

    Args:
        folder: Where they are, or will be.
        fingerprint: Identity of the original and of everything that changes its logits; see
            ``moeq.evaluation.result_digest``.

    Raises:
        ValueError: The folder holds those of another original, or files that are none.
    """

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self.folder, self.fingerprint = folder, fingerprint
        manifest = folder / LOGITS_MANIFEST
        if manifest.is_file():
            self._check(manifest)
        elif folder.exists() and any(folder.glob("*.safetensors")):
            raise ValueError(f"{folder} holds safetensors files but no {LOGITS_MANIFEST}; give a folder of its own")

    def has(self, plan: Plan) -> bool:
        """Whether the batch is stored."""
        return self._path(plan).is_file()

    def check_room(self, num_bytes: int) -> None:
        """Refuse to start writing what the disk has no room for.

        Args:
            num_bytes: Sum over the batches that are not stored yet.

        Raises:
            ValueError: It does not fit.
        """
        existing = next(path for path in (self.folder, *self.folder.absolute().parents) if path.exists())
        free = shutil.disk_usage(existing).free - SPARE_BYTES
        if num_bytes > free:
            raise ValueError(
                f"the original's logits need {num_bytes / 1e9:.1f} GB in {self.folder}, which has "
                f"{max(free, 0) / 1e9:.1f} GB left; lower num_documents, leave out the tasks of long texts, compare in "
                "a 16-bit dtype, or choose a run folder on a larger disk"
            )

    def store(self, said: Said) -> None:
        """Write a batch, atomically; the first one makes the folder.

        Raises:
            ValueError: The disk is full.
        """
        if not (manifest := self.folder / LOGITS_MANIFEST).is_file():
            write_json(manifest, {"fingerprint": self.fingerprint}, shared=True)  # every rank writes the same
        plan = said.scored.plan
        tensors = {LOGITS: said.scored.logits_KV}
        tensors |= {ROUTING + name: smallest(ids_TK) for name, ids_TK in said.routing.items()}
        metadata = {"fingerprint": digest(self.fingerprint), "layout": plan.layout}
        # No two ranks have the same batch.
        write_checked(self._path(plan), tensors, metadata)

    def said(self, plan: Plan) -> Said:
        """What the original said of a batch, mapped into memory, on the CPU; the ids are in a small integer dtype.

        Its plan is the one that the original ran: the same requests, perhaps in another layout.

        Raises:
            ValueError: It is not stored, or its file is damaged or of another original.
        """
        path = self._path(plan)
        if not path.is_file():
            raise ValueError(f"no logits of the original are stored for this batch ({path}); store it first")
        metadata, tensors = read_checked(path, _REMEDY)
        if metadata["fingerprint"] != digest(self.fingerprint):
            raise ValueError(f"{path} holds the logits of another original; {_REMEDY}")
        layout = cast(Layout, metadata["layout"])
        ran = plan if plan.layout == layout else plan_requests(plan.requests, plan.owners, layout)
        scored = Scored(ran, tensors.pop(LOGITS))
        return Said(scored, {name.removeprefix(ROUTING): ids_TK for name, ids_TK in tensors.items()})

    def _path(self, plan: Plan) -> Path:
        return self.folder / f"{plan_key(plan)}.safetensors"

    def _check(self, manifest: Path) -> None:
        try:
            before = str(json.loads(manifest.read_text(encoding="utf8"))["fingerprint"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{manifest} is damaged ({error}); delete its folder") from error
        if before != self.fingerprint:
            why = "; ".join(differences(before, self.fingerprint))
            raise ValueError(
                f"{self.folder} holds the logits of another original ({why}); delete it, or choose another"
            )


AnyOriginal = LiveOriginal | StoredOriginal
