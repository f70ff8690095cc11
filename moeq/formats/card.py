"""The model card of a runtime's folder: that of the packed export, with what is different."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from moeq.disk.atomic import write_text
from moeq.export.card import NAME
from moeq.formats.source import PackedExport

_OPENING = re.compile(r"(?<=^## How to open it\n).*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)
_LIBRARY = re.compile(r"^library_name: .*$", re.MULTILINE)
_PACKED_ROW = re.compile(r"^\| packed \|.*$", re.MULTILINE)
_CARRIED_ROW = re.compile(r"^\| copied \|.*$", re.MULTILINE)
_SIZE_ROW = re.compile(r"^\| size \|.*\n", re.MULTILINE)
_NOT_READ = re.compile(r"^- Runtimes that do not know the format:.*\n", re.MULTILINE)


@dataclass(frozen=True)
class Card:
    """What a card says of a format.

    Attributes:
        format: Name of the format.
        library: Of the hub's metadata: what opens the folder.
        opening: How to open it, Markdown.
        types: How many weights have which type of the format.
        limits: Sentences on what it is not valid for.
        left_out: What the packed export carries of its source and this folder does not, in words.
    """

    format: str
    library: str
    opening: str
    types: Mapping[str, int]
    limits: tuple[str, ...] = ()
    left_out: str | None = None


def write_card(export: PackedExport, folder: Path, card: Card) -> None:
    """Write the card of a folder; a packed export whose card was taken away gives none.

    Raises:
        ValueError: The disk does not take the file.
    """
    path = export.folder / NAME
    if path.is_file():
        write_text(folder / NAME, card_text(path.read_text(encoding="utf8"), card))


def card_text(packed: str, card: Card) -> str:
    """The card of a packed export as that of a runtime's folder.

    Args:
        packed: Text of the packed export's card.
        card: What is different.
    """
    types = ", ".join(f"{count} weights as {name}" for name, count in card.types.items())
    text = _LIBRARY.sub(f"library_name: {card.library}", packed, count=1)
    text = _OPENING.sub(lambda _: f"\n{card.opening.strip()}\n\n", text, count=1)
    text = _PACKED_ROW.sub(lambda _: f"| {card.format} | {types} |", text, count=1)
    if card.left_out is not None:
        text = _CARRIED_ROW.sub(lambda _: f"| left out | {card.left_out} |", text, count=1)
    limits = "".join(f"- {limit}\n" for limit in card.limits)
    return _NOT_READ.sub(lambda _: limits, _SIZE_ROW.sub("", text, count=1), count=1)
