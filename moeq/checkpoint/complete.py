"""Whether a source has every tensor that its model needs, told from shapes before any value is read."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from moeq.checkpoint.affine import Part, Readable
from moeq.checkpoint.sources import Source, loading_info, made_of


@dataclass(frozen=True)
class Initial:
    """A tensor that no file has to hold: it starts as the family's own code has it."""

    name: str
    value: Tensor

    @property
    def path(self) -> Path:
        """No file."""
        return Path()

    @property
    def dtype(self) -> torch.dtype:
        """Of the values."""
        return self.value.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor."""
        return tuple(self.value.shape)

    @property
    def num_bytes(self) -> int:
        """Of the values."""
        return self.value.nbytes

    @property
    def parts(self) -> tuple[Part, ...]:
        """None in files."""
        return ()

    def read(self) -> Tensor:
        """The values."""
        return self.value.clone()


def complete(
    model: PreTrainedModel, sources: Mapping[str, Source], stored: Mapping[str, Readable]
) -> dict[str, Source]:
    """The sources of a model, with those of tensors that transformers lets a checkpoint leave out.

    Args:
        model: On the meta device.
        sources: By name of the (first) parameter.
        stored: Tensors of the files by key.

    Raises:
        ValueError: Tensors are missing, or have other shapes; the message has the first key and their number.
    """
    expected = model.state_dict()
    given = dict(_given(model, sources))
    absent = absent_tensors(model, expected.keys() - given.keys())
    optional = {name for name in absent if _may_be_absent(model, name)}
    wrong = [name for name, shape in given.items() if name in expected and shape != tuple(expected[name].shape)]
    if needed := [name for name in expected if name in absent - optional or name in wrong]:
        raise ValueError(_message(model, needed, given, stored))
    return dict(sources) | {name: Source(None, ((_initial(model, name), None),)) for name in optional}


def absent_tensors(model: PreTrainedModel, names: Iterable[str]) -> set[str]:
    """Of tensors that no file holds, those that are not tied to one that a file holds."""
    missing = set(names)
    tied = {name: {name} for name in missing}
    for target, source in model.all_tied_weights_keys.items():
        group = tied.get(target, {target}) | tied.get(source, {source})
        for name in group:
            tied[name] = group
    return {name for name in missing if tied[name] <= missing}


def missing_message(keys: Sequence[str]) -> str:
    """What is said of a source without these keys."""
    return f"the checkpoint lacks {len(keys)} tensors of the model, first {keys[0]}; download or copy it again"


def _given(model: PreTrainedModel, sources: Mapping[str, Source]) -> Iterable[tuple[str, tuple[int, ...] | None]]:
    """Shapes of everything that is made of the files; None where the parts do not fit together."""
    for name, source in sources.items():
        if source.converter is None:
            yield name, source.tensors[-1][0].shape
            continue
        info = loading_info()
        try:
            values = made_of(model, name, source, info, _without_values)
        except Exception:  # of torch, and of transformers for it: shapes that do not fit each other
            values = {}
        if info.conversion_errors or not values:
            yield name, None
        for target, value in values.items():
            yield target, tuple((value[0] if isinstance(value, list) else value).shape)


def _without_values(model: PreTrainedModel, name: str, tensor: Readable) -> Tensor:
    return torch.empty(tensor.shape, dtype=model.get_parameter_or_buffer(name).dtype, device="meta")


def _may_be_absent(model: PreTrainedModel, name: str) -> bool:
    return any(re.search(pattern, name) for pattern in model._keys_to_ignore_on_load_missing or ())


def _initial(model: PreTrainedModel, name: str) -> Initial:
    """A tensor as the initialisation of the family leaves it."""
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    held = owner._buffers if leaf in owner._buffers else owner._parameters
    empty = held[leaf]
    assert empty is not None
    values = torch.zeros(empty.shape, dtype=empty.dtype)
    held[leaf] = values if held is owner._buffers else torch.nn.Parameter(values, requires_grad=False)
    model._init_weights(owner)
    value = held[leaf].detach()  # type: ignore[union-attr]
    held[leaf] = empty
    return Initial(name, value)


def _message(
    model: PreTrainedModel,
    names: Sequence[str],
    given: Mapping[str, tuple[int, ...] | None],
    stored: Mapping[str, Readable],
) -> str:
    """In the keys of the source where its conversions can be reverted."""
    empty = {name: model.state_dict()[name] for name in names}
    try:
        keys = [key for key in revert_weight_conversion(model, dict(empty)) if key not in stored]
    except Exception:  # conversions that need the rest of a block: the model's own names will do
        keys = []
    if keys:
        return missing_message(keys)
    name = names[0]
    if name not in given:
        return missing_message(names)
    found = "parts that do not fit together" if given[name] is None else f"shape {given[name]}"
    return f"{name} has {found} in the files, the model needs {tuple(empty[name].shape)}; download or copy it again"
