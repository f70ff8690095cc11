"""How a family of transformers is told to llama.cpp."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from moeq.formats.gguf_metadata import Describe
from moeq.formats.gguf_pieces import Pieces

# (option, the value that llama.cpp computes with, whatever a file says)
Fixed = tuple[str, Any]


@dataclass(frozen=True)
class Family:
    """How a family of transformers is told to llama.cpp.

    Attributes:
        architecture: llama.cpp's name.
        describe: Keys beyond the common ones.
        fixed: Options that llama.cpp has no key for, each with the one value that it computes with; an option that a
            configuration lacks has it.
        pieces: Of tensors that do not go as they are: by what follows the number of the block.
        own_head: llama.cpp does not take the embedding for a head that is missing.
        names: Architecture whose names of tensors it has, where the package does not know it; "" is its own.
        refuses: What else a configuration may have that llama.cpp computes otherwise; None where it has nothing.
        language_model: Of a wrapper, of which llama.cpp reads the language model alone: the family that this has to
            be. What is described, fixed and refused is of its configuration. "" where there is no wrapper.
        beside: Keys of what stands beside the language model, made of the wrapper's configuration.
        numbers: Tensors of whole numbers that are keys of the file: what follows the number of the block, and the key.
    """

    architecture: str
    describe: Describe
    fixed: tuple[Fixed, ...]
    pieces: Mapping[str, Pieces] = field(default_factory=dict)
    own_head: bool = False
    names: str = ""
    refuses: Callable[[Any], str | None] = lambda config: None
    language_model: str = ""
    beside: Describe = lambda config: {}
    numbers: Mapping[str, str] = field(default_factory=dict)


SILU: Fixed = ("hidden_act", "silu")
NO_BIAS: Fixed = ("attention_bias", False)
ALL_SPARSE: tuple[Fixed, ...] = (("decoder_sparse_step", 1), ("mlp_only_layers", []))
