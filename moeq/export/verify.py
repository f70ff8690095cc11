"""Verification of an export: read it back, and compare it bit for bit with what was evaluated, block by block."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moeq.checkpoint.loading import align
from moeq.disk.folder import check_integrity
from moeq.export.carried import check_carried
from moeq.export.compare import Compare, ExportMismatchError, compare_dense, compare_packed, raise_for
from moeq.export.finished import FinishedModel, Progress, silent
from moeq.export.reopen import reopen
from moeq.models.adapter import find_blocks
from moeq.models.blocks import visiting

__all__ = ["ExportMismatchError", "VerificationReport", "verify_dense", "verify_packed"]


@dataclass(frozen=True)
class VerificationReport:
    """What was compared, all of it equal.

    Attributes:
        directory: The folder.
        num_quantized: Quantized weights whose codes, scales and zero points are equal bit for bit.
        num_other: Other tensors that are equal bit for bit.
        num_carried: Tensors that the model does not have, equal to the source's files byte by byte.
        num_tokens: Tokens whose logits were compared.
        logits_equal: The logits are equal bit for bit.
        max_logit_difference: Largest absolute difference of a logit.
    """

    directory: str
    num_quantized: int
    num_other: int
    num_carried: int
    num_tokens: int
    logits_equal: bool
    max_logit_difference: float

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values."""
        return asdict(self)


def verify_packed(
    directory: Path | str,
    source: FinishedModel,
    input_ids: Tensor,
    *,
    logit_tolerance: float = 0.0,
    progress: Progress = silent,
) -> VerificationReport:
    """Read a packed checkpoint back and compare it with the dense model and the codes it was made from.

    Args:
        directory: Folder of the packed checkpoint.
        source: Dense model, finished block by block, and its codes.
        input_ids: [B, T], tokens to compare logits on.
        logit_tolerance: Largest allowed difference of a logit; above 0 only for devices whose sums have no fixed order.
        progress: Shows how many blocks are compared.

    Raises:
        ValueError: The folder is damaged.
        ExportMismatchError: Tensors or logits differ; it names the tensors.
    """
    return _verify(directory, source, compare_packed, input_ids, logit_tolerance, progress)


def verify_dense(
    directory: Path | str,
    source: FinishedModel,
    input_ids: Tensor,
    *,
    logit_tolerance: float = 0.0,
    progress: Progress = silent,
) -> VerificationReport:
    """Read a dense export back and compare its tensors and logits with the model; see ``verify_packed``.

    Raises:
        ValueError: The folder is damaged.
        ExportMismatchError: Tensors or logits differ; it names the tensors.
    """
    return _verify(directory, source, compare_dense, input_ids, logit_tolerance, progress)


def _verify(
    directory: Path | str,
    source: FinishedModel,
    compare: Compare,
    input_ids: Tensor,
    tolerance: float,
    progress: Progress,
) -> VerificationReport:
    check_integrity(directory)
    reopened = reopen(directory, source.model)
    carried = source.origin.carried
    raise_for(directory, "tensors", sorted(set(reopened.unexpected) - carried.keys()))
    check_carried(directory, carried)
    counts = [compare(directory, reopened, source, None)]
    shown = iter(progress(source.block_indices, "verifying"))

    @contextmanager
    def compared(block: int) -> Iterator[None]:
        next(shown, None)
        with source.finished(block):
            counts.append(compare(directory, reopened, source, block))
            yield

    align(source.model)
    theirs = _logits(source.model, compared, input_ids)
    next(shown, None)  # the bar ends
    ours = _logits(reopened.model, reopened.resident, input_ids)
    equal, difference = _compare_logits(directory, ours, theirs, tolerance)
    num_quantized, num_other = (sum(numbers) for numbers in zip(*counts, strict=True))
    num_tokens = input_ids.numel()
    return VerificationReport(str(directory), num_quantized, num_other, len(carried), num_tokens, equal, difference)


@torch.no_grad()
def _logits(
    model: PreTrainedModel, resident: Callable[[int], AbstractContextManager[None]], input_ids: Tensor
) -> Tensor:
    """Logits of a model whose blocks are there only while they run."""
    with _eager_experts(model), visiting(find_blocks(model)[1], resident):
        logits: Tensor = model(input_ids=input_ids.to(model.device), use_cache=False).logits
    return logits


def _compare_logits(directory: Path | str, ours: Tensor, theirs: Tensor, tolerance: float) -> tuple[bool, float]:
    """Whether logits are equal, and their largest difference; raises beyond the tolerance."""
    equal = torch.equal(ours, theirs)
    difference = 0.0 if equal else (ours.float() - theirs.float()).abs().max().item()
    tolerance = max(tolerance, _rounding(theirs))
    if not difference <= tolerance:  # also for NaN
        raise ExportMismatchError(
            f"logits of {directory} differ from the evaluated model's by up to {difference:.3g} (allowed: "
            f"{tolerance:.3g}) although all tensors are equal; run both on one device, or allow a tolerance on a GPU"
        )
    return equal, difference


def _rounding(logits: Tensor) -> float:
    """What logits of equal tensors may differ by: nothing, but on a CPU below AVX-512 in float32.

    There MKL sums in an order that depends on where its operands lie, activations included (seen with jamba).  The
    difference is reported all the same.
    """
    ordered = logits.device.type != "cpu" or torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return 0.0 if ordered or logits.dtype != torch.float32 else 1e-5 * logits.abs().max().item()


@contextmanager
def _eager_experts(model: PreTrainedModel) -> Iterator[None]:
    """Run experts by transformers' own loop: other implementations sum in other orders."""
    before, training = model.get_experts_implementation(), model.training
    model.set_experts_implementation("eager")
    model.eval()
    try:
        yield
    finally:
        model.set_experts_implementation(before)
        model.train(training)
