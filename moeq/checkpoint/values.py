"""Values of a model without weights, as its files have them: read, converted and put in their place one by one."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moeq.checkpoint.affine import Readable
from moeq.checkpoint.complete import missing_message
from moeq.checkpoint.sources import Source, loading_info, made_of


class FileValues:
    """Gives a model its tensors.

    Args:
        model: On the meta device, in the dtypes that it holds.
        sources: By name of the (first) parameter that is made of them.
    """

    def __init__(self, model: PreTrainedModel, sources: Mapping[str, Source]) -> None:
        self._model, self._sources = model, dict(sources)
        self._device = torch.device("cpu")

    @property
    def stored(self) -> dict[str, tuple[Readable, ...]]:
        """Tensors of the source by the (first) parameter that is made of them."""
        return {name: tuple(tensor for tensor, _ in source.tensors) for name, source in self._sources.items()}

    def load_all(self) -> None:
        """Load every tensor; what is made of the files one by one is all that is in memory beside the model.

        Raises:
            ValueError: A tensor cannot be made of the files.
        """
        self.load(list(self._sources))
        self.tie()
        if absent := [name for name, tensor in named_tensors(self._model) if tensor.is_meta]:
            raise ValueError(missing_message(absent))

    def load(self, names: Sequence[str]) -> None:
        """Load the tensors of some sources, by name of their first parameter."""
        for name, value in self.values(names):
            put(self._model, name, value)

    def tie(self) -> None:
        """Tie weights as ``from_pretrained`` does: not those that files hold with different values."""
        tied = self._model.all_tied_weights_keys.items()
        missing = {name for pair in tied for name in pair if self._model.get_parameter_or_buffer(name).is_meta}
        self._model.tie_weights(missing_keys=missing, recompute_mapping=False)

    def values(self, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        """Values of parameters and buffers by name, on the device and in the dtypes that the model declares."""
        info = loading_info()
        for name in names:
            for target, value in made_of(self._model, name, self._sources[name], info).items():
                tensor = value[0] if isinstance(value, list) else value
                yield target, _as_declared(self._model, target, tensor, self._device)
        if info.conversion_errors:
            name, error = next(iter(info.conversion_errors.items()))
            raise ValueError(f"{name} could not be made of the tensors of its files: {error}")


def put(model: nn.Module, name: str, value: Tensor) -> None:
    """Give a parameter or buffer its value."""
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    if leaf in owner._buffers:
        owner._buffers[leaf] = value
    else:
        owner._parameters[leaf] = parameter = nn.Parameter(value, requires_grad=False)
        parameter._is_hf_initialized = True  # type: ignore[attr-defined]


def named_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters and buffers by name."""
    return [*module.named_parameters(), *module.named_buffers()]


def _as_declared(model: nn.Module, name: str, value: Tensor, device: torch.device) -> Tensor:
    """The value of a parameter or buffer in the dtype that the model declares for it."""
    empty = model.get_parameter_or_buffer(name)  # type: ignore[operator]
    if value.shape != empty.shape:
        raise ValueError(f"{name} has shape {tuple(value.shape)} in the files, the model needs {tuple(empty.shape)}")
    return value.to(device, empty.dtype)
