"""Every command and every piece of code of README and docs/ runs: on a tiny model, with little data."""

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import callbacks
import datamodules
from main import main
from tests.docs.pages import PAGES, ROOT, Command, blocks, commands, text
from tests.test_main import FIT_CONFIGS, QUIET, data, fit, small_data, tiny

__all__ = ["data", "tiny"]  # fixtures

COMMANDS = commands()
MOEQ = [command for command in COMMANDS if command.words[:2] == ("python", "main.py")]
SNIPPETS = [(page, code) for page in PAGES for code in blocks(page, "python")]
LISTS = [(page, code) for page in PAGES for code in blocks(page, "yaml")]
EXPORT = re.compile(r"runs/(\w+)/export")


@pytest.fixture(scope="module")
def export(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    fit(Path("configs/rtn_w3.yaml"), tiny, folder)
    return folder / "export"


def test_every_command_is_of_a_program_that_is_checked_here() -> None:
    assert len(MOEQ) > 8
    assert {command.words[0] for command in COMMANDS} == {"python", "make", "pip", "tensorboard"}


@pytest.mark.parametrize("command", [c for c in MOEQ if not c.needs], ids=str)
def test_a_command_runs(
    command: Command, tiny: Path, export: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if "--help" in command.words:
        with pytest.raises(SystemExit) as end:
            main(list(command.words[2:]))
        assert end.value.code == 0
        assert "--config" in capsys.readouterr().out
        return
    kind, given = command.words[2], list(command.words[3:])
    config = Path(given[given.index("--config") + 1])
    if kind == "fit" and len(given) == 2:
        assert config in FIT_CONFIGS, "every one of them is run by tests/test_main.py"
        return
    folder = [f"--trainer.default_root_dir={tmp_path}", *QUIET]
    if kind == "fit":
        main(["fit", *given, f"--model.name={tiny}", "--model.group_size=16", *small_data(config), *folder])
        assert (tmp_path / "verification.json").is_file()
    else:
        models = [f"--model.name={export}", f"--model.reference={tiny}"]
        main(["validate", *given, *models, f"--data.data_dir={data}", "--data.window_length=64", *folder])
        assert (tmp_path / "results.json").is_file()


@pytest.mark.parametrize("command", [c for c in MOEQ if c.needs], ids=str)
def test_the_options_of_a_command_that_needs_more_are_accepted(
    command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main([*command.words[2:], "--print_config"])
    assert end.value.code in (0, None)
    options = yaml.safe_load(capsys.readouterr().out)
    named = command.words.index("--model.name") + 1 if "--model.name" in command.words else None
    assert named is None or options["model"]["name"] == command.words[named]


def test_every_option_that_a_page_names_is_one(capsys: pytest.CaptureFixture[str]) -> None:
    known = set()
    for command, config in (("fit", "moequant_w3"), ("fit", "rtn_w3"), ("validate", "eval")):
        with pytest.raises(SystemExit):
            main([command, "--config", f"configs/{config}.yaml", "--print_config"])
        known |= set(_keys(yaml.safe_load(capsys.readouterr().out)))
    named = {name for page in PAGES for name in re.findall(r"--((?:model|data|trainer)\.[\w.]*\w)", text(page))}
    assert len(named) > 12
    assert not sorted(name for name in named if name not in known and not name.endswith(".help"))


def _keys(options: dict[str, Any], before: str = "") -> Iterator[str]:
    """Options by the names that they have on the command line."""
    for name, value in options.items():
        yield f"{before}{name}"
        if isinstance(value, dict):
            yield from _keys(value, before if name == "init_args" else f"{before}{name}.")


def test_exports_that_are_opened_are_in_folders_of_configurations() -> None:
    folders = {yaml.safe_load(path.read_text())["trainer"]["default_root_dir"] for path in FIT_CONFIGS}
    named = {name for page in PAGES for name in EXPORT.findall(text(page))}
    assert named
    assert {f"runs/{name}" for name in named} <= folders


@pytest.mark.parametrize("command", [c for c in COMMANDS if c not in MOEQ], ids=str)
def test_what_a_command_names_exists(command: Command) -> None:
    program, *words = command.words
    if program == "make":
        makefile = (ROOT / "Makefile").read_text(encoding="utf8")
        assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in words)
    elif program == "python":
        _check_program(words)
    elif program == "pip":
        assert command.needs
        assert words[0] == "install"
        assert all((ROOT / words[i + 1]).exists() for i, word in enumerate(words) if word in ("-c", "-e", "-r"))
    else:
        assert importlib.util.find_spec(program) is not None


def _check_program(words: list[str]) -> None:
    """A script or a module that does something when it is run."""
    path = ROOT / (f"{words[1].replace('.', '/')}.py" if words[0] == "-m" else words[0])
    path = path if path.is_file() else path.with_suffix("") / "__main__.py"
    assert path.is_file()
    assert 'if __name__ == "__main__":' in path.read_text(encoding="utf8")


@pytest.mark.parametrize(("page", "code"), SNIPPETS, ids=[page.name for page, _ in SNIPPETS])
def test_a_piece_of_python_runs(page: Path, code: str, export: Path) -> None:
    exec(compile(EXPORT.sub(str(export), code), str(page), "exec"), {"__name__": "piece_of_a_page"})


@pytest.mark.parametrize(("page", "code"), LISTS, ids=[page.name for page, _ in LISTS])
def test_a_list_of_steps_can_be_built(page: Path, code: str) -> None:
    classes = _classes()
    steps = yaml.safe_load(code)
    assert all(classes[step["class_path"]](**step.get("init_args", {})) for step in steps)


def _classes() -> dict[str, Any]:
    """Callbacks and datamodules by class name."""
    found: dict[str, Any] = {}
    for package in (callbacks, datamodules):
        for path in Path(package.__path__[0]).glob("*.py"):
            module = importlib.import_module(f"{package.__name__}.{path.stem}")
            found |= {name: kind for name, kind in vars(module).items() if isinstance(kind, type)}
    return found
