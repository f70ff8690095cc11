"""What a family is to mlx-lm: what its class expects of files and reads of a configuration."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class MlxFamily:
    """A family as mlx-lm reads it.

    Attributes:
        experts: Name, below their block's module, under which all experts of a projection are one tensor.
        leaves: Names of projections there, where they are not ours.
        renamed: Parts of the files' names that its class calls otherwise.
        moved: Made of a name and the configuration, after ``renamed``, where blocks of several kinds have several
            names for the same.
        split: Linears whose rows are, in equal parts, several modules there, by last parts of their names.
        merged: Linears that are one module there, by last parts of their names: the rows of one below another's.
        rows: Made of the number of rows of a linear, by the last part of its name, and of the configuration: the
            order in which it has them, int64 [O].
        keys: Of the configuration, which its class requires and sources need not have.
        made: The same, made of the configuration, in place of what a source has under this name.
        computed: The values with which it computes, of settings that it does not read.
        has_tied_head: Whether it reads ``tie_word_embeddings``.
        rope_types: Rotary embeddings that it computes.
        taken_apart: Last parts of names of linears that it takes apart, which rounds them where they are quantized:
            they are written dequantized.
        language_model: Of a wrapper, of which mlx-lm reads the language model alone: the family that this has to be.
            Names and settings are of it. "" where there is no wrapper.
        made_beside: As ``made``, of the wrapper's own configuration.
        written_as: The ``model_type`` of the class that computes what the language model does, where it is another
            family's. Of a wrapper the folder is then one of that, as if there were no wrapper.
        inside_of: The wrapper whose class reads the language model, which has none of its own.
        changed: Made of tensors that it holds otherwise, by endings of their names.
        one_added: Endings of names of norms to which it wants 1 added: exact in float32 alone.
        adds_one: Whether it adds 1 to its norms when it computes, in the dtype of the files.
        refuses: What else a configuration may have that it computes otherwise; None where it has nothing.
    """

    experts: str = "switch_mlp"
    leaves: Mapping[str, str] = field(default_factory=dict)
    renamed: Mapping[str, str] = field(default_factory=dict)
    moved: Callable[[str, Any], str] = lambda key, config: key
    split: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    merged: Mapping[str, str] = field(default_factory=dict)
    rows: Mapping[str, Callable[[int, Any], Tensor]] = field(default_factory=dict)
    keys: tuple[str, ...] = ()
    made: Mapping[str, Callable[[Any], Any]] = field(default_factory=dict)
    computed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    has_tied_head: bool = True
    rope_types: tuple[str, ...] = ("default",)
    taken_apart: tuple[str, ...] = ()
    language_model: str = ""
    made_beside: Mapping[str, Callable[[Any], Any]] = field(default_factory=dict)
    written_as: str = ""
    inside_of: str = ""
    changed: Mapping[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    one_added: tuple[str, ...] = ()
    adds_one: bool = False
    refuses: Callable[[Any], str | None] = lambda config: None

    def change(self, key: str) -> Callable[[Tensor], Tensor] | None:
        """What is made of a tensor of a name; None where it goes as it is."""
        if key.endswith(self.one_added or ("nothing",)):
            return lambda weight: (weight.float() + 1.0).to(weight.dtype)
        return next((make for ending, make in self.changed.items() if key.endswith(ending)), None)


def rope_of(config: Any) -> dict[str, Any]:
    """Rotary parameters of a configuration whose blocks share them."""
    return dict(getattr(config, "rope_parameters", None) or {})


def rope_types(config: Any) -> set[str]:
    """Types of the rotary embeddings of all blocks, which may differ by kind of attention."""
    rope = rope_of(config)
    each = [values for values in rope.values() if isinstance(values, dict) and "rope_type" in values] or [rope]
    return {values.get("rope_type", "default") for values in each}
