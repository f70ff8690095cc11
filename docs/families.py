"""Keep docs/families.md true: ``python docs/families.py`` rewrites it from the families that the tests run.

Every row is read off a tiny model of the family, with the adapter that a run uses.
"""

import re
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from moeq.models.adapter import Adapter  # noqa: E402
from moeq.models.families import HAND_ON  # noqa: E402
from moeq.models.rotation import RotationSpec, rotate  # noqa: E402
from moeq.quant.spec import WeightKind  # noqa: E402
from tests.families import FAMILIES, NOT_CAUSAL, REFUSED  # noqa: E402
from tests.tiny import tiny_model  # noqa: E402

HEAD = """# Families

Which model families work, what is quantized in each, what differs between them, and which are refused and why.
Written by `docs/families.py` from what `tests/test_families.py` runs: for each family below, a tiny random model goes
through observation, GPTQ with 2, 3, 4 and 8 bits among the experts of one block, the packed and the dense export, and a
reload in a fresh process with equal logits. The names are `model_type`s of transformers 5.23; multimodal families whose
text model is named here (`qwen3_5_moe`, `gemma4`, ...) work as far as `AutoModelForCausalLM` opens them.

What is never quantized: embeddings, head, norms, convolutions, routers and the gates of shared experts. A family's
biases stay as they are. "Kept" are further matrices in full precision; a run lists them in `fallbacks.json`. "Rotation"
says what `Rotation` does; `tests/models/test_rotation.py` holds the output unchanged.

A survey (`Survey`) is refused for `deepseek_v4`, `hy_v4` and `qwen4_exp_text`, and its costs `gemq`,
`pmq` and `block_output` for `nemotron_h` with latent experts. Those three costs take what the experts give for what is
added to the residual stream; a constant factor or norm that a block applies after its experts (`laguna`, `beam`,
`gemma4_text`, `minimax_m3_vl_text`, ...) is not in them.

"""
COLUMNS = (
    "family", "routed experts", "what differs", "shared experts", "attention and other mixers", "dense", "kept",
    "rotation",
)  # fmt: skip
TABLE = f"| {' | '.join(COLUMNS)} |\n{'| --- ' * len(COLUMNS)}|\n"
# Parts of the messages with which a rotation is refused, and what they come to.
NOT_ROTATED = {
    "weight per channel and is read by no linear": "no: a norm on what a block adds",
    "subtracts the mean": "no: norms subtract the mean",
    "states of shape": "no: several residual streams",
    "adds changes by": "no: a block does more with the residual stream than to read and to add",
}
REASONS = {
    "inkling2_text": "each block reads the outputs of all earlier blocks, so that no block can be run alone",
    "llama4_text": "no experts interface; every expert runs on every token, and the score multiplies its input",
    "jetmoe": "no experts interface; attention is a mixture as well",
    "doge": "no experts interface; experts are rows of embeddings",
    "longcat_flash": "no experts interface; some experts are the identity",
}
UNTESTED = {
    "dbrx": "no experts interface; all experts are one 2-D matrix",
    "step3p7": "no experts interface",
}


def row(family: str) -> tuple[str, dict[str, str]]:
    """Line of the table, and the reasons of what is kept."""
    adapter = Adapter(tiny_model(family))
    kept = {_leaf(fallback.weight): fallback.detail for fallback in adapter.kept()}
    path, experts = next(iter(adapter.expert_modules().items()))
    cells = [
        family, f"`{re.sub(r'.*?[.][0-9]+[.]', '', path)}`", _differences(adapter, experts),
        _names(adapter, "shared"), _names(adapter, "attention"), _names(adapter, "dense"), _join(kept),
        _rotation(adapter),
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |\n", kept


def _differences(adapter: Adapter, experts: Any) -> str:
    own_gate = getattr(type(experts)._apply_gate, "__qualname__", "").startswith(type(experts).__name__)
    shared = [site for site in adapter.all_sites() if site.kind == "shared"]
    found = {
        "no gate": not experts.has_gate,
        "stored transposed": bool(experts.is_transposed),
        "gate and up rows in turn": experts.has_gate and not getattr(experts, "is_concatenated", True),
        "biases": bool(getattr(experts, "has_bias", False)),
        "own gate function": own_gate,
        "gated shared expert": any(adapter.shared_affinity_gate(site) is not None for site in shared),
        "blocks hand on": any(type(block).__name__ in HAND_ON for block in adapter.blocks),
    }
    return ", ".join(name for name, holds in found.items() if holds)


def _rotation(adapter: Adapter) -> str:
    """What comes of rotating the model (which changes it)."""
    try:
        left_out = rotate(adapter, torch.arange(1, 65).reshape(2, 32), RotationSpec())
    except ValueError as refusal:
        return next(short for part, short in NOT_ROTATED.items() if part in str(refusal))
    return "all but values of some blocks" if left_out else "all"


def _names(adapter: Adapter, kind: WeightKind) -> str:
    leaves = {leaf: None for site in adapter.all_sites() if site.kind == kind for leaf in site.leaves}
    return _join(leaves)


def _join(names: dict[str, Any]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _leaf(path: str) -> str:
    parts = path.split(".")
    # A name alone says too little where it is that of an ordinary linear.
    return (
        ".".join(parts[-2:])
        if parts[-1] in ("fn", "proj", "fc1", "fc2", "gate_proj", "up_proj", "down_proj")
        else parts[-1]
    )


def document() -> str:
    """The whole of docs/families.md."""
    rows, reasons = [], {}
    for family in sorted(FAMILIES):
        line, kept = row(family)
        rows.append(line)
        for name, reason in kept.items():
            reasons.setdefault(reason, {})[name] = None
    why_kept = "".join(
        f"- {_join(dict(sorted(names.items())))}: {reason}.\n" for reason, names in sorted(reasons.items())
    )
    assert REASONS.keys() == REFUSED.keys()
    refused = "".join(f"| {family} | {reason} |\n" for family, reason in sorted({**REASONS, **UNTESTED}.items()))
    refused += (
        f"| {', '.join(NOT_CAUSAL)} | transformers has no causal language model of it (`AutoModelForCausalLM`) |\n"
    )
    return (
        f"{HEAD}{TABLE}{''.join(rows)}\n## Why matrices are kept\n\n{why_kept}\n"
        f"## Refused\n\n| family | reason |\n| ------ | ------ |\n{refused}"
    )


if __name__ == "__main__":
    (ROOT / "docs" / "families.md").write_text(document(), encoding="utf8")
