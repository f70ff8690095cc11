"""The model card (``README.md``) of an export: what it was made of, by what, how to open it, what it is not valid for.

Its metadata are those that the hub reads (``huggingface_hub.ModelCard``).  The card is for people: no manifest lists
it, so that it may be edited, and results may be added.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import ModelCard, ModelCardData

from moeq.disk.atomic import write_text
from moeq.disk.folder import MANIFEST
from moeq.export.made import Made

NAME = "README.md"
Kind = Literal["packed", "dense"]
_TAKEN_OVER = ("license", "license_name", "license_link", "language", "pipeline_tag")
# A folder of the hub's cache tells the id and the commit that it is a copy of.
_CACHE = re.compile(r"models--(?P<owner>[^/]+?)--(?P<name>[^/]+)/snapshots/(?P<commit>[0-9a-f]+)")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_TASKS = {"AutoModelForImageTextToText": "image-text-to-text", "AutoModelForMultimodalLM": "any-to-any"}
_QUALITY = "## Quality"
_NOT_MEASURED = "Not measured yet: `python main.py validate --config configs/eval.yaml` does, and adds it here."
_OPENING = {
    "packed": """Weights stay packed in memory. transformers alone refuses the folder; moeq has to be installed:

```python
import moeq.checkpoint.quantizer  # teaches transformers the format
from transformers import {opener}

model = {opener}.from_pretrained("{folder}"{code})
```""",
    "dense": """An ordinary folder with the quantized values unpacked, in the size and for the runtimes of the source:

```python
from transformers import {opener}

model = {opener}.from_pretrained("{folder}"{code})
```""",
}


@dataclass(frozen=True)
class Tally:
    """Counts of what the files of an export hold.

    Attributes:
        kind: Packed or dense.
        num_bytes: Of all tensors.
        num_quantized: Weights that are packed.
        num_kept: Other tensors of the model.
        num_carried: Tensors of the source's files that no parameter of the model is made of.
        num_draft: Of these, those of draft layers.
        opener: Class of transformers that opens them.
        runs_code: With code that came with the source.
    """

    kind: Kind
    num_bytes: int
    num_quantized: int
    num_kept: int
    num_carried: int
    num_draft: int
    opener: str = "AutoModelForCausalLM"
    runs_code: bool = False


def write_card(folder: Path, made: Made, counts: Tally, source_folder: Path | None) -> None:
    """Write the card of an export.

    Args:
        folder: Of the export.
        made: How it was made.
        counts: What it holds.
        source_folder: Whose own card gives licence and language; None where there is none.
    """
    write_text(folder / NAME, card_text(made, counts, _source_data(source_folder)))


def card_text(made: Made, counts: Tally, source_data: dict[str, Any]) -> str:
    """The card as text; see ``write_card``.

    Args:
        made: How the export was made.
        counts: What it holds.
        source_data: Metadata of the source's card.
    """
    bits = [] if made.bits is None else [f"{made.bits:g}-bit"]
    hub_id, commit = _hub_place(made)
    taken = {key: source_data[key] for key in _TAKEN_OVER if source_data.get(key)}
    data = ModelCardData(
        library_name="moeq" if counts.kind == "packed" else "transformers",
        base_model=hub_id,
        base_model_relation=None if hub_id is None else "quantized",
        tags=["moeq", "quantized", "mixture-of-experts", *bits],
        **{"pipeline_tag": _TASKS.get(counts.opener, "text-generation"), **taken},
    )
    name = (hub_id or made.source).rstrip("/").rpartition("/")[2] or "model"
    parts = [
        f"# {name}, quantized by moeq",
        _table(_facts(made, counts, hub_id, commit)),
        "## How to open it",
        _OPENING[counts.kind].format(
            folder="export" if counts.kind == "packed" else "dense",
            opener=counts.opener,
            code=", trust_remote_code=True" if counts.runs_code else "",
        ),
        _QUALITY,
        _NOT_MEASURED,
        "## How it was made",
        "By a run of moeq." if made.command is None else f"```sh\n{made.command}\n```",
        "## What it is not valid for",
        _limits(made, counts),
    ]
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n"


def add_quality(folder: Path, table: str) -> bool:
    """Put what was measured into the card of an export; returns whether there was one to put it into.

    Args:
        folder: Of an export, or of any model.
        table: Markdown.

    Raises:
        ValueError: The card cannot be written.
    """
    path = folder / NAME
    if not (folder / MANIFEST).is_file() or not path.is_file():
        return False
    before = path.read_text(encoding="utf8")
    after = with_quality(before, table)
    if after != before:
        write_text(path, after, shared=True)
    return f"{_QUALITY}\n" in before


def with_quality(text: str, table: str) -> str:
    """A card with what was measured in the place of what stood there; one without the heading stays as it is.

    Args:
        text: The card.
        table: Markdown.
    """
    section = re.compile(rf"(?<=^{_QUALITY}\n).*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)
    return section.sub(lambda _: f"\n{table.strip()}\n\n", text, count=1)


def _facts(made: Made, counts: Tally, hub_id: str | None, commit: str | None) -> dict[str, str]:
    draft = f", of which {counts.num_draft} are of draft layers" if counts.num_draft else ""
    facts = {
        "source": hub_id or f"`{Path(made.source).name}`",
        "revision": commit or made.identity,
        "method": made.method,
        "packed": f"{counts.num_quantized} weights" if counts.kind == "packed" else None,
        "bits per quantized weight": None if made.bits is None else f"{made.bits:.3f}",
        "with scales and zero points": None if made.average_bits is None else f"{made.average_bits:.3f}",
        "in the dtypes of the source": f"{counts.num_kept} tensors of the model",
        "copied": f"{counts.num_carried} tensors{draft}, byte by byte" if counts.num_carried else None,
        "size": f"{counts.num_bytes / 1e9:.3f} GB",
        "calibration data": made.data,
        "their digest": made.data_digest,
    }
    return {label: value for label, value in facts.items() if value}


def _limits(made: Made, counts: Tally) -> str:
    items = ["What was not measured above: a low divergence on one kind of text says little about another."]
    if made.data is not None:
        items.append("Languages and domains far from the calibration data, on which rare experts saw few tokens.")
    if counts.kind == "packed":
        items.append("Runtimes that do not know the format: vLLM, SGLang and llama.cpp do not open it.")
    else:
        items.append("Saving memory: the values are those of the packed folder, their size is that of the source.")
    if counts.num_draft:
        items.append("Acceptance rates of the source: its draft layers were trained with the unquantized model.")
    return "\n".join(f"- {item}" for item in items)


def _hub_place(made: Made) -> tuple[str | None, str | None]:
    """Hub id and commit of the source, where its name or its identity tells them."""
    if found := _CACHE.search(made.source):
        return f"{found['owner']}/{found['name']}", found["commit"]
    if Path(made.source).exists() or not _HUB_ID.fullmatch(made.source):
        return None, None
    return made.source, made.identity.rpartition("@")[2] if made.identity else None


def _source_data(folder: Path | None) -> dict[str, Any]:
    """Metadata of the card of a source; nothing where it has none, or one that cannot be read."""
    if folder is None or not (folder / NAME).is_file():
        return {}
    try:
        data: dict[str, Any] = ModelCard.load(folder / NAME, ignore_metadata_errors=True).data.to_dict()
    except Exception:  # of a foreign text: whatever YAML or the hub's library makes of it
        return {}
    return data


def _table(facts: dict[str, str]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {label} | {value} |" for label, value in facts.items())])
