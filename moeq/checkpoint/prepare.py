"""Preparing a packed model: each weight takes, once, the form in which this machine multiplies it fastest.

A form of codes of 4 bits takes as much memory as a file of 4 bits in groups of 64, whatever the width.  Weights get it
while there is room beyond the bytes of the files, those first that gain most for a byte: what every token passes,
then experts, widths near 4 bits before 8, 3 and 2.  The others take the form that is as large as the file and makes the
weight anew at every call.  Weights are prepared one after another, each giving up its tensors, so that nothing is in
memory twice; what the C library holds of them is given back as they go, and the files of the checkpoint are let go.
"""

import logging
from collections import Counter
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from moeq.checkpoint import packed_forward  # noqa: F401  (registers the implementation)
from moeq.checkpoint.forms import CHOICE, Maker, Packed, extra_bytes
from moeq.checkpoint.packed import IMPLEMENTATION, PackedExpert, PackedExperts, PackedLinear
from moeq.checkpoint.release import leave_files, trim_heap
from moeq.quant.spec import Fallback

ROOM = 0.05  # of the bytes of the model
BETWEEN = 16  # weights, after which freed memory is given back: it takes milliseconds
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """What became of a model's packed weights.

    Attributes:
        forms: Weights of each form, by the form's name.
        num_bytes: Of the model in memory now, and before.
        fallbacks: Weights that the reference multiplies.
    """

    forms: dict[str, int]
    num_bytes: tuple[int, int]
    fallbacks: list[Fallback]

    @property
    def any(self) -> bool:
        """Whether the model has packed weights."""
        return bool(self.forms or self.fallbacks)

    def line(self) -> str:
        """For people."""
        now, before = self.num_bytes
        forms = ", ".join(f"{num} in {name}" for name, num in sorted(self.forms.items()))
        reasons = Counter(fallback.reason for fallback in self.fallbacks)
        slow = "".join(f", {num} by the reference ({reason})" for reason, num in sorted(reasons.items()))
        return f"packed weights: {forms or 'none prepared'}{slow}; {now / before:.3f} times the bytes of the files"


def prepare(model: PreTrainedModel, room_bytes: float | None = None) -> Prepared:
    """Prepare the packed weights of a model, on the devices where they are, and run its experts by them.

    Outputs differ from those of the reference by the roundings of the model's dtype.  ``set_experts_implementation``
    of "eager" brings the reference's loop over experts back.

    Args:
        model: In memory, in evaluation mode; without packed weights it stays as it is.
        room_bytes: Memory that may be taken beyond the bytes of the files; None for a twentieth of them.
    """
    before = model_bytes(model)
    forms: Counter[str] = Counter()
    fallbacks = []
    for index, (name, chosen) in enumerate(choose_forms(model, room_bytes).items(), 1):
        if isinstance(chosen, str):
            fallbacks.append(Fallback(name, chosen, "multiplied by the reference"))
        else:
            layer = model.get_submodule(name)
            assert isinstance(layer, PackedLinear)
            layer.prepare(chosen)
            forms[type(layer.form).__name__] += 1
            holder = model.get_submodule(name.rpartition(".")[0])
            if isinstance(holder, PackedExpert):
                holder.join()
            if index % BETWEEN == 0:
                trim_heap()
    if forms:
        leave_files(model)
        trim_heap()
    if any(isinstance(module, PackedExperts) for module in model.modules()):
        model.set_experts_implementation(IMPLEMENTATION)
    result = Prepared(dict(forms), (model_bytes(model), before), fallbacks)
    if result.any:
        _log.info(result.line())
    return result


def choose_forms(model: PreTrainedModel, room_bytes: float | None = None) -> dict[str, Maker | str]:
    """How ``prepare`` makes the form of each packed weight, by name, or why there is none."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}
    with_room = _with_room(model, layers, ROOM * model_bytes(model) if room_bytes is None else room_bytes)
    chosen: dict[str, Maker | str] = {}
    for name, layer in layers.items():
        device = layer.weight_shape.device.type if layer.form is None else "cpu"
        packed = _described(layer, model.dtype, room=name in with_room)
        chosen[name] = CHOICE[device](packed) if device in CHOICE else f"no form on {device}"
    return chosen


def model_bytes(model: nn.Module) -> int:
    """Bytes of the parameters and buffers of a model, prepared or not."""
    forms = (module.form for module in model.modules() if isinstance(module, PackedLinear))
    held = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    return held + sum(form.nbytes for form in forms if form is not None)


def _described(layer: PackedLinear, dtype: torch.dtype, *, room: bool) -> Packed:
    return Packed(layer.grid, (layer.out_features, layer.in_features), layer.weight_dtype, dtype, room)


def _with_room(model: PreTrainedModel, layers: dict[str, PackedLinear], room_bytes: float) -> set[str]:
    """Weights that may be larger than in the file, the best for their bytes first."""
    config = model.config.get_text_config()
    active: dict[str, float] = {}
    for path, experts in model.named_modules():
        if isinstance(experts, PackedExperts):
            share = getattr(config, "num_experts_per_tok", None) or 1
            active |= {f"{path}.{name}": share / len(experts) for name, _ in experts.named_modules()}
    prices = []
    for name, layer in layers.items():
        packed = _described(layer, model.dtype, room=True)
        extra = extra_bytes(packed)
        if extra is not None:
            prices.append((extra / (layer.in_features * layer.out_features * active.get(name, 1.0)), extra, name))
    taken, names = 0.0, set[str]()
    for _, extra, name in sorted(prices, key=lambda price: price[0]):
        if taken + extra <= room_bytes:
            taken += extra
            names.add(name)
    return names
