"""Keep docs/families.md true: ``python docs/families.py`` rewrites it from the families that the tests run.

Every row is read off a tiny model of the family, with the adapter that a run uses.
"""

import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from moeq.checkpoint.model_class import model_class  # noqa: E402
from moeq.formats import gguf_families, gguf_wrappers, gptq, mlx_families, mlx_rearranged, mlx_wrappers  # noqa: E402
from moeq.models.adapter import Adapter  # noqa: E402
from moeq.models.families import HAND_ON, OTHER_EXPERTS  # noqa: E402
from moeq.models.rotation import RotationSpec, rotate  # noqa: E402
from moeq.quant.spec import WeightKind  # noqa: E402
from tests.families import (  # noqa: E402
    DRAFT_LAYERS,
    FAMILIES,
    OTHER_TASKS,
    PUBLISHED_AS,
    REFUSED,
    REFUSED_WRAPPERS,
    WRAPPERS,
)
from tests.tiny import tiny_model  # noqa: E402

HEAD = """# Families

Which model families work, what is quantized in each, what differs between them, and which are refused and why.
Written by `docs/families.py` from what `tests/test_families.py` runs: for each family below, a tiny random model goes
through observation, GPTQ with 2, 3, 4 and 8 bits among the experts of one block, the packed and the dense export, and a
reload in a fresh process with equal logits. The names are `model_type`s of transformers 5.23.

A wrapper is a language model with what turns images or sound into its embeddings. Its language model is quantized, on
text; all else of its files is in both exports as it was, and they open by the class that the source opens by
(`tests/test_wrappers.py`: each one below by round-to-nearest and by GPTQ, from memory and streamed from its files).
"Draft layers" are keys under which files of the family hold layers for speculative decoding, "published as" is how its
weights are published where that is not in 16 bits. `tests/export/test_accounting.py` walks each family and wrapper from
its files through the ledger to both exports: in bfloat16, in float32, with draft layers, in FP8 where it is published
so; MXFP4 and int4 on `gpt_oss` and `deepseek_v3`, whose layout Kimi has. "Also written for" are runtimes that gave the
logits of transformers for files of a tiny model of the family (`tests/formats`); llama.cpp and MLX take the language
model of a wrapper. compressed-tensors, and GPTQ but for wrappers, are not bound to families ([serving](serving.md)).

What is never quantized: embeddings, head, norms, convolutions, routers and the gates of shared experts. A family's
biases stay as they are. "Kept" are further matrices in full precision; a run lists them in `fallbacks.json`. "Rotation"
says what `Rotation` does; `tests/models/test_rotation.py` holds the output unchanged. Wrappers are not rotated:
features of images or sound enter their residual stream beside the embeddings.

A survey (`Survey`) is refused for `deepseek_v4`, `hy_v4`, `qwen4_exp_text` and `glm5_next`, and its costs `gemq`,
`pmq` and `block_output` for `nemotron_h` with latent experts. Those three costs take what the experts give for what is
added to the residual stream; a constant factor or norm that a block applies after its experts (`laguna`, `beam`,
`gemma4_text`, `minimax_m3_vl_text`, ...) is not in them.

"""
COLUMNS = (
    "family", "routed experts", "what differs", "shared experts", "attention and other mixers", "dense", "kept",
    "rotation", "wrappers", "draft layers", "published as", "also written for",
)  # fmt: skip
WRAPPER_COLUMNS = (
    "wrapper", "opened by", "language model", "beside it", "routed experts", "what differs", "shared experts",
    "attention and other mixers", "dense", "kept", "draft layers", "published as", "also written for",
)  # fmt: skip
# Parts of the messages with which a rotation is refused, and what they come to.
NOT_ROTATED = {
    "weight per channel and is read by no linear": "no: a norm on what a block adds",
    "subtracts the mean": "no: norms subtract the mean",
    "states of shape": "no: several residual streams",
    "adds changes by": "no: a block does more with the residual stream than to read and to add",
}
REASONS = {
    "inkling2_text": "each block reads the outputs of all earlier blocks, so that no block can be run alone",
    **{name: f"no experts interface; {how}" for name, how in OTHER_EXPERTS.items() if name in REFUSED},
    "llama4": "as llama4_text",
    "inkling2": "as inkling2_text",
    "inkling_mm_model": "its files hold gate and up rows of linears in turn, which packed weights cannot be",
    "muse_spark": "a norm follows each expert",
    "ernie4_5_vl_moe": "its files number the experts of text and those of images through, and only text is calibrated",
}
# Runtimes whose files are written for families that were run there.
RUNTIMES = {"llama.cpp": gguf_families.FAMILIES, "MLX": mlx_families.FAMILIES | mlx_rearranged.REARRANGED}
OF_WRAPPERS = {"llama.cpp": gguf_wrappers.WRAPPERS, "MLX": mlx_wrappers.WRAPPERS, "GPTQModel": gptq.WRAPPERS}
UNTESTED = {
    "qwen3_omni_moe": "no forward pass of text; a folder with its thinker alone (`qwen3_omni_moe_thinker`) works",
    "dbrx": f"no experts interface; {OTHER_EXPERTS['dbrx']}",
    "step3p7": "no experts interface",
}


