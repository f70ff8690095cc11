"""README and docs/ name files, modules, classes, configurations and pages that exist."""

import importlib
import re
from pathlib import Path

import pytest

from tests.docs.pages import PAGES, ROOT, spans, text

FOLDERS = "moeq|callbacks|datamodules|configs|docs|tests|benchmarks|assets"
PATH = re.compile(rf"(?<![\w/.-])(?:{FOLDERS})/[\w./*-]*\w")
DOTTED = re.compile(r"(?<![\w/.-])(?:moeq|callbacks|datamodules)(?:\.\w+)+")
IDS = [str(page.relative_to(ROOT)) for page in PAGES]


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_every_path_that_a_page_names_exists(page: Path) -> None:
    named = {path for code in spans(page) for path in PATH.findall(code)}
    assert not sorted(path for path in named if not _exists(path))


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_every_configuration_that_a_page_names_exists(page: Path) -> None:
    named = {code for code in spans(page) if re.fullmatch(r"[\w*]+\.yaml", code)} - {"config.yaml"}
    assert not sorted(name for name in named if name != "config_validate.yaml" and not _exists(f"configs/{name}"))


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_every_dotted_name_of_a_page_is_a_module_or_in_one(page: Path) -> None:
    named = {name for name in DOTTED.findall(text(page)) if not name.endswith((".py", ".md"))}
    assert not sorted(name for name in named if not _resolves(name))


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_every_link_to_another_page_leads_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", text(page))
    assert not sorted(link for link in links if "://" not in link and not _leads(page, link))


def test_a_name_that_is_wrong_is_found() -> None:
    assert not _exists("moeq/quant/no_such_file.py")
    assert not _resolves("moeq.quant.gptq.no_such_function")
    assert not _resolves("callbacks.GPTQ")
    assert not _leads(ROOT / "README.md", "docs/architecture.md#no-such-heading")
    assert _exists("moeq/quant/gptq.py")
    assert _resolves("moeq.quant.gptq.gptq_solve")
    assert _resolves("moeq.kernels.sweep_triton")
    assert _leads(ROOT / "README.md", "docs/run_folder.md#memory")


def _exists(path: str) -> bool:
    return any(ROOT.glob(path)) if "*" in path else (ROOT / path).exists()


def _resolves(name: str) -> bool:
    """Whether a dotted name is a module, or what is left of it are attributes of one."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError as missing:
            if missing.name is not None and name.startswith(missing.name):
                continue
            return True  # a module that needs what is not installed, such as triton
        for part in parts[length:]:
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False


def _leads(page: Path, link: str) -> bool:
    path, _, heading = link.partition("#")
    target = page.parent / path if path else page
    if not target.exists():
        return False
    return not heading or heading in {_slug(title) for title in re.findall(r"^#+ (.+)$", text(target), re.MULTILINE)}


def _slug(title: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")
