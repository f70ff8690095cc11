"""docs/serving.md lists the families whose files were run."""

from collections.abc import Mapping

import pytest

from moeq.formats.gguf_families import FAMILIES
from moeq.formats.gguf_splitting import SPLITTINGS
from moeq.formats.gguf_wrappers import WRAPPERS
from moeq.formats.mlx_known import KNOWN
from tests import families
from tests.docs.pages import ROOT


def gguf_table() -> str:
    """Families of llama.cpp, as the page has them."""
    lines = ["| family | llama.cpp's name | computed with, whatever the model says |", "| --- | --- | --- |"]
    for name, family in sorted(FAMILIES.items()):
        fixed = ", ".join(f"`{option}: {value}`" for option, value in family.fixed)
        lines.append(f"| {name} | `{family.architecture}` | {fixed} |")
    return "\n".join(lines) + "\n"


def wrapper_table() -> str:
    """Wrappers whose language models llama.cpp reads."""
    lines = ["| wrapper | its language model | llama.cpp's name |", "| --- | --- | --- |"]
    for name, family in sorted(WRAPPERS.items()):
        lines.append(f"| {name} | {family.language_model} | `{family.architecture}` |")
    return "\n".join(lines) + "\n"


def test_the_page_lists_every_family_that_llama_cpp_reads_and_what_it_computes_with() -> None:
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf8")
    assert gguf_table() in page
    assert wrapper_table() in page
    assert all(f"`{name}`" in page for name in SPLITTINGS.values())


def not_written(page: str, runtime: str) -> set[str]:
    """Families of the table that says why a runtime's files are not written."""
    table = page.split(f"| family, wrapper | {runtime} knows it as | why it is not written |\n")[1].split("\n\n")[0]
    return {name for line in table.splitlines()[1:] for name in line.split("|")[1].strip().split(", ")}


@pytest.mark.parametrize(("runtime", "written"), [("llama.cpp", FAMILIES | WRAPPERS), ("mlx-lm", KNOWN)])
def test_every_family_is_written_or_the_page_says_why_it_is_not(runtime: str, written: Mapping[str, object]) -> None:
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf8")
    assert not_written(page, runtime) == {*families.FAMILIES, *families.WRAPPERS} - written.keys()


def test_the_page_lists_every_family_that_mlx_lm_reads() -> None:
    page = " ".join((ROOT / "docs" / "serving.md").read_text(encoding="utf8").split())
    as_class = {name: f" (as {family.written_as})" if family.written_as else "" for name, family in KNOWN.items()}
    alone = ", ".join(sorted(name for name, family in KNOWN.items() if not family.language_model))
    inside = ", ".join(f"{n}{as_class[n]}" for n, family in sorted(KNOWN.items()) if family.language_model)
    assert f"families {alone}; language models of the wrappers {inside}." in page