def row(family: str) -> tuple[str, dict[str, str]]:
    """Line of the table of families, and the reasons of what is kept."""
    adapter = Adapter(tiny_model(family))
    cells, kept = _structure(adapter)
    wrappers = [name for name, values in WRAPPERS.items() if values["text_config"]["model_type"] == family]
    runtimes = ", ".join(name for name, known in RUNTIMES.items() if family in known)
    return _line([family, *cells, _rotation(adapter), _join(wrappers), *_published(family), runtimes]), kept


def wrapper_row(family: str) -> tuple[str, dict[str, str]]:
    """Line of the table of wrappers, and the reasons of what is kept."""
    adapter = Adapter(tiny_model(family))
    model: Any = adapter.model
    cells, kept = _structure(adapter)
    decoder = model.get_decoder()
    beside = [name for name, module in model.base_model.named_children() if module is not decoder]
    text = WRAPPERS[family]["text_config"]["model_type"]
    named = f"`{text}`" if text in FAMILIES else "its own"
    opened_by = model_class(model.config).__name__
    runtimes = ", ".join(name for name, known in OF_WRAPPERS.items() if family in known)
    return _line([family, opened_by, named, _join(beside), *cells, *_published(family), runtimes]), kept


def _structure(adapter: Adapter) -> tuple[list[str], dict[str, str]]:
    """Cells that say what is where, and the reasons of what is kept."""
    kept = {_leaf(fallback.weight): fallback.detail for fallback in adapter.kept()}
    path, experts = next(iter(adapter.expert_modules().items()))
    cells = [
        f"`{re.sub(r'.*?[.][0-9]+[.]', '', path)}`", _differences(adapter, experts), _names(adapter, "shared"),
        _names(adapter, "attention"), _names(adapter, "dense"), _join(kept),
    ]  # fmt: skip
    return cells, kept


def _published(family: str) -> list[str]:
    """Cells of draft layers and of how weights are published."""
    draft = DRAFT_LAYERS.get(family)
    return ["" if draft is None else f"`{draft}`", PUBLISHED_AS.get(family, "")]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |\n"


def _table(columns: Sequence[str], lines: Sequence[str]) -> str:
    return f"{_line(columns)}{'| --- ' * len(columns)}|\n{''.join(lines)}"


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
    opened_by = model_class(adapter.model.config)
    if adapter.model.config.get_text_config() is adapter.model.config and opened_by is not AutoModelForCausalLM:
        found[f"opened by {opened_by.__name__}"] = True
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


def _join(names: Iterable[str]) -> str:
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
    rows = [row(family) for family in sorted(FAMILIES)]
    wrappers = [wrapper_row(family) for family in sorted(WRAPPERS)]
    reasons: dict[str, dict[str, None]] = {}
    for name, reason in (item for _, kept in (*rows, *wrappers) for item in kept.items()):
        reasons.setdefault(reason, {})[name] = None
    why_kept = "".join(
        f"- {_join(dict(sorted(names.items())))}: {reason}.\n" for reason, names in sorted(reasons.items())
    )
    assert REASONS.keys() == {**REFUSED, **REFUSED_WRAPPERS}.keys()
    others = dict.fromkeys(OTHER_TASKS, "no language model that predicts the next token")
    refused = [_line(item) for item in sorted({**REASONS, **UNTESTED, **others}.items())]
    return (
        f"{HEAD}{_table(COLUMNS, [line for line, _ in rows])}\n"
        f"## Wrappers\n\n{_table(WRAPPER_COLUMNS, [line for line, _ in wrappers])}\n"
        f"## Why matrices are kept\n\n{why_kept}\n## Refused\n\n{_table(('family', 'reason'), refused)}"
    )


if __name__ == "__main__":
    (ROOT / "docs" / "families.md").write_text(document(), encoding="utf8")
