"""docs/serving.md lists the families whose files were run."""

from moeq.formats.gguf_families import FAMILIES
from moeq.formats.gguf_splitting import SPLITTINGS
from moeq.formats.gguf_wrappers import WRAPPERS
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
