"""``quantization_config`` of compressed-tensors: which weights have which scheme, as short patterns.

vLLM matches its own names of modules, which end as those of the files do but may begin otherwise, in this order:
``ignore`` first, then the targets of ``config_groups``; it asks for the experts of a block by ``.0.gate_proj``,
``.0.up_proj`` and ``.0.down_proj`` of its own, whatever the files call them.  transformers takes the scheme of all
experts from the first group whose targets mention them.  So patterns begin at the list of blocks, experts are matched
by number and any last part, and their groups come first.  One scheme for everything is the target "Linear", which
every version of these runtimes reads.

Sources: vllm/model_executor/layers/quantization/compressed_tensors, sglang (the same), transformers 5.23
(integrations/compressed_tensors.py).
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from moeq.formats.compressed_tensors_float import LAYOUTS, arguments
from moeq.formats.patterns import patterns
from moeq.quant.carrier import Carrier

_EXPERT = re.compile(r"\.experts\.\d+\.")


def quantization_config(
    carriers: Mapping[str, Carrier],
    spellings: Mapping[str, Sequence[str]],
    kept: Iterable[str],
    prefixes: Sequence[str],
) -> dict[str, Any]:
    """The values of ``quantization_config``.

    Args:
        carriers: Storage type of each quantized weight, by canonical name.
        spellings: Names that runtimes may have for a quantized weight: of the files and of the modules.
        kept: Names of other matrices, which stay as they are.
        prefixes: Paths of the list of blocks, as in ``spellings`` ("model.layers").
    """
    kept = list(kept)
    tails = {name: [_tail(spelling, prefixes) for spelling in spellings[name]] for name in carriers}
    kept_tails = [_tail(name, prefixes) for name in kept if _in_blocks(name, prefixes)]
    universe = [*kept_tails, *(tail for each in tails.values() for tail in each)]
    schemes: dict[str, list[str]] = {}
    types = {}
    for name in sorted(carriers, key=lambda name: _EXPERT.search(tails[name][0]) is None):
        types[label(carriers[name])] = carriers[name]
        schemes.setdefault(label(carriers[name]), []).extend(tails[name])
    groups = {
        f"group_{index}": {
            "targets": ["Linear"] if len(schemes) == 1 else _targets(names, universe),
            "weights": weights_of(types[scheme]),
            "input_activations": None,
            "output_activations": None,
            "format": layout(types[scheme]),
        }
        for index, (scheme, names) in enumerate(schemes.items())
    }
    roots = {"model", "language_model", *(part for prefix in prefixes for part in prefix.split(".")[:-1])}
    layouts = {layout(carrier) for carrier in types.values()}
    outside = sorted({_component(name, roots) for name in kept if not _in_blocks(name, prefixes)})
    return {
        "quant_method": "compressed-tensors",
        "format": layouts.pop() if len(layouts) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "ignore": [rf"re:^(.*\.)?{re.escape(part)}(\..*)?$" for part in outside] + _targets(kept_tails, universe),
        "config_groups": groups,
    }


def weights_of(carrier: Carrier) -> dict[str, Any]:
    """What compressed-tensors calls the arguments of a weight."""
    if carrier.kind != "uniform":
        return arguments(carrier)
    return {
        "num_bits": carrier.bits,
        "type": "int",
        "symmetric": carrier.zero_point == "middle",
        "strategy": "channel" if carrier.group_size is None else "group",
        "group_size": carrier.group_size,
    }


def layout(carrier: Carrier) -> str:
    """How compressed-tensors lays a weight out."""
    return LAYOUTS.get(carrier.kind, "pack-quantized")


def label(carrier: Carrier) -> str:
    """A scheme for people."""
    groups = "channels" if carrier.group_size is None else f"groups of {carrier.group_size}"
    return f"{carrier.name}{'' if carrier.zero_point == 'middle' else ' with zero points'}, {groups}"


def _targets(tails: Iterable[str], universe: Iterable[str]) -> list[str]:
    """Patterns of names that begin at the list of blocks; of experts the last part does not matter."""
    any_leaf = [[_leafless(tail) for tail in each] for each in (tails, universe)]
    found = [f"re:.*{pattern}$" for pattern in patterns(*any_leaf)]
    return [pattern.replace(_ANY_LEAF, r"\w+") for pattern in found]


_ANY_LEAF = "any_projection"


def _leafless(tail: str) -> str:
    return f"{tail.rpartition('.')[0]}.{_ANY_LEAF}" if _EXPERT.search(tail) else tail


def _in_blocks(name: str, prefixes: Sequence[str]) -> bool:
    return any(name.startswith(f"{prefix}.") for prefix in prefixes)


def _tail(name: str, prefixes: Sequence[str]) -> str:
    """A name from its list of blocks on: "layers.0.mlp.gate"."""
    for prefix in prefixes:
        if name.startswith(f"{prefix}."):
            return prefix.rpartition(".")[2] + name.removeprefix(prefix)
    return name


def _component(name: str, roots: Collection[str]) -> str:
    """The first part of a name that tells what stands beside the blocks: "visual", "lm_head"."""
    return next((part for part in name.split(".") if part not in roots), name)
