r"""moeq's folders for vLLM and SGLang beside llm-compressor's, at equal size, read by compressed-tensors.

    OMP_NUM_THREADS=1 python -m benchmarks.studies.compressed_tensors --llmcompressor ENV/bin/python \
        --json benchmarks/results/compressed_tensors.json

The bundled model; both quantizers get the same token ids, which the model wrote itself (EBSS, corpus mode, 64 sequences
of 256 tokens, another set for each seed), and quantize the same weights.  Every folder is read by compressed-tensors
with the scheme that it finds in its configuration, and its values are compared with the original in transformers: vLLM
has no kernel for these weights on most CPUs.  llm-compressor runs in an environment of its own
(benchmarks/peers/README.md); without one its rows are left out.
"""

import argparse
import json
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

from lightning.pytorch import Callback
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks.lab.files import fit_file, tensor_bytes
from benchmarks.lab.judge import file_bits
from benchmarks.lab.sets import calibration_set
from benchmarks.lab.study import MODEL, Study
from benchmarks.lab.tables import Row
from benchmarks.lab.yardstick import Texts, Yardstick
from benchmarks.peers.dense import QUANTIZED, load_folder
from benchmarks.studies.files_report import draw, report
from callbacks.bit_allocation import BitAllocation
from callbacks.gptq import GPTQ
from callbacks.hessian_calibration import HessianCalibration
from callbacks.learned_rounding import LearnedRounding
from callbacks.router_calibration import RouterCalibration
from moeq.allocation.plan import parse_choices
from moeq.checkpoint.loading import load_model
from moeq.disk.atomic import write_json, write_tensors
from moeq.quant.spec import GridSpec, SolveSpec
from moeq.survey.survey_spec import SurveySpec
from moeq.survey.surveyor import survey_model

NUM_WINDOWS = 8  # per domain
OWN, OWN_LEARNED = "moeq", "moeq, learned"
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
CHOICES: tuple[int | str, ...] = ("4g0", "4g128", "4g64", "4g32", "8g0", "8g128", "8g64")
DAMPING = 0.1
SCRIPT = Path(__file__).resolve().parents[1] / "peers" / "quantize_llmcompressor.py"


@dataclass(frozen=True)
class Case:
    """One folder; a seed is one calibration set, which rounding to nearest does not use."""

    seed: int
    quantizer: str
    kind: str


class CompressedTensors(Study[Case]):
    """Every folder of both quantizers."""

    title = "Folders of compressed-tensors of equal size, in transformers"
    legend = (
        "KL to the original in nats per token, mean over four domains of 8 windows of 256 tokens, +- over seeds "
        "(calibration sets); bits of a quantized weight with scales; bytes of all tensors of the folder, BF16 "
        "embedding and routers included. W4 gN is 4 bits, symmetric, in groups of N for every weight (W4A16). "
        "llm-compressor's GPTQ with its defaults (every token to every expert, ranges from minimum and maximum), with "
        "ranges by mean squared error, and rounding to nearest. moeq's folders with a number of bits have the schemes "
        "that the allocator chose for vLLM among 4 bits per channel and in groups of 128, 64 and 32 and 8 bits per "
        "channel and in groups of 128 and 64 (one survey, on the first set); all on full-range symmetric grids by AGQ "
        "with refitted routers."
    )
    quick: ClassVar = {"seeds": [0], "groups": [64], "budgets": [], "learned": []}

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--groups", type=int, nargs="*", default=list(GROUPS), help="of W4A16 folders")
        parser.add_argument("--budgets", type=float, nargs="*", default=list(BUDGETS), help="bits of allocated folders")
        parser.add_argument("--learned", nargs="*", default=["W4 g64", "4.25"], help="kinds with learned rounding, too")
        parser.add_argument("--llmcompressor", type=Path, metavar="PYTHON", help="interpreter that has llm-compressor")

    def cases(self) -> list[Case]:
        """Seed by seed; what uses no data comes once."""
        o, cases = self.options, []
        for seed in o.seeds:
            for kind in (f"W4 g{group}" for group in o.groups):
                asked = [name for name in THEIRS if seed == o.seeds[0] or "RTN" not in name]
                cases += [Case(seed, name, kind) for name in asked if o.llmcompressor]
                cases.append(Case(seed, OWN, kind))
            cases += [Case(seed, OWN, f"{budget:g}") for budget in o.budgets]
            cases += [Case(seed, OWN_LEARNED, kind) for kind in o.learned]
        return cases

    @cached_property
    def yardstick(self) -> Yardstick:
        return Yardstick(MODEL, Texts(num_windows=NUM_WINDOWS))

    @cached_property
    def num_weights(self) -> int:
        """How many are quantized in every folder."""
        return sum(tensor.numel() for name, tensor in load_folder(Path(MODEL)).items() if QUANTIZED.fullmatch(name))

    def ids(self, seed: int) -> Tensor:
        """Calibration ids of a seed."""
        return calibration_set(self.yardstick, "corpus", 64, seed, self.options.folder)

    def measure(self, case: Case) -> Row:
        with TemporaryDirectory() as temporary:
            folder = self._make(case, Path(temporary))
            num_bytes = tensor_bytes(folder)
            domains = self.yardstick.row(
                load_model(str(write_values(folder, Path(MODEL), Path(temporary) / "values")), "auto")
            )
        bits = file_bits(num_bytes, tensor_bytes(Path(MODEL)), self.num_weights)
        return {"bytes": num_bytes, "bits": bits, "domains": domains}

    def _make(self, case: Case, folder: Path) -> Path:
        if case.quantizer in THEIRS:
            return run_llmcompressor(self.options.llmcompressor, case, self.ids(case.seed), folder)
        survey, settings = self.options.folder / "survey.json", dict[str, Any](affinity_power=1.0, damping=DAMPING)
        if case.kind.startswith("W4"):
            plan, group_size = BitAllocation(), int(case.kind.partition("g")[2])
        else:
            make_survey(survey, self.yardstick.model, self.ids(0))
            plan, group_size = allocated(float(case.kind), survey), 64
        steps: list[Callback] = [plan, RouterCalibration(), HessianCalibration(), GPTQ()]
        steps += [LearnedRounding()] if case.quantizer == OWN_LEARNED else []
        settings |= {"bits": 4, "group_size": group_size, "grid": "full_range"}
        return fit_file(self.ids(case.seed), steps, "compressed-tensors", folder, **settings)

    def report(self, rows: Sequence[Row]) -> str:
        return report(rows, (OWN, OWN_LEARNED), RIVAL)

    def draw(self, rows: Sequence[Row], path: Path) -> None:
        draw(rows, path)


