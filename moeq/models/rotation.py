"""Rotation of the residual stream: the model computes the same, with no outliers in its weights to waste a grid on.

With the residual stream x replaced by x Q (Q orthogonal) and norms without weights, rms(x Q) = rms(x), so

    embedding E <- E Q,   readers W <- W diag(m) Q,   writers W <- Q^T W, b <- b Q,   head W <- W diag(m) Q

leave every logit as it was (QuaRot, arXiv 2404.00456, section 4; MoEQuant rotates the same, arXiv 2505.03804, 5.1).
Readers are linears, experts, routers and shared-expert gates.  Inside an attention that only averages values, a head's
values may be rotated, too, and turned back by what follows: W_v <- R^T W_v, W_o <- W_o R.

Readers are found by running the block (``norms.py``), writers by the adapter.  Every block is then run in float32
before and after, and so is the whole model in its dtype: what a family does besides is an error, never a changed model.

Legend: D hidden size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moeq.models.adapter import Adapter, is_experts_module, own_parameter
from moeq.models.axis_maps import Steps
from moeq.models.blocks import BlockCall, capture_calls, run_block, visiting
from moeq.models.heads import ValueHeads, find_value_heads, turn_values
from moeq.models.norms import (
    block_output,
    find_readers,
    norm_form,
    norm_weight,
    reader_weights,
    set_norm_weight_value,
)
from moeq.models.storage import rounded_to_storage
from moeq.quant.hadamard import Basis, RotationKind, has_hadamard, make_basis
from moeq.quant.spec import Fallback

# Rounding stays an order of magnitude below: float32 rounds to 1e-6 in a few blocks, bfloat16 weights to 1e-2.
BLOCK_TOLERANCE = 1e-4  # of what a block adds to its input, in float32
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}  # of the logits
WRITING_STAGES = ("attention_out", "mlp_down", "mlp_post")
NOT_ROTATED = "values not rotated"


@dataclass(frozen=True)
class RotationSpec:
    """How to rotate.

    Attributes:
        kind: "hadamard", or "orthogonal" for widths that no Hadamard matrix is known for.
        seed: Of the random signs, or of the random matrix.
        value_output: Also rotate the values of each attention head, where that changes nothing.
    """

    kind: RotationKind = "hadamard"
    seed: int = 0
    value_output: bool = True


@torch.no_grad()
def rotate(adapter: Adapter, ids_BT: Tensor, spec: RotationSpec) -> list[Fallback]:
    """Rotate a model in place: norms get the multiplier 1, a tied head gets a weight of its own.

    Blocks that are streamed are rotated again whenever they come.

    Args:
        adapter: The model, original weights.
        ids_BT: A few tokens, on the model's device, on which everything is compared before and after.
        spec: Which rotation.

    Returns:
        Blocks whose values could not be rotated.

    Raises:
        ValueError: The family cannot be rotated; where its logits show it, the model is changed by then.
    """
    model = adapter.model
    if model.config.get_text_config() is not model.config:  # type: ignore[operator, union-attr]
        raise _refusal(model, "features of images or sound enter its residual stream beside the embeddings")
    inputs = {"input_ids": ids_BT}
    embedding = model.get_input_embeddings().weight  # type: ignore[operator]
    basis = make_basis(embedding.shape[-1], spec.kind, spec.seed, embedding.device)
    logits: list[Tensor] = []

    def run() -> None:
        with visiting(adapter.blocks, adapter.resident):
            logits.append(model(**inputs, use_cache=False).logits)

    last = residual_norms(adapter, find_readers(model, run, without=adapter.block_prefix), embedding.shape[-1])
    calls = capture_calls(model, adapter.blocks, inputs)
    if calls[0].hidden.shape != (*ids_BT.shape, embedding.shape[-1]):
        raise _refusal(model, f"between its blocks are states of shape {tuple(calls[0].hidden.shape)}, not one stream")
    turns, fallbacks, hidden = [], [], calls[0].hidden
    for block, call in enumerate(calls):
        with adapter.resident(block):
            hidden, turn, skipped = _try_block(adapter, block, hidden, call, basis, spec)
        turns.append(turn)
        fallbacks += skipped
    adapter.residency.change_blocks(
        lambda block: _write(model, _turned_block(adapter, block, turns[block], basis, spec))
    )
    untie(model)
    ends = Steps()
    ends.turn(_name(model, model.get_input_embeddings()) + ".weight", -1, basis)  # type: ignore[operator]
    _absorb_norms(model, last, basis, ends)
    _write(model, {name: ends.value(name, model.get_parameter(name)) for name in ends.by_name})
    _write(model, _unit_norms(model, last))
    run()
    difference = _difference(logits[1], logits[0], None)
    allowed = TOLERANCE.get(adapter.storage_dtype, TOLERANCE[torch.float32])
    if not difference <= allowed:
        raise _refusal(model, f"its logits change by {difference:.2g} (allowed: {allowed:.2g})")
    return fallbacks


def residual_norms(adapter: Adapter, readers: dict[str, list[str]], width: int) -> dict[str, list[str]]:
    """Norms of the residual stream with their readers: those of the blocks themselves, and those outside of them.

    Args:
        adapter: The model.
        readers: Of norms of a resident block, or outside of the blocks.
        width: Of the residual stream.

    Raises:
        ValueError: A norm subtracts the mean, or weighs what a branch adds to the residual stream.
    """
    model, blocks = adapter.model, {f"{adapter.block_prefix}.{block}" for block in range(len(adapter.blocks))}
    found = {}
    for norm, read_by in readers.items():
        module = model.get_submodule(norm)
        inside = norm.startswith(f"{adapter.block_prefix}.") and norm.rpartition(".")[0] not in blocks
        multiplier_D, form = norm_weight(module), norm_form(module)
        assert form is not None
        if inside or len(multiplier_D) != width:
            continue
        if form.subtracts_mean:
            raise _refusal(model, f"{norm} subtracts the mean, which depends on the basis")
        if not read_by and not torch.allclose(multiplier_D, multiplier_D[0].expand_as(multiplier_D)):
            raise _refusal(model, f"{norm} has a weight per channel and is read by no linear that could absorb it")
        if read_by:
            found[norm] = read_by
    return found


def untie(model: nn.Module) -> None:
    """Give the head a weight of its own, where it shares that of the embeddings."""
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()  # type: ignore[operator]
    if head.weight is embeddings.weight:
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    config = model.config
    for each in (config, config.get_text_config()):  # type: ignore[union-attr, operator]
        each.tie_word_embeddings = False  # type: ignore[union-attr]


@dataclass(frozen=True)
class _Turn:
    """What of a block is rotated: norms with their readers, and the values of its heads."""

    norms: dict[str, list[str]]
    heads: ValueHeads | None


def _try_block(
    adapter: Adapter, block: int, hidden: Tensor, call: BlockCall, basis: Basis, spec: RotationSpec
) -> tuple[Tensor, _Turn, list[Fallback]]:
    """How a resident block can be rotated; also its output on the probe in the old basis, and what is left out."""
    model, prefix = adapter.model, f"{adapter.block_prefix}.{block}."
    module, given = adapter.blocks[block], hidden.to(call.hidden.dtype)  # between blocks it is float32 here
    readers = find_readers(module, lambda: run_block(module, given, call), prefix)
    norms = residual_norms(adapter, readers, hidden.shape[-1])
    before = block_output(adapter, block, hidden, call, {})
    turned_input, turned_output = basis(hidden).float(), basis(before).float()

    def attempt(turn: _Turn) -> float:
        values = _turned_block(adapter, block, turn, basis, spec)
        return _difference(block_output(adapter, block, turned_input, call, values), turned_output, turned_input)

    heads, reason = _value_heads(adapter, block, spec)
    turn = _Turn(norms, heads)
    difference = attempt(turn)
    if heads is not None and not difference <= BLOCK_TOLERANCE:
        reason = f"its output is not only an average of values (it would change by {difference:.2g})"
        turn = _Turn(norms, None)
        difference = attempt(turn)
    if not difference <= BLOCK_TOLERANCE:
        raise _refusal(model, f"what block {block} adds changes by {difference:.2g} (allowed: {BLOCK_TOLERANCE:.2g})")
    return before, turn, [] if reason is None else [Fallback(prefix[:-1], NOT_ROTATED, reason)]


def _turned_block(adapter: Adapter, block: int, turn: _Turn, basis: Basis, spec: RotationSpec) -> dict[str, Tensor]:
    """Rotated parameters of a resident block, by name."""
    model, steps = adapter.model, Steps()
    _absorb_norms(model, turn.norms, basis, steps)
    _turn_writers(adapter, block, basis, steps)
    if turn.heads is not None:
        embedding = model.get_input_embeddings().weight  # type: ignore[operator]
        own = make_basis(turn.heads.size, spec.kind, spec.seed + 1 + block, embedding.device)
        turn_values(model, turn.heads, own, steps)
    values = {name: steps.value(name, model.get_parameter(name)) for name in steps.by_name}
    return values | _unit_norms(model, turn.norms)


def _value_heads(adapter: Adapter, block: int, spec: RotationSpec) -> tuple[ValueHeads | None, str | None]:
    """The values to rotate, or why they are not."""
    found = find_value_heads(adapter, block) if spec.value_output else None
    if not isinstance(found, ValueHeads):
        return None, found
    if spec.kind == "hadamard" and not has_hadamard(found.size):
        return None, f"no Hadamard matrix of the size of its heads ({found.size}) is known"
    return found, None


def _absorb_norms(model: nn.Module, norms: dict[str, list[str]], basis: Basis, steps: Steps) -> None:
    for norm, readers in norms.items():
        multiplier_D = norm_weight(model.get_submodule(norm))
        for path in readers:
            for name, axis in reader_weights(model, path).items():
                steps.scale(name, axis, multiplier_D)
                steps.turn(name, axis, basis)


def _turn_writers(adapter: Adapter, block: int, basis: Basis, steps: Steps) -> None:
    """Out-features of everything that writes into the residual stream, biases included."""
    width = adapter.model.get_input_embeddings().weight.shape[-1]  # type: ignore[operator]
    for path in (path for site in adapter.sites(block) if site.stage in WRITING_STAGES for path in site.modules):
        module = adapter.model.get_submodule(path)
        experts = is_experts_module(module)
        weight, bias = ("down_proj", "down_proj_bias") if experts else ("weight", "bias")
        axis = -1 if experts and module.is_transposed else -2
        if adapter.model.get_parameter(f"{path}.{weight}").shape[axis] != width:
            continue  # writes into a narrower space, from which another linear writes
        steps.turn(f"{path}.{weight}", axis, basis)
        if own_parameter(module, bias) is not None:
            steps.turn(f"{path}.{bias}", -1, basis)


def _unit_norms(model: nn.Module, norms: dict[str, list[str]]) -> dict[str, Tensor]:
    modules = {norm: model.get_submodule(norm) for norm in norms}
    return {f"{norm}.weight": set_norm_weight_value(m, torch.ones_like(norm_weight(m))) for norm, m in modules.items()}


def _write(model: nn.Module, values: dict[str, Tensor]) -> None:
    for name, value in values.items():
        model.get_parameter(name).copy_(rounded_to_storage(model, name, value))


def _difference(after: Tensor, before: Tensor, base: Tensor | None) -> float:
    """Median over tokens of the relative difference; a token whose router was at a tie does not count."""
    after, before = after.float(), before.float()
    size_BT = (before if base is None else before - base).norm(dim=-1)
    return float(((after - before).norm(dim=-1) / size_BT).median())


def _name(model: nn.Module, wanted: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is wanted)


def _refusal(model: nn.Module, reason: str) -> ValueError:
    family = model.config.model_type  # type: ignore[union-attr]
    return ValueError(f"{family} cannot be rotated: {reason}; leave the callback Rotation out")
