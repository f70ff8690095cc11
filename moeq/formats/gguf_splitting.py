"""llama.cpp's names of the ways in which byte-level tokenizers cut a text before they merge.

llama.cpp has the regular expressions built in and reads a name only.  A tokenizer's own are in ``pre_tokenizer`` of its
``tokenizer.json``; here they are told apart by their text, and what differs by a letter is another one.  Source:
``llama-vocab.cpp`` of llama.cpp, where the originals stand beside its own.
"""

from typing import Any

# Alternatives that most of them share.
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS, _SPACES = r"[^\r\n\p{L}\p{N}]?\p{L}+", r"\s+(?!\S)|\s+"
_SIGNS, _LINES = r" ?[^\s\p{L}\p{N}]+[\r\n]*", r"\s*[\r\n]+"
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
)
_CASED_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
_DEEPSEEK = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"""| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
)

# The regular expression of GPT-2, which ``ByteLevel`` has built in.
GPT2 = "gpt-2's own"
DIGITS = "single digits"
# DeepSeek-V2 lists all letters that have a case, in tables of which this is the beginning.
CASED = r"\s?[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓ"
_ASIAN = "[一-龥\u0800-一가-\ud7ff]+"
# (what cuts, one after another; whether a word that is a token is one) -> llama.cpp's name.
SPLITTINGS: dict[tuple[tuple[str, ...], bool], str] = {
    ((GPT2,), False): "gpt-2",
    ((DIGITS, GPT2), False): "smollm",
    (("|".join([_CONTRACTIONS, _WORDS, r"\p{N}", _SIGNS, _LINES, _SPACES]),), False): "qwen2",
    (("|".join([_CONTRACTIONS, r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+", r"\p{N}", r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*", _LINES,
                _SPACES]),), False): "qwen35",
    (("|".join([_CONTRACTIONS, _WORDS, r"\p{N}{1,3}", _SIGNS, _LINES, _SPACES]),), True): "llama-bpe",
    (("|".join([_CONTRACTIONS, _WORDS, r"\p{N}{1,3}", _SIGNS, _LINES, _SPACES]),), False): "smaug-bpe",
    (("|".join([*_CASED, r"\p{N}", _CASED_SIGNS, _LINES, _SPACES]),), True): "tekken",
    (("|".join([*(part + _CONTRACTIONS + "?" for part in _CASED), r"\p{N}{1,3}", _CASED_SIGNS, _LINES, _SPACES]),),
     False): "gpt-4o",
    ((r"\p{N}{1,3}", "[一-龥\u3040-ゟ\u30a0-ヿ]+", _DEEPSEEK), False): "deepseek-v3",
    (("[\r\n]", CASED, "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+", r"\s+$", _ASIAN, DIGITS),
     False): "deepseek-llm",
    (("|".join([_CONTRACTIONS, r"[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+", r"\p{N}",
                r" ?[^\s\p{L}\p{N}]+[\r\n/]?", r"\s*[\r\n]", _SPACES]),), False): "exaone-moe",
    (("|".join(["'(?i:[sdmt]|ll|ve|re)", r"[^\r\n\p{L}\p{N}]?+\p{L}+", r"\p{N}", r" ?[^\s\p{L}\p{N}]++[\r\n]*",
                r"\s*[\r\n]", _SPACES]),), False): "bailingmoe",
}  # fmt: skip


def splitting(tokenizer: dict[str, Any]) -> str:
    """llama.cpp's name of how a tokenizer cuts texts.

    Args:
        tokenizer: Content of ``tokenizer.json``, of a byte-level tokenizer.

    Raises:
        ValueError: llama.cpp has no such way, or it is not known here; the message shows it.
    """
    steps = tuple(_step(part) for part in _parts(tokenizer.get("pre_tokenizer")))
    found = tuple(step for step in steps if step)
    key = (found, bool(tokenizer["model"].get("ignore_merges")))
    if key not in SPLITTINGS:
        raise ValueError(
            f"gguf: no pre-tokenizer of llama.cpp is known for {' then '.join(found) or 'no splitting'} "
            f"(ignore_merges: {key[1]}); where llama.cpp has one, add its name to SPLITTINGS of "
            "moeq.formats.gguf_splitting"
        )
    return SPLITTINGS[key]


def steps_of(step: dict[str, Any] | None, inside: str) -> list[dict[str, Any]]:
    """A step of a tokenizer, or those of a sequence, which has them under a name; none for None."""
    if step is None:
        return []
    return list(step[inside]) if step["type"] == "Sequence" else [step]


def _parts(pre_tokenizer: dict[str, Any] | None) -> list[dict[str, Any]]:
    if pre_tokenizer is None:
        return []
    if pre_tokenizer["type"] == "Sequence":
        return [part for each in pre_tokenizer["pretokenizers"] for part in _parts(each)]
    return [pre_tokenizer]


def _step(part: dict[str, Any]) -> str:
    """What a step cuts by; nothing where it does not cut."""
    kind = part["type"]
    if kind == "ByteLevel" and not part.get("add_prefix_space"):
        return GPT2 if part.get("use_regex", True) else ""
    if kind == "Digits" and part.get("individual_digits"):
        return DIGITS
    if kind == "Split" and part["behavior"] == "Isolated" and not part.get("invert") and "Regex" in part["pattern"]:
        regex = str(part["pattern"]["Regex"])
        return CASED if regex.startswith(CASED) else regex
    return f"{kind} ({', '.join(f'{key}: {value}' for key, value in part.items() if key != 'type')})"
