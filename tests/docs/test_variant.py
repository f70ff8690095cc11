"""The page on adding a variant shows the code that runs, and names files that exist."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/variant.md").read_text(encoding="utf8")


def test_the_page_shows_the_callback_as_it_is() -> None:
    code = (ROOT / "callbacks/hqq.py").read_text(encoding="utf8")
    assert f"```python\n{code}```" in PAGE


def test_every_file_and_function_that_the_page_names_exists() -> None:
    paths = re.findall(r"`([\w/]+\.(?:py|yaml|md))`", PAGE)
    assert len(paths) > 6
    for path in paths:
        assert (ROOT / path).is_file(), path
    for module, name in re.findall(r"`(moeq\.[a-z.]+)\.(\w+)`", PAGE):
        source = (ROOT / f"{module.replace('.', '/')}.py").read_text(encoding="utf8")
        assert f"def {name}(" in source, name
