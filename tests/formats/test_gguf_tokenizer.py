"""Tokenizers of files give the ids that transformers gives, or are refused."""

import json
from functools import cache
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from moeq.formats.gguf_file import write_file
from moeq.formats.gguf_splitting import CASED, DIGITS, GPT2, SPLITTINGS, splitting
from moeq.formats.gguf_tokenizer import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, tokenizer_metadata
from moeq.formats.gguf_unigram import unigram as unigram_keys
from tests.formats.llama_cpp import LlamaCpp, needs_llama_cpp
from tests.tiny import tiny_tokenizer

ROOT = Path(__file__).parents[2]
SIZE = 600
TEXTS = (
    "Hello world, it's 12345 o'clock; don't\n\n  stop.\t\r\n tail  ",
    "ÜNÏCÖDÉ naïve 你好\uff0c世界 ひらがな 🙂 Straße",
    "def f(x_1: int) -> str:\n        return 'I'LL' + \"3.14\" /* x */ //\n\n\n",
    "Who'S there? MiXeD camelCase 007 1,000,000",
)
MARKS = "a\u0301 e\u0300\u0301 \u0301"
INSIDE = " <s>[INST] Who'S there? [/INST]<|endoftext|> yes"
# llama.cpp's own expressions for these two leave combining marks out of words.
WITHOUT_MARKS = ("gpt-4o", "tekken")
CORPUS = [*TEXTS, "the cat sat on the mat " * 20, "1234 5678 2024 " * 20, "Grüße aus Köln, 世界 你好 " * 20] * 3


METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}


def byte_level(steps: tuple[str, ...], *, ignore_merges: bool = False) -> Tokenizer:
    """A byte-level tokenizer, trained on ``CORPUS``, that cuts texts in some steps."""
    parts: list[Any] = []
    for step in steps:
        if step == DIGITS:
            parts.append(pre_tokenizers.Digits(individual_digits=True))
        elif step != GPT2:
            regex = Regex(f"{step}]+" if step == CASED else step)
            parts.append(pre_tokenizers.Split(regex, behavior="isolated"))
    parts.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=GPT2 in steps))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=alphabet, special_tokens=["<|endoftext|>"], show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    content = json.loads(tokenizer.to_str())
    content["model"]["ignore_merges"] = ignore_merges
    return Tokenizer.from_str(json.dumps(content))


def characters(*, prefix: bool, metaspace: bool) -> Tokenizer:
    """A tokenizer over characters, trained on ``CORPUS``, with bytes for what is missing."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if metaspace:
        scheme = "first" if prefix else "never"
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    else:
        steps = [normalizers.Prepend("▁")] if prefix else []
        tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words = [word for text in CORPUS for word in text.split(" ")]
    trainer = trainers.BpeTrainer(vocab_size=560, special_tokens=tokens, show_progress=False, limit_alphabet=60)
    tokenizer.train_from_iterator(words, trainer)
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = content["added_tokens"][:3]  # bytes are ordinary tokens
    return Tokenizer.from_str(json.dumps(content))


def gemma() -> Tokenizer:
    """As ``characters``, with a step that would cut at blanks, of which none is left."""
    content = json.loads(characters(prefix=False, metaspace=False).to_str())
    split = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
    return Tokenizer.from_str(json.dumps({**content, "pre_tokenizer": split}))


def unigram(*, normalized: bool, prefix: bool) -> Tokenizer:
    """A unigram tokenizer, trained on ``CORPUS``, which normalizes as SentencePiece does or not at all."""
    tokenizer = Tokenizer(models.Unigram())
    if normalized:
        merge = [normalizers.Strip(left=False, right=True), normalizers.Replace(Regex(" {2,}"), "▁")]
        tokenizer.normalizer = normalizers.Sequence([normalizers.Precompiled(charsmap()), *merge])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always" if prefix else "never")
    trainer = trainers.UnigramTrainer(
        vocab_size=400, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


@cache
def charsmap() -> bytes:
    """SentencePiece's table of characters for NFKC."""
    sentencepiece = pytest.importorskip("sentencepiece", reason="SentencePiece is not installed")
    from sentencepiece import sentencepiece_model_pb2

    written = BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=written, vocab_size=200, hard_vocab_limit=False, minloglevel=2
    )
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(written.getvalue())
    table: bytes = proto.normalizer_spec.precompiled_charsmap
    assert len(table) > 100_000
    return table


