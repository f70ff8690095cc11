"""The pages that a reader meets, and what is in them: blocks of code, code within a sentence, links.

Conventions of the pages: a command stands in a block of language ``sh``, one a line (a backslash continues it), or in a
sentence as code that begins with the program.  A command that cannot run here ends with a comment that says what it
needs: ``# needs the hub``, ``# needs a GPU`` or ``# needs the network``.
"""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
_PROGRAM = re.compile(r"(python (main\.py|-m|\w+/)|(make|pip|tensorboard) )")
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_NEEDS = re.compile(r"#\s*needs (the hub|a GPU|the network)\s*$")


@dataclass(frozen=True)
class Command:
    """A command of a page: its words, and what it needs that a test does not have."""

    page: str
    words: tuple[str, ...]
    needs: str | None = None

    def __str__(self) -> str:
        return f"{self.page}: {shlex.join(self.words)}"


def text(page: Path) -> str:
    return page.read_text(encoding="utf8")


def blocks(page: Path, language: str) -> list[str]:
    """Fenced blocks of one language."""
    return [code for name, code in _BLOCK.findall(text(page)) if name == language]


def spans(page: Path) -> list[str]:
    """Code within sentences and tables, with line breaks as blanks."""
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", _BLOCK.sub("", text(page)))]


def commands() -> list[Command]:
    """Every command of every page once, in order."""
    found: dict[tuple[str, ...], Command] = {}
    for page in PAGES:
        name = str(page.relative_to(ROOT))
        lines = [line for code in blocks(page, "sh") for line in code.replace("\\\n", " ").splitlines()]
        lines += [code for code in spans(page) if _PROGRAM.match(code)]
        for line in filter(None, map(str.strip, lines)):
            needs = _NEEDS.search(line)
            words = tuple(shlex.split(line, comments=True))
            found.setdefault(words, Command(name, words, needs[1] if needs else None))
    return list(found.values())
