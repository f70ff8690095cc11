"""What ``gguf.py`` asks of moeq and AutoRound for each kind of file."""

import os
import subprocess
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback
from safetensors.torch import save_file
from torch import Tensor, nn

from callbacks.bit_allocation import BitAllocation
from callbacks.gptq import GPTQ
from callbacks.hessian_calibration import HessianCalibration
from callbacks.learned_rounding import LearnedRounding
from callbacks.router_calibration import RouterCalibration
from moeq.allocation.plan import Choice
from moeq.disk.atomic import write_json
from moeq.quant.spec import GridSpec, SolveSpec
from moeq.survey.survey_spec import SurveySpec
from moeq.survey.surveyor import survey_model

OWN = "moeq"
DAMPING = 0.1
# Bits and group size of moeq's grid for a type.
UNIFORM = {"Q2_0": (2, 64), "Q4_0": (4, 32), "Q5_0": (5, 32), "Q8_0": (8, 32)}
CHOICES = ("2g64", "4g32", "5g32", "8g32")
# Round ones, and those of llama.cpp's files of this model: Q2_K, Q3_K_S, Q3_K_M, IQ4_XS, Q4_K_S, Q4_K_M.
BUDGETS = (2.5, 2.93, 3.19, 3.43, 3.72, 4.08, 4.31, 4.5, 4.78, 5.21)
GRIDS: tuple[str, ...] = ()
SCRIPT = Path(__file__).resolve().parents[1] / "peers" / "quantize_autoround_gguf.py"


def steps_of(kind: str, survey: Path) -> tuple[list[Callback], dict[str, Any]]:
    """Callbacks and settings of the module for a file.

    Args:
        kind: A type of ``UNIFORM``, or a budget in bits of the file per weight.
        survey: Of the seed's calibration set, for budgets.
    """
    if kind in UNIFORM:
        bits, group_size = UNIFORM[kind]
        plan = BitAllocation()
    else:
        bits, group_size = 4, 32
        plan = BitAllocation(
            survey=str(survey), method="allocate", cost="fisher", budget=float(kind), budget_unit="average_bits",
            choices=CHOICES, runtime="llama.cpp",
        )  # fmt: skip
    steps: list[Callback] = [plan, RouterCalibration(), HessianCalibration(), GPTQ()]
    if bits < 8:  # at 8 bits nothing is left to learn
        steps.append(LearnedRounding())
    return steps, {
        "bits": bits, "group_size": group_size, "symmetric": True, "affinity_power": 1.0, "damping": DAMPING
    }  # fmt: skip


def make_survey(path: Path, model: nn.Module, ids_NL: Tensor, seed: int) -> None:
    """Costs of every choice for every weight, once for each calibration set."""
    if path.is_file():
        return
    spec = SurveySpec(
        costs=("fisher",), choices=tuple(map(Choice.from_label, CHOICES)), seed=seed, solve=SolveSpec(damping=DAMPING),
        grid=GridSpec(4, 32, symmetric=True),
    )  # fmt: skip
    write_json(path, survey_model(model, ids_NL.split(8), spec).to_json())


def run_autoround(python: Path, kind: str, ids_NL: Tensor, dense: Path, folder: Path) -> Path:
    """The file that AutoRound writes, embedding and head as in the dense one.

    Raises:
        RuntimeError: It failed; the end of what it printed is in the message.
    """
    save_file({"ids": ids_NL.contiguous()}, folder / "ids.safetensors")
    command = [
        str(python.absolute()), str(SCRIPT), "--model", "assets/reference-moe", "--ids", str(folder / "ids.safetensors"),
        "--type", kind, "--dense", str(dense), "--output", str(folder / "autoround.gguf"),
    ]  # fmt: skip
    variables = os.environ | {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=variables)
    if done.returncode:
        raise RuntimeError(f"AutoRound {kind} failed:\n{(done.stdout + done.stderr)[-2000:]}")
    return folder / "autoround.gguf"
