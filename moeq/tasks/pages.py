"""Texts of the harness's perplexity tasks: pages from the lines of WikiText, and the undoing of its tokenization."""

import re
from collections.abc import Sequence

from moeq.tasks.task import DataRow

# In this order, each on what the one before it left.  The second is the harness's as it stands: nothing matches it.
_DETOKENIZE = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        ("s '", "s'"), (r"/' [0-9]/", "/'[0-9]/"),
        (" @-@ ", "-"), (" @,@ ", ","), (r" @\.@ ", "."),
        (" : ", ": "), (" ; ", "; "), (r" \. ", ". "), (" ! ", "! "), (r" \? ", "? "), (" , ", ", "),
        (r"\(\s*([^\)]*?)\s*\)", r"(\1)"), (r"\[\s*([^\]]*?)\s*\]", r"[\1]"), (r"{\s*([^}]*?)\s*}", r"{\1}"),
        (r'"\s*([^"]*?)\s*"', r'"\1"'), (r"'\s*([^']*?)\s*'", r"'\1'"),
        ("= = = =", "===="), ("= = =", "==="), ("= =", "=="), (" \u00b0 ", "\u00b0"),
        (" \n", "\n"), ("\n ", "\n"), (" N ", " 1 "), (" 's", "'s"),
    )
)  # fmt: skip


def detokenized(text: str) -> str:
    """Text as it was before WikiText's tokenization, as far as lm-evaluation-harness undoes it."""
    for pattern, replacement in _DETOKENIZE:
        text = pattern.sub(replacement, text)
    return text


def pages(rows: Sequence[DataRow]) -> list[DataRow]:
    """Rows ``{"page": text}`` of the articles whose lines are the rows ``{"text": line}``.

    An article begins with a line `` = Title = ``; lines before the first one that are not blank are a page too, and the
    last one ends with the file's final newline, as in the data set EleutherAI/wikitext_document_level.
    """
    found: list[DataRow] = []
    lines: list[str] = []
    # A blank line of the file is " \n"; its row is "".
    for line in "".join(row["text"] or " \n" for row in rows).split("\n"):
        if _is_title(line):
            if any(before.strip() for before in lines):
                found.append({"page": "\n".join(lines)})
            lines = []
        lines.append(line)
    return [*found, {"page": "\n".join(lines)}]


def _is_title(line: str) -> bool:
    # Headings of sections have two or more signs on either side.
    heading = line.replace("= = =", "===").replace("= =", "==").strip()
    return heading.startswith("= ") and heading.endswith(" =")
