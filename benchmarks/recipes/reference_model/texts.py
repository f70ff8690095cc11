"""Write the small evaluation texts beside the reference model.

``python -m benchmarks.recipes.reference_model.texts --data-dir DIR`` reads the held-out parts of the data folder (its
layout is in README.md beside this file) and fills ``assets/reference-moe/texts``.  None of the texts was trained on.
"""

import argparse
import json
import random
from pathlib import Path

from benchmarks.recipes.reference_model.corpus import (
    arithmetic_lines,
    read_rows,
    read_text,
    split_python,
    wikitext_articles,
)

OUTPUT = Path("assets/reference-moe/texts")
VALIDATION_BYTES = 600_000
PYTHON_BYTES = 700_000
ARITHMETIC_LINES = 2000
ARITHMETIC_SUMS = 500
# Training draws its arithmetic from generators seeded with 62-bit integers, so a small seed is not one of theirs.
ARITHMETIC_SEED = 20_000


def whole_articles(text: str, max_bytes: int) -> str:
    """The longest run of whole articles from the start of ``text`` that fits in ``max_bytes``."""
    kept, size = [], 0
    for article in wikitext_articles(text):
        size += len(article.encode())
        if size > max_bytes:
            break
        kept.append(article)
    return "".join(kept)


def whole_files(rows: list[dict[str, str]], max_bytes: int, seed: int = 0) -> list[dict[str, str]]:
    """Whole files in a seeded random order, as many as fit in ``max_bytes``; returned in path order.

    A file longer than a tenth of the budget is passed over, so that no single module is the whole text, and so are the
    code tables of ``encodings``, which are generated lists of hexadecimal numbers rather than Python.
    """
    kept, size = [], 0
    for row in random.Random(seed).sample(rows, len(rows)):
        length = len(row["text"].encode())
        is_table = row["path"].startswith("encodings/")
        if not is_table and length <= max_bytes // 10 and size + length <= max_bytes:
            kept.append({"path": row["path"], "text": row["text"]})
            size += length
    return sorted(kept, key=lambda row: row["path"])


def distinct_sums(num_sums: int, seed: int) -> list[str]:
    """Distinct sums ``a + b = c`` of one- and two-digit numbers, a quarter of the numbers below ten."""
    rng = random.Random(seed)
    sums: dict[str, None] = {}
    while len(sums) < num_sums:
        a, b = (rng.randrange(10 if rng.random() < 0.25 else 100) for _ in range(2))
        sums[f"{a} + {b} = {a + b}"] = None
    return list(sums)


def write_texts(data_dir: Path, output: Path) -> None:
    """Write the six texts."""
    output.mkdir(parents=True, exist_ok=True)
    held_out = split_python(read_rows(data_dir / "python-stdlib/train.jsonl.gz"))[1]
    texts = {
        "wikitext2_test.txt": read_text(data_dir / "wikitext-2-raw/test.txt"),
        "wikitext2_validation.txt": whole_articles(
            read_text(data_dir / "wikitext-2-raw/validation.txt"), VALIDATION_BYTES
        ),
        "python_heldout.jsonl": "".join(json.dumps(row) + "\n" for row in whole_files(held_out, PYTHON_BYTES)),
        "gsm8k_test.jsonl": read_text(data_dir / "gsm8k/test.jsonl"),
        "arithmetic.txt": "\n".join(arithmetic_lines(random.Random(ARITHMETIC_SEED), ARITHMETIC_LINES)) + "\n",
        "arithmetic_sums.txt": "\n".join(distinct_sums(ARITHMETIC_SUMS, ARITHMETIC_SEED + 1)) + "\n",
    }
    for name, text in texts.items():
        (output / name).write_text(text, encoding="utf8", newline="\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True, help="folder of the public data sets")
    parser.add_argument("--output", type=Path, default=OUTPUT, help=f"where the texts go (default {OUTPUT})")
    arguments = parser.parse_args()
    write_texts(arguments.data_dir, arguments.output)