def allocated(budget: float, survey: Path) -> BitAllocation:
    """Schemes of least predicted divergence, of so many bits of a weight in the folder."""
    return BitAllocation(
        survey=str(survey), method="allocate", cost="fisher", budget=budget, budget_unit="average_bits",
        choices=CHOICES, runtime="vllm",
    )  # fmt: skip


def make_survey(path: Path, model: nn.Module, ids_NL: Tensor) -> None:
    """Costs of every choice for every weight, made once, on one calibration set for all seeds."""
    if not path.is_file():
        spec = SurveySpec(
            costs=("fisher",), choices=parse_choices(CHOICES, None), solve=SolveSpec(damping=DAMPING),
            grid=GridSpec(4, 64, symmetric=True, kind="full_range"),
        )  # fmt: skip
        write_json(path, survey_model(model, ids_NL.split(8), spec).to_json())


def run_llmcompressor(python: Path, case: Case, ids_NL: Tensor, folder: Path) -> Path:
    """The folder that llm-compressor saves for vLLM.

    Raises:
        RuntimeError: It failed; the end of what it printed is in the message.
    """
    ids, packed = folder / "ids.safetensors", folder / "packed"
    save_file({"ids": ids_NL.contiguous()}, ids)
    command = [
        str(python.absolute()), str(SCRIPT), "--model", str(Path(MODEL).absolute()), "--ids", str(ids), "--bits", "4",
        "--group-size", case.kind.partition("g")[2], "--symmetric", "--seed", str(case.seed), "--packed", str(packed),
        "--output", str(folder / "dense"), *THEIRS[case.quantizer],
    ]  # fmt: skip
    variables = os.environ | {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=variables, cwd=folder)
    if done.returncode:
        raise RuntimeError(f"{case} failed:\n{(done.stdout + done.stderr)[-2000:]}")
    return packed


def write_values(packed: Path, source: Path, folder: Path) -> Path:
    """A folder with the values of another, as compressed-tensors reads them by its configuration.

    Args:
        packed: Folder of compressed-tensors, its weights under the keys of the original.
        source: The original, of one file.
        folder: To create.
    """
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.utils.match import is_match

    config = json.loads((packed / "config.json").read_text(encoding="utf8"))
    said = QuantizationConfig.model_validate(config["quantization_config"])
    stored, linear, values = load_folder(packed), nn.Linear(1, 1, device="meta"), dict[str, Tensor]()
    for key, original in load_folder(source).items():
        path = key.removesuffix(".weight")
        if key in stored:
            values[key] = stored[key]
            continue
        scheme = next(g for g in said.config_groups.values() if is_match(path, linear, g.targets, said.ignore or ()))
        parts = {name.rpartition(".")[2]: part for name, part in stored.items() if name.rpartition(".")[0] == path}
        reader = BaseCompressor.get_value_from_registry(scheme.format)
        values[key] = reader.decompress(parts, scheme)["weight"].to(original.dtype).contiguous()
    folder.mkdir()
    write_tensors(folder / "model.safetensors", values)
    own = ("quantization_config", "transformers_weights")
    write_json(folder / "config.json", {key: value for key, value in config.items() if key not in own})
    return folder


if __name__ == "__main__":
    CompressedTensors.main()
