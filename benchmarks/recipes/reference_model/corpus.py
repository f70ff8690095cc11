"""Text of the reference model: four domains, their held-out parts, and the tokenizer trained on the mixture.

The training mixture is prose (WikiText-2, Wikipedia, public-domain books and speeches), Python (the standard
library) and mathematics (GSM8K problems and generated integer arithmetic).  ``load_documents`` reads the files of a
data folder laid out as one folder per data set with one file per split (see README.md beside this file).
"""

import gzip
import json
import random
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

DOMAINS = ("prose", "python", "gsm8k", "arithmetic")
END_OF_TEXT = "<|endoftext|>"


def read_text(path: Path) -> str:
    """Text of a plain or gzipped UTF-8 file."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf8") as file:
        return str(file.read())


def read_rows(path: Path) -> list[dict[str, str]]:
    """Rows of a JSON-lines file, plain or gzipped."""
    return [json.loads(line) for line in read_text(path).split("\n") if line.strip()]


def detokenize_wikitext(text: str) -> str:
    """Undo WikiText's word-level tokenisation: ``1 @,@ 200 men ; it 's`` becomes ``1,200 men; it's``."""
    text = re.sub(r" @([-,.])@ ", r"\1", text)
    text = re.sub(r" ([.,;:!?%)\]}])", r"\1", text)
    text = re.sub(r"([(\[{$£]) ", r"\1", text)
    text = re.sub(r" ('(?:s|re|ve|ll|d|m|t)\b)", r"\1", text)
    text = re.sub(r"n 't\b", "n't", text)
    text = re.sub(r'" ([^"\n]*?) "', r'"\1"', text)
    return re.sub(r" / ", "/", text)


def wikitext_articles(text: str) -> list[str]:
    """Split a WikiText file at its top-level headings (`` = Title = ``)."""
    starts = [match.start() for match in re.finditer(r"(?m)^ ?= [^=\n]+ = *$", text)]
    return [text[a:b] for a, b in zip(starts, [*starts[1:], len(text)], strict=True)]


def arithmetic_lines(rng: random.Random, num_lines: int) -> list[str]:
    """Lines such as ``37 + 58 = 95``: mostly sums of one- and two-digit numbers, then differences and products."""
    lines = []
    for _ in range(num_lines):
        kind = rng.random()
        if kind < 0.6:
            a, b = (rng.randrange(10 if rng.random() < 0.25 else 100) for _ in range(2))
            lines.append(f"{a} + {b} = {a + b}")
        elif kind < 0.7:
            a, b = rng.randrange(1000), rng.randrange(1000)
            lines.append(f"{a} + {b} = {a + b}")
        elif kind < 0.88:
            a, b = sorted((rng.randrange(100), rng.randrange(100)), reverse=True)
            lines.append(f"{a} - {b} = {a - b}")
        else:
            a, b = rng.randrange(100), rng.randrange(10)
            lines.append(f"{a} * {b} = {a * b}")
    return lines


def gsm8k_document(row: dict[str, str]) -> str:
    """One GSM8K problem as text, its calculator annotations kept."""
    return f"Question: {row['question']}\nAnswer: {row['answer']}"


def _fill_unknown(text: str, rare_words: list[str], rng: random.Random) -> str:
    return re.sub("<unk>", lambda _: rng.choice(rare_words), text)


def _rare_words(documents: list[str]) -> list[str]:
    counts = Counter(word for text in documents for word in re.findall(r"\b[A-Z][a-z]{3,}\b", text))
    return sorted(word for word, count in counts.items() if count <= 3)


def split_python(rows: list[dict[str, str]]) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Every tenth file (in path order) is held out; returns (train, held out)."""
    ordered = sorted(rows, key=lambda row: row["path"])
    held_out = ordered[5::10]
    return [row for i, row in enumerate(ordered) if i % 10 != 5], held_out


def load_documents(data_dir: Path, seed: int = 0) -> dict[str, list[str]]:
    """Training documents of the three file-based domains; WikiText appears as published and detokenised."""
    rng = random.Random(seed)
    wikipedia = [f"{row['title']}\n\n{row['text']}" for row in read_rows(data_dir / "wikipedia-sample/train.jsonl")]
    books = [row["text"] for row in read_rows(data_dir / "prose-public-domain/train.jsonl.gz")]
    rare_words = _rare_words(wikipedia)
    articles = [
        _fill_unknown(article, rare_words, rng)
        for article in wikitext_articles(read_text(data_dir / "wikitext-2/train.txt.gz"))
    ]
    python, _ = split_python(read_rows(data_dir / "python-stdlib/train.jsonl.gz"))
    return {
        "prose": articles + [detokenize_wikitext(article) for article in articles] + wikipedia + books,
        "python": [row["text"] for row in python],
        "gsm8k": [gsm8k_document(row) for row in read_rows(data_dir / "gsm8k/train.jsonl")],
    }


def train_tokenizer(documents: dict[str, list[str]], vocab_size: int, seed: int = 0) -> PreTrainedTokenizerFast:
    """Byte-level BPE with single digits, trained on the mixture (each domain capped so that none drowns the rest)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_balanced_sample(documents, seed), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT
    )


def _balanced_sample(documents: dict[str, list[str]], seed: int, characters: int = 6_000_000) -> Iterator[str]:
    for texts in documents.values():
        order = random.Random(seed).sample(texts, len(texts))
        budget = characters
        for text in order:
            if budget <= 0:
                break
            budget -= len(text)
            yield text
