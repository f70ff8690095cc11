"""The file tree of the README names every file."""

import shutil
from pathlib import Path

import pytest

from docs import file_tree


@pytest.mark.skipif(
    shutil.which("git") is None or not (file_tree.ROOT / ".git").exists(), reason="needs a git checkout"
)
def test_the_readme_shows_every_tracked_file_once() -> None:
    readme = (file_tree.ROOT / "README.md").read_text(encoding="utf8")
    assert file_tree.updated(readme) == readme, "out of date; run: python docs/file_tree.py"


def test_files_come_before_folders_and_collapsed_folders_are_one_line() -> None:
    paths = ["LICENSE", "docs/methods.md", "moeq/quant/gptq.py", "tests/a.py", "tests/b/c.py", "Makefile"]
    lines = [line.strip().split("  ")[0] for line in file_tree.tree(paths).splitlines()]
    assert lines == ["LICENSE", "Makefile", "docs/", "methods.md", "moeq/", "quant/", "gptq.py", "tests/"]


def test_a_file_without_description_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_tree, "ROOT", tmp_path)
    (tmp_path / "bare.py").write_text("x = 1\n")
    (tmp_path / "good.py").write_text('"""One idea: in one line.\n\nMore.\n"""\n')
    (tmp_path / "run.yaml").write_text("# Round to nearest: no data.\nmodel: {}\n")
    assert file_tree.describe("good.py") == "One idea: in one line"
    assert file_tree.describe("run.yaml") == "Round to nearest: no data"
    assert file_tree._short("Windows of text: " + "a" * 90) == "Windows of text"
    assert file_tree._short("Windows, " + "a" * 70 + ", and " + "b" * 20) == "Windows, " + "a" * 70
    with pytest.raises(ValueError, match=r"bare\.py has no description"):
        file_tree.describe("bare.py")
