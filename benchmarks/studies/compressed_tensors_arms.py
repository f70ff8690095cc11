"""What ``compressed_tensors.py`` asks of moeq and llm-compressor for each kind of folder."""

import os
import subprocess
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.lab.allocated import DAMPING, allocated
from callbacks.bit_allocation import BitAllocation
from callbacks.gptq import GPTQ
from callbacks.hessian_calibration import HessianCalibration
from callbacks.kronecker_factors import KroneckerFactors
from callbacks.learned_rounding import LearnedRounding
from callbacks.router_calibration import RouterCalibration

OWN, OWN_LEARNED, OWN_BEST = "moeq", "moeq, learned", "moeq, two Hessians"
RIVAL = "llm-compressor, GPTQ"
# What llm-compressor is asked beyond its defaults.
THEIRS: dict[str, tuple[str, ...]] = {
    RIVAL: (),
    "llm-compressor, GPTQ, mse": ("--observer", "memoryless_mse"),
    "llm-compressor, RTN": ("--rtn",),
    "llm-compressor, RTN, mse": ("--rtn", "--observer", "memoryless_mse"),
}
GROUPS = (32, 64, 128)
# Bits of a weight in W4A16 in groups of 128, 64, 32.
BUDGETS = (4.125, 4.25, 4.5)
LEARNED, BEST = ("W4 g64", "4.25"), (4.125,)
CHOICES: tuple[int | str, ...] = ("4g0", "4g128", "4g64", "4g32", "8g0", "8g128", "8g64")
SURVEY = "survey.json"
SCRIPT = Path(__file__).resolve().parents[1] / "peers" / "quantize_llmcompressor.py"


def is_uniform(kind: str) -> bool:
    """Whether all weights of a kind of folder have one scheme; else it is a budget."""
    return kind.startswith("W4")


def steps_of(quantizer: str, kind: str, seed: int, folder: Path) -> tuple[list[Callback], dict[str, Any]]:
    """Callbacks and settings of the module for a folder of moeq's.

    Args:
        quantizer: Which of moeq's.
        kind: "W4 g64", or a budget in bits of a weight in the folder.
        seed: Of the sequences that the original writes for the factors of both Hessians.
        folder: Has the survey, for budgets; keeps these factors.
    """
    settings: dict[str, Any] = {"affinity_power": 1.0, "damping": DAMPING, "bits": 4, "grid": "full_range"}
    settings["group_size"] = int(kind.partition("g")[2]) if is_uniform(kind) else 64
    plan = BitAllocation() if is_uniform(kind) else allocated(float(kind), folder / SURVEY, CHOICES, "vllm")
    steps: list[Callback] = [plan, RouterCalibration(), HessianCalibration(), GPTQ()]
    if quantizer == OWN_BEST:
        steps.insert(0, KroneckerFactors(str(folder / "factors"), seed=seed))
    if quantizer != OWN:
        steps.append(LearnedRounding())
    return steps, settings


def run_llmcompressor(
    python: Path, model: str, quantizer: str, kind: str, seed: int, ids_NL: Tensor, folder: Path
) -> Path:
    """The folder that llm-compressor saves for vLLM.

    Args:
        python: Of its environment.
        model: Folder of the original.
        quantizer: One of ``THEIRS``.
        kind: Such as "W4 g64".
        seed: Of its process.
        ids_NL: Calibration ids.
        folder: For what it reads and writes.

    Raises:
        RuntimeError: It failed; the end of what it printed is in the message.
    """
    ids, packed = folder / "ids.safetensors", folder / "packed"
    save_file({"ids": ids_NL.contiguous()}, ids)
    command = [
        str(python.absolute()), str(SCRIPT), "--model", str(Path(model).absolute()), "--ids", str(ids), "--bits", "4",
        "--group-size", kind.partition("g")[2], "--symmetric", "--seed", str(seed), "--packed", str(packed),
        "--output", str(folder / "dense"), *THEIRS[quantizer],
    ]  # fmt: skip
    variables = os.environ | {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=variables, cwd=folder)
    if done.returncode:
        raise RuntimeError(f"{quantizer} {kind} failed:\n{(done.stdout + done.stderr)[-2000:]}")
    return packed
