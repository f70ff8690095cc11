"""What ``gguf.py`` asks of moeq and AutoRound for each kind of file."""

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
from callbacks.learned_rounding import LearnedRounding
from callbacks.router_calibration import RouterCalibration
from moeq.allocation.patterns import Pattern
from moeq.quant.kinds import TABLES

OWN, OWN_LEARNED = "moeq", "moeq, learned"
# Bits and group size of moeq's grid for a type.
UNIFORM = {"Q2_0": (2, 64), "Q4_0": (4, 32), "Q5_0": (5, 32), "Q8_0": (8, 32)}
CHOICES: tuple[int | str, ...] = ("2g64", "q2_k", "q3_k", "q4_k", "iq4_nl", "4g32", "5g32", "8g32")
# The sizes of llama.cpp's files of the bundled model: Q2_K, Q3_K_S, Q3_K_M, Q4_0, Q4_K_S, Q4_K_M; and less.
BUDGETS = (2.5, 3.19, 3.72, 4.08, 4.5, 4.78, 5.21)
LEARNED = ("3.19", "4.5")
# Types that moeq solves on their own grids, and bits of the experts' down projections, whose rows hold no 256: as
# llama.cpp has them (Q4_0 beside Q2_K and Q3_K, Q5_0 beside Q4_K), or others.
GRIDS = {
    "Q2_K": ("q2_k", 4), "Q3_K": ("q3_k", 4), "Q3_K, down Q5_0": ("q3_k", 5), "Q4_K, down Q4_0": ("q4_k", 4),
    "Q4_K": ("q4_k", 5),
}  # fmt: skip
SCRIPT = Path(__file__).resolve().parents[1] / "peers" / "quantize_autoround_gguf.py"


def steps_of(kind: str, survey: Path, *, learned: bool) -> tuple[list[Callback], dict[str, Any]]:
    """Callbacks and settings of the module for a file.

    Args:
        kind: A type of ``UNIFORM``, or a budget in bits of the file per weight.
        survey: For budgets.
        learned: Whether the rounding is learned after GPTQ.
    """
    common = {"affinity_power": 1.0, "damping": DAMPING}
    settings: dict[str, Any] = {**common, "bits": 4, "group_size": 32, "grid": "full_range"}
    if kind in UNIFORM:
        settings["bits"], settings["group_size"] = UNIFORM[kind]
        plan = BitAllocation()
    elif kind in GRIDS:
        grid, bits = GRIDS[kind]
        settings = {**common, "grid": grid}
        plan = BitAllocation(patterns=[Pattern("*.experts.*.down_proj", bits=bits, group_size=32)])
    else:
        # Latents move between evenly spaced levels.
        choices = tuple(choice for choice in CHOICES if not (learned and choice in TABLES))
        plan = allocated(float(kind), survey, choices, "llama.cpp")
    steps: list[Callback] = [plan, RouterCalibration(), HessianCalibration(), GPTQ()]
    if learned:
        steps.append(LearnedRounding())
    return steps, settings


def run_autoround(python: Path, model: str, kind: str, ids_NL: Tensor, dense: Path, folder: Path) -> Path:
    """The file that AutoRound writes, embedding and head as in the dense one.

    Args:
        python: Of its environment.
        model: Folder of the original.
        kind: Such as "q4_0, 200 steps".
        ids_NL: Calibration ids.
        dense: File of the unquantized model.
        folder: For what it reads and writes.

    Raises:
        RuntimeError: It failed; the end of what it printed is in the message.
    """
    ids, output = folder / "ids.safetensors", folder / "autoround.gguf"
    save_file({"ids": ids_NL.contiguous()}, ids)
    files = ["--model", model, "--ids", str(ids), "--dense", str(dense), "--output", str(output)]
    name, steps = kind.removesuffix(" steps").split(", ")
    command = [str(python.absolute()), str(SCRIPT), "--type", name, "--iters", steps, *files]
    variables = os.environ | {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=variables)
    if done.returncode:
        raise RuntimeError(f"AutoRound {kind} failed:\n{(done.stdout + done.stderr)[-2000:]}")
    return output
