"""Verification of an export: reload it as a user would, and compare it bit for bit with what was evaluated."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import moeq.checkpoint.quantizer  # noqa: F401  (registers the quantization method that from_pretrained needs)
from moeq.checkpoint.names import dense_weight
from moeq.checkpoint.packed import PackedLinear, dequantize_codes
from moeq.disk.folder import check_integrity
from moeq.models.experts import expert_modules
from moeq.models.storage import is_widened, storage_dtype, widen
from moeq.quant.spec import QuantizedWeight

_SHOWN = 8  # names in an error message
_ALIGNMENT = 64  # bytes; what torch's own CPU allocator gives


class ExportMismatchError(ValueError):
    """The files on disk do not hold what was evaluated."""


@dataclass(frozen=True)
class VerificationReport:
    """What was compared, all of it equal.

    Attributes:
        directory: The folder.
        num_quantized: Quantized weights whose codes, scales and zero points are equal bit for bit.
        num_other: Other tensors that are equal bit for bit.
        num_tokens: Tokens whose logits were compared.
        logits_equal: The logits are equal bit for bit.
        max_logit_difference: Largest absolute difference of a logit.
    """

    directory: str
    num_quantized: int
    num_other: int
    num_tokens: int
    logits_equal: bool
    max_logit_difference: float

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values."""
        return asdict(self)


def verify_checkpoint(
    directory: Path | str,
    model: PreTrainedModel,
    quantized: dict[str, QuantizedWeight],
    input_ids: Tensor,
    *,
    logit_tolerance: float = 0.0,
) -> VerificationReport:
    """Reload a packed checkpoint and compare it with the dense model and the codes it was made from.

    Args:
        directory: Folder of the packed checkpoint.
        model: Dense model that holds the dequantized values.
        quantized: Codes by canonical weight name.
        input_ids: [B, T], tokens to compare logits on.
        logit_tolerance: Largest allowed difference of a logit; above 0 only for devices whose sums have no fixed order.

    Raises:
        ValueError: The folder is damaged.
        ExportMismatchError: Tensors or logits differ; it names the tensors.
    """
    check_integrity(directory)
    reloaded = _reload(directory, model)
    layers = {name: module for name, module in reloaded.named_modules() if isinstance(module, PackedLinear)}
    _raise_for(directory, "quantized weights", sorted(set(layers) ^ set(quantized)))
    differing = []
    for name, layer in layers.items():
        differing += [f"{name} ({part})" for part in _differences(layer.quantized(), quantized[name])]
    _raise_for(directory, "quantized weights", differing)
    experts = expert_modules(model)
    stale = [n for n, w in quantized.items() if not _stands_for(w, dense_weight(model, n, experts), model)]
    _raise_for(directory, "dequantized weights of the model", stale)
    others = _unquantized(reloaded, model)
    differing = [name for name, (ours, theirs) in others.items() if not _same(ours, theirs)]
    _raise_for(directory, "tensors", differing + _other_dtypes(reloaded, model, others))
    equal, difference = _compare_logits(directory, reloaded, model, input_ids, logit_tolerance)
    return VerificationReport(str(directory), len(quantized), len(others), input_ids.numel(), equal, difference)


def verify_dense(
    directory: Path | str, model: PreTrainedModel, input_ids: Tensor, *, logit_tolerance: float = 0.0
) -> VerificationReport:
    """Reload a dense export and compare its tensors and logits with the model.

    Raises:
        ValueError: The folder is damaged.
        ExportMismatchError: Tensors or logits differ; it names the tensors.
    """
    check_integrity(directory)
    reloaded = _reload(directory, model)
    ours, theirs = reloaded.state_dict(), model.state_dict()
    _raise_for(directory, "tensors", sorted(set(ours) ^ set(theirs)))
    differing = [name for name in ours if not _same(ours[name], theirs[name])]
    _raise_for(directory, "tensors", differing + _other_dtypes(reloaded, model, ours))
    equal, difference = _compare_logits(directory, reloaded, model, input_ids, logit_tolerance)
    return VerificationReport(str(directory), 0, len(ours), input_ids.numel(), equal, difference)


