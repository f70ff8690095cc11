"""Keep the file tree of README.md true: ``python docs/file_tree.py`` rewrites it from the tracked files.

A Python file is described by the first sentence of its docstring, a YAML file by its first comment, any other file by
``NOTES``; folders in ``COLLAPSED`` are one line.
"""

import ast
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- tree:begin -->\n```\n", "```\n<!-- tree:end -->"
COLLAPSED = {
    "assets/reference-moe/texts/": "held-out texts of the four domains and their licences",
    "benchmarks/results/": "measurements: command, commit, hardware, seeds, mean and spread",
    "tests/": "tests, in the same folders as what they test",
}
NOTES = {
    ".ci/run": "lint, types and tests: what must pass before a merge",
    ".gitattributes": "the evaluation texts stay as published",
    ".gitignore": "what is not tracked",
    "CHANGELOG.md": "what changed",
    "CONTRIBUTING.md": "four commands and the proof-of-value rule",
    "LICENSE": "Apache-2.0",
    "Makefile": "quickstart, test, lint, types, reference-model, mixtral-model, clean",
    "README.md": "this file",
    "assets/reference-moe/README.md": "model card: data, recipe, losses, expert usage",
    "assets/reference-moe/card.json": "the numbers of the card",
    "assets/reference-moe/config.json": "shape of the model",
    "assets/reference-moe/generation_config.json": "defaults of generate",
    "assets/reference-moe/model.safetensors": "weights, bfloat16",
    "assets/reference-moe/tokenizer.json": "byte-level BPE with single digits",
    "assets/reference-moe/tokenizer_config.json": "special tokens",
    "benchmarks/LOG.md": "dated log of experiments, the failed ones too",
    "benchmarks/peers/README.md": "environments of other quantizers, and what had to be worked around",
    "benchmarks/reference_model/README.md": "how the recipe runs and which data it reads",
    "benchmarks/reference_model/card_template.md": "text of the model card",
    "benchmarks/reference_model/config.yaml": "settings of the training run",
    "constraints.txt": "exact tested versions",
    "docs/code_execution.md": "running model-written code: what is protected how, and what is not",
    "docs/families.md": "model families: what differs, what is quantized, what is refused and why",
    "docs/methods.md": "every method: equations, and where each is in the code",
    "docs/tasks.md": "evaluation tasks: all of them, their data, the papers' protocols, adding one",
    "docs/variant.md": "adding a quantization variant, with HQQ as the worked example",
    "main.py": "the command line: fit and validate",
    "pyproject.toml": "packages, dependencies, settings of ruff, mypy and pytest",
}


def tracked_files() -> list[str]:
    """Files under version control or about to be, in path order; raises CalledProcessError outside a checkout."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return sorted({path for path in listed if (ROOT / path).is_file()})


def describe(path: str) -> str:
    """One line about a file.

    Raises:
        ValueError: Nothing describes it.
    """
    if path in NOTES:
        return NOTES[path]
    text = (ROOT / path).read_text(encoding="utf8")
    if path.endswith(".py"):
        docstring = ast.get_docstring(ast.parse(text)) or ""
        if docstring:
            return _short(" ".join(docstring.split("\n\n")[0].split()))
    if path.endswith(".yaml") and text.startswith("# "):
        return _short(text.split("\n")[0][2:])
    raise ValueError(f"{path} has no description; add a docstring, a first comment line (YAML) or a line in NOTES")


def _short(text: str, limit: int = 92) -> str:
    """First sentence; a longer one than ``limit`` is cut at its colon, else at its last comma or bracket."""
    sentence = re.split(r"[.;](?: |$)", text.replace("``", ""))[0].rstrip(":")
    if len(sentence) > limit:
        sentence = sentence.split(": ")[0]
    while len(sentence) > limit and re.search(r", | [(]", sentence):
        sentence = sentence[: max(sentence.rfind(", "), sentence.rfind(" ("))]
    return sentence


def tree(paths: list[str]) -> str:
    """The tree as text: files of a folder before its sub-folders."""
    lines: dict[tuple[tuple[int, str], ...], str] = {}
    for path in paths:
        folder = next((prefix for prefix in COLLAPSED if path.startswith(prefix)), None)
        name, note = (folder, COLLAPSED[folder]) if folder else (path, describe(path))
        parts = name.rstrip("/").split("/")
        if parts[-1] == "__init__.py":
            continue
        for depth in range(1, len(parts)):
            lines.setdefault(_key(parts[:depth], is_folder=True), "    " * (depth - 1) + parts[depth - 1] + "/")
        label = "    " * (len(parts) - 1) + parts[-1] + ("/" if folder else "")
        lines[_key(parts, is_folder=bool(folder))] = f"{label:<32} {note}"
    return "".join(f"{line}\n" for _, line in sorted(lines.items()))


def _key(parts: list[str], *, is_folder: bool) -> tuple[tuple[int, str], ...]:
    """Sorts files before folders at every level."""
    return (*((1, part) for part in parts[:-1]), (int(is_folder), parts[-1]))


def updated(readme: str) -> str:
    """README with the tree of the present files."""
    head, rest = readme.split(BEGIN)
    return head + BEGIN + tree(tracked_files()) + END + rest.split(END, 1)[1]


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(updated(path.read_text(encoding="utf8")), encoding="utf8")
