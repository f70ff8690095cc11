"""All that a run exports: written, read back and accounted for before anything has its name."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from moeq.checkpoint.packed_weight import PackedFormat
from moeq.disk.folder import atomic_folder
from moeq.export.dense import fill_dense
from moeq.export.finished import FinishedModel, Progress
from moeq.export.made import Made
from moeq.export.moeq_format import fill_packed
from moeq.export.verify import verify_dense, verify_packed
from moeq.formats.convert import fill_format, find_format, proof, renamed
from moeq.quant.carrier import CarrierMode

# Measures a phase of this name: memory, disk and time.
Measure = Callable[[str], AbstractContextManager[None]]


@dataclass(frozen=True)
class ExportRequest:
    """What to write.

    Attributes:
        run_dir: Holds a folder for each export: ``export`` (packed), ``dense``, and one by the name of each format.
        dense: Whether a dense copy is written.
        served: Formats of runtimes.
        carrier: Of these, see ``moeq.quant.carrier``.
        replace: Whether folders that are there may be replaced.
        metadata: JSON values for the packed folder's configuration and manifest.
        seconds: Time of the run so far, for its manifest.
        made: For the cards.
    """

    run_dir: Path
    dense: bool
    served: Sequence[str]
    carrier: CarrierMode
    replace: bool
    metadata: dict[str, Any]
    seconds: float
    made: Made


@dataclass
class Written:
    """What was written.

    Attributes:
        verification: What was compared, by export.
        commands: The command that serves each format, with what was verified.
    """

    verification: dict[str, dict[str, Any]] = field(default_factory=dict)
    commands: dict[str, str] = field(default_factory=dict)


def write_exports(
    source: FinishedModel,
    tokenizer: Any,
    grids: Mapping[str, PackedFormat],
    probe: Tensor,
    request: ExportRequest,
    *,
    account: Callable[[Mapping[str, Path]], None],
    measure: Measure,
    bar: Callable[[str], Progress],
) -> Written:
    """Write all folders, and verify them; each has its name once all are.

    Args:
        source: The finished model.
        tokenizer: Of the model, or None.
        grids: Of every quantized weight, by canonical name.
        probe: [B, T], tokens to compare logits on.
        request: What to write.
        account: Accounts for every tensor of the source in folders by name; raises where something is amiss.
        measure: Around each phase.
        bar: Makes a progress bar for an export.

    Raises:
        ValueError: A folder is taken, or a format cannot hold the plan.
        ExportMismatchError: What was read back differs.
    """
    written, made, folders = Written(), request.made, {}
    with ExitStack() as names:

        def begin(name: str) -> Path:
            return names.enter_context(atomic_folder(request.run_dir / name, overwrite=request.replace))

        def verified(kind: str, name: str, report: dict[str, Any]) -> None:
            written.verification[kind] = {**report, "directory": str(request.run_dir / name)}

        folder = folders["export"] = begin("export")
        with measure("export"):
            filled = fill_packed(
                source, tokenizer, grids, folder, metadata=request.metadata, measured={"seconds": request.seconds},
                made=made, progress=bar("packed"),
            )  # fmt: skip
            verified("written", "export", filled.to_dict())
        with measure("export verified"):
            verified("checkpoint", "export", verify_packed(folder, source, probe, progress=bar("packed")).to_dict())
        if request.dense:
            folder = folders["dense"] = begin("dense")
            with measure("dense copy"):
                fill_dense(source, tokenizer, folder, made=made, progress=bar("dense"))
            with measure("dense copy verified"):
                verified("dense", "dense", verify_dense(folder, source, probe, progress=bar("dense")).to_dict())
        account(folders)
        for name in request.served:
            folder = begin(name)
            with measure(name):
                report = fill_format(
                    folders["export"], name, folder, carrier=request.carrier, progress=bar(name)
                )  # fmt: skip
            final = request.run_dir / name
            written.verification[name] = renamed(report, folder, final).to_dict()
            written.commands[name] = f"{find_format(name).serve(final)}  # {proof(report)}"
    return written