def _reload(directory: Path | str, model: PreTrainedModel) -> PreTrainedModel:
    """The model as a user opens it, then in the dtype that the evaluated model computes in."""
    reloaded = AutoModelForCausalLM.from_pretrained(directory, attn_implementation=model.config._attn_implementation)
    if is_widened(model):
        widen(reloaded)
    return reloaded.to(model.device).eval()


def _unquantized(reloaded: PreTrainedModel, model: PreTrainedModel) -> dict[str, tuple[Tensor, Tensor | None]]:
    """Every tensor outside packed linears with its counterpart in the dense model."""
    packed = {name for name, module in reloaded.named_modules() if isinstance(module, PackedLinear)}
    dense, experts = model.state_dict(), expert_modules(model)
    pairs = {}
    for name, tensor in reloaded.state_dict().items():
        owner, _, leaf = name.rpartition(".")
        if owner in packed and leaf != "bias":
            continue
        # An expert projection that is not quantized is a linear here and a slice of one parameter there.
        counterpart = dense[name] if name in dense else dense_weight(model, owner, experts)
        pairs[name] = (tensor, counterpart)
    return pairs


def _differences(ours: QuantizedWeight, theirs: QuantizedWeight) -> Iterator[str]:
    if (ours.bits, ours.group_size) != (theirs.bits, theirs.group_size):
        yield "grid"
    for part in ("codes_OI", "scale_OG", "zero_point_OG"):
        if not _same(getattr(ours, part), getattr(theirs, part)):
            yield part


def _same(ours: Tensor | None, theirs: Tensor | None) -> bool:
    if ours is None or theirs is None:
        return ours is theirs
    return ours.dtype == theirs.dtype and torch.equal(ours, theirs.to(ours.device))


def _stands_for(quantized: QuantizedWeight, weight_OI: Tensor, model: PreTrainedModel) -> bool:
    """Whether codes give exactly a weight of the model, and in the dtype that its file has for it."""
    real_OI = dequantize_codes(quantized)
    stored = storage_dtype(model) if is_widened(model) else weight_OI.dtype
    return real_OI.dtype == stored and _same(real_OI.to(weight_OI.dtype), weight_OI)


def _other_dtypes(reloaded: PreTrainedModel, model: PreTrainedModel, names: Iterable[str]) -> list[str]:
    """Tensors of a widened model that the export holds in another dtype than the source; values are compared apart."""
    if not is_widened(model):
        return []
    return [name for name in names if storage_dtype(reloaded, name) != storage_dtype(model, name)]


def _raise_for(directory: Path | str, what: str, names: list[str]) -> None:
    if names:
        shown = ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
        raise ExportMismatchError(
            f"{len(names)} {what} differ between {directory} and the evaluated model: {shown}; export again"
        )


@torch.no_grad()
def _compare_logits(
    directory: Path | str,
    reloaded: PreTrainedModel,
    model: PreTrainedModel,
    input_ids: Tensor,
    tolerance: float,
) -> tuple[bool, float]:
    """Whether logits are equal, and their largest difference; raises beyond the tolerance."""
    input_ids = input_ids.to(model.device)
    logits = []
    for one in (reloaded, model):
        _align(one)
        with _eager_experts(one):
            logits.append(one(input_ids=input_ids, use_cache=False).logits)
    equal = torch.equal(logits[0], logits[1])
    difference = 0.0 if equal else (logits[0].float() - logits[1].float()).abs().max().item()
    tolerance = max(tolerance, _rounding(logits[1]))
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


def _align(model: PreTrainedModel) -> None:
    """Move parameters to aligned memory.

    ``from_pretrained`` maps files into memory, where tensors start at any multiple of 8 bytes, and matrix products
    in float32 on a CPU may sum in another order for such operands: equal weights would give unequal logits.
    """
    for parameter in model.parameters():
        if parameter.device.type == "cpu" and parameter.data_ptr() % _ALIGNMENT:
            parameter.data = parameter.data.clone()


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