def save(tokenizer: Tokenizer, folder: Path, **options: Any) -> PreTrainedTokenizerFast:
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def config(size: int = SIZE, **values: Any) -> Any:
    found = SimpleNamespace(vocab_size=size, **values)
    found.get_text_config = lambda: found
    return found


def same_ids(folder: Path, texts: tuple[str, ...], *, size: int = SIZE) -> None:
    """Fail where llama.cpp gives other ids for a text than transformers."""
    metadata = tokenizer_metadata(folder, config(size))
    write_file(folder / "vocabulary.gguf", "llama", metadata, {})
    file = LlamaCpp(folder / "vocabulary.gguf", vocabulary_only=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for text in texts:
        assert file.tokenize(text) == tokenizer(text, add_special_tokens=False).input_ids, text
        assert file.tokenize(text, special=True) == tokenizer(text).input_ids, text
    file.close()


@needs_llama_cpp
@pytest.mark.parametrize(("steps", "ignore_merges"), SPLITTINGS, ids=SPLITTINGS.values())
def test_every_way_of_cutting_has_the_ids_of_transformers(
    steps: tuple[str, ...], ignore_merges: bool, tmp_path: Path
) -> None:
    save(byte_level(steps, ignore_merges=ignore_merges), tmp_path, eos_token="<|endoftext|>")
    marks = () if SPLITTINGS[steps, ignore_merges] in WITHOUT_MARKS else (MARKS,)
    same_ids(tmp_path, (*TEXTS, INSIDE, *marks))


@needs_llama_cpp
@pytest.mark.parametrize(("prefix", "metaspace"), [(True, False), (False, False), (True, True), (False, True)])
def test_a_tokenizer_over_characters_has_the_ids_of_transformers(prefix: bool, metaspace: bool, tmp_path: Path) -> None:
    save(characters(prefix=prefix, metaspace=metaspace), tmp_path, bos_token="<s>", eos_token="</s>")
    # A Metaspace with a prefix writes none before a blank and after a special token, llama.cpp does (docs/serving.md).
    same_ids(tmp_path, (*TEXTS, MARKS, *(() if prefix and metaspace else (INSIDE,))))


@needs_llama_cpp
def test_gemma_s_tokenizer_has_the_ids_of_transformers(tmp_path: Path) -> None:
    save(gemma(), tmp_path, bos_token="<s>", eos_token="</s>")
    same_ids(tmp_path, (*TEXTS, MARKS, INSIDE))


@needs_llama_cpp
@pytest.mark.parametrize(("normalized", "prefix"), [(True, True), (False, True), (False, False)])
def test_a_unigram_tokenizer_has_the_ids_of_transformers(normalized: bool, prefix: bool, tmp_path: Path) -> None:
    save(unigram(normalized=normalized, prefix=prefix), tmp_path, bos_token="<s>", eos_token="</s>")
    wide, unknown = "\ufb01ne \u2460 \uff46\uff55\uff4c\uff4c \xbd x\xb2", "\u0e2a unknown \u0e2a\u0e2b"
    # Where blanks are not merged, it is with one in front of a text that begins with one as above.
    blanks = (INSIDE, "  two  blanks ") if normalized or not prefix else ("two  blanks ",)
    same_ids(tmp_path, (*TEXTS, MARKS, wide, unknown, *blanks))


@needs_llama_cpp
def test_the_bundled_tokenizer_has_the_ids_of_transformers(tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((ROOT / "assets" / "reference-moe" / name).read_bytes())
    same_ids(tmp_path, (*TEXTS, MARKS, INSIDE), size=4096)


def test_tokens_have_their_kinds_and_the_vocabulary_its_size(tmp_path: Path) -> None:
    tokenizer = byte_level((GPT2,))
    tokenizer.add_tokens(["<think>"])
    save(tokenizer, tmp_path, eos_token="<|endoftext|>", chat_template="{{ messages }}")
    found = tokenizer_metadata(tmp_path, config(SIZE, bos_token_id=0, pad_token_id=None))
    tokens, kinds = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    assert len(tokens) == len(kinds) == SIZE
    assert kinds[tokens.index("<think>")] == USER_DEFINED
    assert kinds[tokens.index("<|endoftext|>")] == CONTROL
    assert (kinds[5], kinds[-1], tokens[-1]) == (NORMAL, UNUSED, "[PAD599]")
    assert found["tokenizer.chat_template"] == "{{ messages }}"
    assert (found["tokenizer.ggml.bos_token_id"], found["tokenizer.ggml.add_bos_token"]) == (0, False)
    assert "tokenizer.ggml.padding_token_id" not in found


def test_scores_fall_with_the_ranks_of_merges(tmp_path: Path) -> None:
    save(characters(prefix=True, metaspace=False), tmp_path, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    found = tokenizer_metadata(tmp_path, config())
    tokens, scores, kinds = (found[f"tokenizer.ggml.{key}"] for key in ("tokens", "scores", "token_type"))
    merges = json.loads((tmp_path / "tokenizer.json").read_text())["model"]["merges"]
    ranked = ["".join(merge) for merge in merges]
    assert sorted(set(ranked), key=lambda text: -scores[tokens.index(text)]) == list(dict.fromkeys(ranked))
    assert (kinds[tokens.index("<0x0A>")], kinds[tokens.index("<unk>")]) == (BYTE, UNKNOWN)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pre_tokenizer": {"type": "Whitespace"}}, r"no pre-tokenizer of llama.cpp is known for Whitespace"),
        ({"pre_tokenizer": None}, "known for no splitting"),
        ({"normalizer": {"type": "Lowercase"}}, "no normalizer of kind Lowercase"),
        (
            {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": r"\d+"}, "behavior": "Isolated", "invert": False}},
            r"known for \\d\+ \(ignore_merges: False\); .* SPLITTINGS of moeq.formats.gguf_splitting",
        ),
    ],
)
def test_a_tokenizer_that_llama_cpp_has_not_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    content = json.loads(byte_level((GPT2,)).to_str()) | change
    save(Tokenizer.from_str(json.dumps(content)), tmp_path)
    with pytest.raises(ValueError, match=message):
        tokenizer_metadata(tmp_path, config())


def test_a_missing_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"transformers opens no tokenizer in .*; add its files"):
        tokenizer_metadata(tmp_path, config())


def test_a_tokenizer_of_another_kind_is_refused(tmp_path: Path) -> None:
    save(Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>")), tmp_path)
    with pytest.raises(ValueError, match="kind WordLevel is not written, BPE and Unigram are"):
        tokenizer_metadata(tmp_path, config())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"byte_fallback": True}}, "falls back to them"),
        ({"model": {"unk_id": None}}, "without an unknown token"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "and this one has Whitespace"),
        ({"normalizer": {"type": "Lowercase"}}, "and this one does by Lowercase"),
    ],
)
def test_a_unigram_model_that_llama_cpp_reads_otherwise_is_refused(change: dict[str, Any], message: str) -> None:
    model = {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["a", -1.0]], "byte_fallback": False}
    content = {"normalizer": None, "pre_tokenizer": METASPACE} | change
    content["model"] = model | change.get("model", {})
    with pytest.raises(ValueError, match=message):
        unigram_keys(content, 2)


def test_a_vocabulary_larger_than_the_model_is_refused(tmp_path: Path) -> None:
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="token 256 of the tokenizer is outside of the model's vocabulary of 200"):
        tokenizer_metadata(tmp_path, config(200))


def test_a_blank_in_front_is_another_way_of_cutting() -> None:
    content = {"model": {}, "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}}
    with pytest.raises(ValueError, match=r"ByteLevel \(add_prefix_space: True"):
        splitting(content)
