"""Runtimes that need an environment of their own: a script runs there, and leaves one file for each folder."""

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from benchmarks.runtimes.opened import Answer, Job
from moeq.disk.atomic import write_json

SCRIPTS = Path(__file__).parent
_SETTINGS = {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "CUDA_VISIBLE_DEVICES": ""}


def is_missing(environments: Path, name: str) -> str | None:
    """Why a runtime cannot be used here; None where its environment exists."""
    python = environments / name / "bin" / "python"
    return None if python.exists() else f"no environment {environments / name}; benchmarks/runtimes/README.md makes it"


def version_in(environments: Path, name: str, package: str) -> str:
    """A package of an environment with its version."""
    code = f"from importlib.metadata import version; print(version({package!r}))"
    python = environments / name / "bin" / "python"
    done = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True)
    return f"{package} {done.stdout.strip()}"


def run_separate(environments: Path, name: str, jobs: Sequence[Job]) -> list[Answer]:
    """Run ``in_NAME.py`` in its environment over some folders, once more after each one at which it died."""
    python = environments / name / "bin" / "python"
    with TemporaryDirectory(prefix=f"{name}_") as folder:
        listed = []
        for index, job in enumerate(jobs):
            ids, output = Path(folder, f"{index}.ids.npy"), Path(folder, f"{index}.npy")
            np.save(ids, job.ids_NL.numpy())
            listed.append({"folder": str(job.folder.resolve()), "ids": str(ids), "output": str(output)})
        while left := [each for each in listed if not _is_answered(Path(each["output"]))]:
            write_json(Path(folder, "jobs.json"), left)
            done = subprocess.run(
                [str(python), str(SCRIPTS / f"in_{name}.py"), str(Path(folder, "jobs.json"))],
                capture_output=True, text=True, check=False, cwd=folder, env=os.environ | _SETTINGS,
            )  # fmt: skip
            died = next((each for each in left if not _is_answered(Path(each["output"]))), None)
            if died is not None:
                last = (done.stdout + done.stderr).strip().splitlines()[-12:]
                said = f"the process died with {done.returncode}: " + " | ".join(last)
                Path(died["output"]).with_suffix(".txt").write_text(said, encoding="utf8")
        return [_read(Path(each["output"])) for each in listed]


def _is_answered(output: Path) -> bool:
    return output.exists() or output.with_suffix(".txt").exists()


def _read(output: Path) -> Answer:
    if output.exists():
        return torch.from_numpy(np.load(output))
    return output.with_suffix(".txt").read_text(encoding="utf8")
