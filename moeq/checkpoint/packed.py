"""Reference modules that keep quantized weights packed and dequantize them in the forward pass.

What a weight is stored as is in ``moeq.checkpoint.packed_weight``; a *prepared* module holds it in another form, by
which it multiplies faster (``moeq.checkpoint.prepare``).  ``PackedExperts`` runs the eager loop of the
family's own experts module on weights that are made as it asks for them, so that gate function, biases, layout and
order of operations are the family's, and its output equals the dense model's bit for bit.

Shape suffixes: O out, I in, G groups, W words; N tokens, D hidden, K top-k in the comments.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moeq.checkpoint.forms import Form, Maker
from moeq.checkpoint.joined_form import joined
from moeq.checkpoint.packed_weight import PARTS, PackedFormat, dequantize_codes, packed_tensors, unpacked_weight
from moeq.models.experts import ExpertSide, as_stored, parameter_name
from moeq.quant.kinds import SUPER_BLOCK, TWO_LEVEL
from moeq.quant.packing import num_words
from moeq.quant.spec import QuantizedWeight

# Name of the implementation of experts on prepared weights, in transformers' interface.
IMPLEMENTATION = "moeq_packed"


class PackedLinear(nn.Module):
    """A linear whose weight stays packed; ``weight`` is the dequantized matrix, made on every access.

    Args:
        in_features: I.
        out_features: O.
        grid: Bits, group size and symmetry of the weight.
        scale_dtype: Dtype of the dequantized weight, and storage dtype of the scales of uniform groups.
        bias_dtype: Dtype of the bias, None for no bias.
    """

    # A model that is computed in float32 keeps the scales, to whose dtype the weights are rounded.
    fixed_dtypes = ("weight_scale", "weight_min")

    def __init__(
        self,
        in_features: int,
        out_features: int,
        grid: PackedFormat,
        scale_dtype: torch.dtype,
        bias_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.grid = in_features, out_features, grid
        self.weight_dtype = scale_dtype
        self.weight_packed = _frozen(out_features, num_words(in_features, grid.bits), dtype=torch.int32)
        self.weight_zero_point: nn.Parameter | None = None
        self.weight_min: nn.Parameter | None = None
        self.weight_sub_scale: nn.Parameter | None = None
        self.weight_sub_min: nn.Parameter | None = None
        groups = 1 if grid.group_size is None else in_features // grid.group_size
        if (kind := TWO_LEVEL.get(grid.kind)) is not None:
            supers, words = in_features // SUPER_BLOCK, num_words(groups, kind.scale_bits)
            self.weight_scale = _frozen(out_features, supers, dtype=torch.float16)
            self.weight_sub_scale = _frozen(out_features, words, dtype=torch.int32)
            if not grid.symmetric:
                self.weight_min = _frozen(out_features, supers, dtype=torch.float16)
                self.weight_sub_min = _frozen(out_features, words, dtype=torch.int32)
        else:
            self.weight_scale = _frozen(out_features, groups, dtype=scale_dtype)
            if not grid.symmetric:
                self.weight_zero_point = _frozen(num_words(out_features, grid.bits), groups, dtype=torch.int32)
        self.weight_shape = _frozen(2, dtype=torch.int64)
        self.bias = None if bias_dtype is None else _frozen(out_features, dtype=bias_dtype)
        self.kept: dict[str, Tensor] | None = None
        self.form: Form | None = None
        self._make_form: Maker | None = None

    def prepare(self, make_form: Maker) -> None:
        """Hold the weight in another form and multiply by it, without gradients, from now on.

        The tensors of the file are given up.  Whoever asks for them, or moves the module, gets them back as they were;
        asking for them leaves the module to prepare itself at its next call.
        """
        if self.form is None or make_form != self._make_form:  # more room, or less, than before
            self.hold(make_form(self.quantized()), make_form)

    def restore(self) -> None:
        """Hold the tensors of the file again."""
        if self.form is not None:
            for name, tensor in packed_tensors(self.form.quantized()).items():
                setattr(self, name, nn.Parameter(tensor, requires_grad=False))
            self.form = None

    def _take_form(self) -> Form:
        if self.form is None:
            assert self._make_form is not None
            self.hold(self._make_form(self.quantized()), self._make_form)
        assert self.form is not None
        return self.form

    def hold(self, form: Form, make_form: Maker) -> None:
        """Hold a form that was made already, instead of the tensors of the file."""
        self.form, self._make_form = form, make_form
        for name in PARTS:
            setattr(self, name, None)

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.restore()
        super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._forget_form()
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, *args: Any, **kwargs: Any) -> nn.Module:
        self._forget_form()  # another device or dtype wants another one
        return super()._apply(*args, **kwargs)

    def _forget_form(self) -> None:
        self.restore()
        self._make_form = None

    def quantized(self) -> QuantizedWeight:
        """Unpacked codes, scales and zero points."""
        if self.form is not None:
            return self.form.quantized()
        parts = {name: value.detach() for name, value in self.named_parameters() if name != "bias"}
        return unpacked_weight(parts, self.grid, (self.out_features, self.in_features), self.weight_dtype)

    @property
    def weight(self) -> Tensor:
        """Dequantized weight, [O, I], in the dtype of the scales; made on every access, or once where it is kept."""
        return made_once(self.kept, "weight", lambda: dequantize_codes(self.quantized()))

    def forward(self, hidden: Tensor) -> Tensor:
        """Linear map of [..., I] to [..., O]."""
        if self._make_form is None or (hidden.requires_grad and torch.is_grad_enabled()):
            return nn.functional.linear(hidden, self.weight.to(hidden.dtype), self.bias)
        product = self._take_form().product(hidden.reshape(-1, self.in_features))
        product = product.view(*hidden.shape[:-1], self.out_features)
        return product if self.bias is None else product.add_(self.bias)

    def extra_repr(self) -> str:
        """Sizes and grid, for ``print(model)``."""
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.grid}"


def made_once(kept: dict[str, Tensor] | None, key: str, make: Callable[[], Tensor]) -> Tensor:
    """A tensor that is made anew where nothing is kept, else at its first use."""
    if kept is None:
        return make()
    if key not in kept:
        kept[key] = make()
    return kept[key]


def keep_dequantized(model: nn.Module, room_bytes: float) -> bool:
    """Let packed modules keep the weights that they dequantize, where all of them fit; returns whether they do.

    The values are the same; a forward pass of few tokens is then several times as fast, in the memory of a dense model.

    Args:
        model: With packed modules, or without, on the device where it stays.
        room_bytes: Memory that the dequantized weights may take.
    """
    packed = [module for module in model.modules() if isinstance(module, PackedLinear)]
    experts = [module for module in model.modules() if isinstance(module, PackedExpert)]
    need = sum(m.in_features * m.out_features * m.weight_dtype.itemsize for m in packed)
    if not packed or need > room_bytes:
        return False
    inside = {id(child) for expert in experts for child in expert.children()}
    # An expert keeps gate above up in one piece; its linears would keep the same once more.
    holders: list[PackedLinear | PackedExpert] = [*experts, *(m for m in packed if id(m) not in inside)]
    for holder in holders:
        holder.kept = {}
    return True


class PackedExpert(nn.Module):
    """Projections of one expert, each a ``PackedLinear`` or a plain ``nn.Linear``; families without gate have two."""

    def __init__(self, gate_proj: nn.Module | None = None, *, up_proj: nn.Module, down_proj: nn.Module) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = gate_proj, up_proj, down_proj
        self.kept: dict[str, Tensor] | None = None
        # Gate and up as one, and the forms of each that are parts of it.
        self._joined: tuple[Form, Form, Form] | None = None

    def join(self) -> None:
        """Let prepared gate and up be one product where their forms can be, in the same memory."""
        gate, up = self.gate_proj, self.up_proj
        if isinstance(gate, PackedLinear) and isinstance(up, PackedLinear) and self._together() is None:
            self._joined = joined(gate.form, up.form)
            if self._joined is not None:
                _, gate.form, up.form = self._joined

    def into(self, x_MI: Tensor) -> Tensor:
        """Products with the projections into the expert, gate before up, [M, O of both]."""
        both = None if x_MI.requires_grad and torch.is_grad_enabled() else self._together()
        if both is not None:
            return both.product(x_MI)
        parts = [layer(x_MI) for layer in (self.gate_proj, self.up_proj) if layer is not None]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def _together(self) -> Form | None:
        """Gate and up as one, unless one of them has given up its form since."""
        if self._joined is not None:
            both, gate, up = self._joined
            if getattr(self.gate_proj, "form", None) is gate and getattr(self.up_proj, "form", None) is up:
                return both
            self._joined = None
        return None

    def _apply(self, *args: Any, **kwargs: Any) -> nn.Module:
        self._joined = None  # it would keep what the projections give up
        return super()._apply(*args, **kwargs)

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._joined = None
        super()._save_to_state_dict(*args, **kwargs)

    def weight(self, part: ExpertSide) -> Tensor:
        """Dequantized weight [O, I] of the down projection, or gate rows above up rows."""
        return made_once(self.kept, part, lambda: self._weight(part))

    def _weight(self, part: ExpertSide) -> Tensor:
        layers = (self.down_proj,) if part == "down" else (self.gate_proj, self.up_proj)
        weights = [layer.weight for layer in layers if layer is not None]
        return weights[0] if len(weights) == 1 else torch.cat(weights)  # type: ignore[arg-type, return-value]


class PackedExperts(nn.ModuleList):
    """Routed experts of one block, one module per expert; only the experts that are hit are dequantized.

    Follows the experts interface of transformers (``has_gate``, ``is_transposed``, called with hidden states, top-k
    indices and top-k weights), so that hooks on experts modules work on packed models as well.

    Args:
        source: The dense experts module; its loop, gate function, biases and settings are used, not its weights.
        experts: One expert per index.
    """

    config: Any  # of the source, among its plain settings

    def __init__(self, source: nn.Module, experts: Sequence[PackedExpert]) -> None:
        super().__init__(experts)
        # Plain settings that the family's gate function may read (limits, slopes), and the interface's own.
        self.__dict__.update({k: v for k, v in vars(source).items() if not k.startswith("_") and k != "training"})
        # Not registered: a list of experts has experts for children, and activations hold no weights.
        self.__dict__.update(source.named_children())
        weights = {parameter_name(source, part) for part in ("into", "down")}
        for name, parameter in source.named_parameters(recurse=False):
            if name not in weights:
                self.register_parameter(name, _frozen(*parameter.shape, dtype=parameter.dtype))
        self._source_class = type(source)
        self.stacks: Any = None  # of the prepared experts, on a GPU (``moeq.checkpoint.gpu_forward``)

    def _apply(self, *args: Any, **kwargs: Any) -> nn.Module:
        self.stacks = None  # it would keep what the experts give up
        return super()._apply(*args, **kwargs)

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.stacks = None
        super()._save_to_state_dict(*args, **kwargs)

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        apply_gate = self._source_class._apply_gate  # type: ignore[attr-defined]
        result: Tensor = apply_gate(self, gate_up)
        return result

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Weighted sum of the chosen experts' outputs, by the loop of the family's own module unless it is prepared.

        Args:
            hidden_states: [N, D].
            top_k_index: int64, [N, K]; an index of ``num_experts`` (a slot of another rank) is skipped.
            top_k_weights: [N, K], the multiplier of each expert's output.

        Returns:
            [N, D], in the dtype of the hidden states.
        """
        config: Any = self.config
        if config._experts_implementation == IMPLEMENTATION:
            fast: Tensor = ALL_EXPERTS_FUNCTIONS[IMPLEMENTATION](self, hidden_states, top_k_index, top_k_weights)
            return fast
        # Not every loop knows slots of other ranks.
        elsewhere = top_k_index >= len(self)
        top_k_index, top_k_weights = top_k_index.masked_fill(elsewhere, 0), top_k_weights.masked_fill(elsewhere, 0)
        eager = self._source_class.forward.__wrapped__  # type: ignore[attr-defined]
        output: Tensor = eager(_Unpacking(self, hidden_states.dtype), hidden_states, top_k_index, top_k_weights)
        return output


class _Unpacking:
    """Packed experts as the family's own loop sees them: one whose fused weights are made when they are indexed."""

    def __init__(self, experts: PackedExperts, dtype: torch.dtype) -> None:
        self._experts, self._dtype = experts, dtype
        self._parts: dict[str, ExpertSide] = {
            parameter_name(experts, "into"): "into",
            parameter_name(experts, "down"): "down",
        }

    def __getattr__(self, name: str) -> Any:
        part = self._parts.get(name)
        return getattr(self._experts, name) if part is None else _Stack(self._experts, part, self._dtype)


@dataclass(frozen=True)
class _Stack:
    """The fused parameter of one part: indexing dequantizes one expert, in the family's own layout."""

    experts: PackedExperts
    part: ExpertSide
    dtype: torch.dtype

    def __getitem__(self, expert: Tensor | int) -> Tensor:
        weight_OI = self.experts[int(expert)].weight(self.part).to(self.dtype)  # type: ignore[operator]
        return as_stored(self.experts, self.part, weight_OI)


def _frozen(*shape: int, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape, dtype=dtype), requires_grad=False)
