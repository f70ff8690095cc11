"""The tokenizer of a folder as keys of a GGUF file: tokens and their kinds, merges or scores, special tokens, template.

Three kinds of tokenizers are written: byte-level BPE (``gpt2`` in llama.cpp), BPE over characters with bytes for what
is missing, as SentencePiece makes them (``llama``), and its unigram model without bytes (``t5``).  The second merges by
scores; those of the merges are their ranks, negated, which is what SentencePiece's own are.
"""

import json
from pathlib import Path
from typing import Any

from moeq.formats.gguf_rope import Metadata
from moeq.formats.gguf_splitting import splitting, steps_of
from moeq.formats.gguf_unigram import unigram

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
_SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "sep": "seperator", "pad": "padding", "mask": "mask"}
_BLANK = "▁"


def tokenizer_metadata(folder: Path, config: Any) -> Metadata:
    """Keys of a folder's tokenizer.

    Args:
        folder: Of a model, with its tokenizer's files.
        config: Of the model: the size of its vocabulary, and special tokens that the tokenizer does not name.

    Raises:
        ValueError: llama.cpp has no such tokenizer.
    """
    tokenizer = _open(folder)
    content: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    model = content["model"]
    if model["type"] not in ("BPE", "Unigram"):
        raise ValueError(
            f"gguf: a tokenizer of kind {model['type']} is not written, BPE and Unigram are; export moeq or dense"
        )
    tokens, kinds = _tokens(content, config.get_text_config().vocab_size)
    keys: Metadata = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": kinds}
    if model["type"] == "Unigram":
        return keys | unigram(content, len(tokens)) | _special(tokenizer, config)
    merges = [merge.split(" ", 1) if isinstance(merge, str) else list(merge) for merge in model["merges"]]
    keys |= _characters(content, tokens, merges) if model.get("byte_fallback") else _bytes(content, merges)
    return keys | _special(tokenizer, config)


def _open(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, ImportError, KeyError, AttributeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"gguf: transformers opens no tokenizer in {folder} ({reason}); add its files") from error
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise ValueError(f"gguf: {type(tokenizer).__name__} has no tokenizer.json that could be read; add one")
    return tokenizer


def _tokens(content: dict[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Tokens by id, padded to the model's vocabulary, and their kinds."""
    model = content["model"]
    texts: dict[int, str] = (
        {number: text for number, (text, _) in enumerate(model["vocab"])}
        if model["type"] == "Unigram"
        else {number: text for text, number in model["vocab"].items()}
    )
    kinds = dict.fromkeys(texts, NORMAL)
    if isinstance(unknown := model.get("unk_id"), int):
        kinds[unknown] = UNKNOWN
    if model.get("byte_fallback"):
        kinds |= {number: BYTE for number, text in texts.items() if _is_byte(text)}
        kinds |= {number: UNKNOWN for number, text in texts.items() if text == model.get("unk_token")}
    for token in content.get("added_tokens", []):
        texts[token["id"]] = token["content"]
        if kinds.get(token["id"]) != UNKNOWN:
            kinds[token["id"]] = CONTROL if token["special"] else USER_DEFINED
    if texts and max(texts) >= size:
        raise ValueError(f"gguf: token {max(texts)} of the tokenizer is outside of the model's vocabulary of {size}")
    found = [texts.get(number, f"[PAD{number}]") for number in range(size)]
    if len(set(found)) < size:
        twice = next(text for text in found if found.count(text) > 1)
        raise ValueError(f"gguf: the tokenizer has two tokens {twice!r}, which llama.cpp does not read")
    return found, [kinds.get(number, UNUSED) for number in range(size)]


def _bytes(content: dict[str, Any], merges: list[list[str]]) -> Metadata:
    """Byte-level BPE."""
    # llama.cpp does not normalize; NFC changes nothing of a text that is in its usual form.
    other = [step["type"] for step in steps_of(content.get("normalizer"), "normalizers") if step["type"] != "NFC"]
    if other:
        raise ValueError(f"gguf: llama.cpp has no normalizer of kind {other[0]} for byte-level tokenizers")
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": splitting(content),
        # An array of GGUF is never empty; this merge is of no tokens.
        "tokenizer.ggml.merges": [" ".join(merge) for merge in merges] or ["[PAD] [PAD]"],
    }


def _characters(content: dict[str, Any], tokens: list[str], merges: list[list[str]]) -> Metadata:
    """BPE over characters: a token's score is the negated rank of the first merge that makes it."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        ranks.setdefault("".join(merge), rank)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.scores": [-float(ranks.get(token, 0)) for token in tokens],
        "tokenizer.ggml.add_space_prefix": _prefixed(content),
    }


def _prefixed(content: dict[str, Any]) -> bool:
    """Whether texts get a blank before their first word; raises ValueError where blanks are treated otherwise."""
    steps = [
        *steps_of(content.get("normalizer"), "normalizers"),
        *steps_of(content.get("pre_tokenizer"), "pretokenizers"),
    ]
    prefixed = replaced = False
    for step in steps:
        if step["type"] == "Prepend" and step["prepend"] == _BLANK:
            prefixed = True
        elif step["type"] == "Replace" and step["pattern"] == {"String": " "} and step["content"] == _BLANK:
            replaced = True
        elif step["type"] == "Metaspace" and step["replacement"] == _BLANK and not step.get("split", True):
            prefixed, replaced = step["prepend_scheme"] != "never", True
        elif step["type"] == "Split" and step["pattern"] == {"String": " "} and replaced:
            continue  # no blank is left (Gemma)
        else:
            raise ValueError(f"gguf: llama.cpp has no step of kind {step['type']} for such a tokenizer")
    if not replaced:
        raise ValueError(f"gguf: a tokenizer over characters that does not write blanks as {_BLANK} is not written")
    return prefixed


def _special(tokenizer: Any, config: Any) -> Metadata:
    """Ids of special tokens, whether texts begin with one, and the template of chats."""
    keys: Metadata = {}
    for ours, theirs in _SPECIAL.items():
        number = getattr(tokenizer, f"{ours}_token_id", None)
        for part in (config.get_text_config(), config):  # a wrapper's language model has its own
            if number is None and isinstance(of_model := getattr(part, f"{ours}_token_id", None), int):
                number = of_model
        if number is not None and number >= 0:
            keys[f"tokenizer.ggml.{theirs}_token_id"] = int(number)
    ids = tokenizer("a").input_ids
    bos, eos = keys.get("tokenizer.ggml.bos_token_id"), keys.get("tokenizer.ggml.eos_token_id")
    keys["tokenizer.ggml.add_bos_token"] = bos is not None and ids[:1] == [bos]
    keys["tokenizer.ggml.add_eos_token"] = eos is not None and ids[-1:] == [eos]
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):
        template = template.get("default")
    return keys | ({"tokenizer.chat_template": template} if template else {})


def _is_byte(text: str) -> bool:
    return len(text) == 6 and text.startswith("<0x") and text.endswith(">")
