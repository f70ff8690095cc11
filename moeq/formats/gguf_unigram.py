"""SentencePiece's unigram model as llama.cpp has it (``t5``): scores of tokens, and how a text is normalized before.

llama.cpp takes the most probable tokens of the whole text, SentencePiece's way; what has no token is unknown to it, so
that a model which falls back to bytes there is refused.
"""

import base64
from typing import Any

from moeq.formats.gguf_rope import Metadata
from moeq.formats.gguf_splitting import steps_of

_BLANK = "▁"
# No blanks at the end, one for several of them: what ``remove_extra_whitespaces`` of llama.cpp does.
_STRIP = {"type": "Strip", "strip_left": False, "strip_right": True}
_MERGE = {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": _BLANK}
_KNOWN = "Precompiled, Strip (right) and Replace (several blanks) behind a blank in front"


def unigram(content: dict[str, Any], size: int) -> Metadata:
    """Keys of a unigram tokenizer.

    Args:
        content: Of ``tokenizer.json``.
        size: Of the model's vocabulary; tokens beyond the tokenizer's have the score 0.

    Raises:
        ValueError: It treats texts otherwise than llama.cpp.
    """
    model = content["model"]
    if model.get("byte_fallback"):
        raise ValueError(
            "gguf: llama.cpp has no bytes for what a unigram model has no token for, and this tokenizer falls back to "
            "them (byte_fallback); export moeq or dense"
        )
    if model.get("unk_id") is None:
        raise ValueError("gguf: llama.cpp reads no unigram model without an unknown token; export moeq or dense")
    prefixed = _prefixed(content)
    scores = [float(score) for _, score in model["vocab"]]
    return {
        "tokenizer.ggml.model": "t5",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.scores": [*scores, *[0.0] * (size - len(scores))],
        "tokenizer.ggml.unknown_token_id": int(model["unk_id"]),  # llama.cpp's own is 2
        "tokenizer.ggml.add_space_prefix": prefixed,
        **_normalizer(steps_of(content.get("normalizer"), "normalizers"), prefixed),
    }


def _prefixed(content: dict[str, Any]) -> bool:
    """Whether texts get a blank before their first word."""
    steps = steps_of(content.get("pre_tokenizer"), "pretokenizers")
    if len(steps) == 1 and steps[0]["type"] == "Metaspace" and steps[0]["replacement"] == _BLANK:
        return bool(steps[0]["prepend_scheme"] != "never")
    kinds = ", ".join(step["type"] for step in steps) or "none"
    raise ValueError(f"gguf: a unigram tokenizer is written with a Metaspace of {_BLANK}, and this one has {kinds}")


def _normalizer(steps: list[dict[str, Any]], prefixed: bool) -> Metadata:
    """The table of what characters become, with blanks merged behind it; or neither.

    One without the other is not the same: a line end at the end of a text is a blank by the table alone, and where
    blanks are not merged, transformers makes one of a pair of line ends, and llama.cpp two.
    """
    if not steps:
        return {"tokenizer.ggml.remove_extra_whitespaces": False}
    table = steps[0].get("precompiled_charsmap")
    if not (prefixed and table and steps[1:] == [_STRIP, _MERGE]):
        raise ValueError(
            f"gguf: llama.cpp normalizes for a unigram tokenizer by {_KNOWN} or not at all, and this one does by "
            f"{', '.join(step['type'] for step in steps)} (blank in front: {prefixed}); export moeq or dense"
        )
    return {
        "tokenizer.ggml.remove_extra_whitespaces": True,
        "tokenizer.ggml.precompiled_charsmap": base64.b64decode(table),
    }
