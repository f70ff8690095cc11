"""moeq's MLX folders beside mlx-lm's own quantization, at equal size, judged by mlx-lm itself.

    OMP_NUM_THREADS=1 python -m benchmarks.studies.mlx --json benchmarks/results/mlx.json
    ... --model runs/mixtral_moe/model --label Mixtral --json benchmarks/results/mlx_mixtral.json

One model.  mlx-lm rounds to nearest, with one width or by its recipes of two, or learns (DWQ, GPTQ); moeq divides the
bits by predicted damage at the sizes of those folders.  What learns or calibrates gets what the model wrote itself
(EBSS, corpus mode, 64 sequences of 256 tokens, another set for each seed).  Embedding, head, routers and norms are BF16
in every folder.  mlx-lm computes the logits of each on the CPU in float32, and those of the unquantized model they are
compared with.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import numpy as np
import torch
from lightning.pytorch import Callback
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.lab.allocated import DAMPING, allocated, make_survey
from benchmarks.lab.files import MODELS, fit_file, tensor_bytes
from benchmarks.lab.judge import Judge, file_bits
from benchmarks.lab.sets import calibration_set
from benchmarks.lab.study import MODEL, Study
from benchmarks.lab.tables import Row
from benchmarks.lab.yardstick import Texts, Yardstick
from benchmarks.studies.files_report import draw, report
from callbacks.gptq import GPTQ
from callbacks.hessian_calibration import HessianCalibration
from callbacks.router_calibration import RouterCalibration
from moeq.disk.atomic import write_json, write_tensors
from moeq.formats.mlx_config import completed
from moeq.formats.mlx_known import find_family

NUM_WINDOWS = 8  # per domain
OWN, MLX_LM, DWQ, MLX_GPTQ = "moeq", "mlx-lm", "mlx-lm, DWQ", "mlx-lm, GPTQ"
WIDTHS = {"2 bits": 2, "3 bits": 3, "4 bits": 4}
RECIPES = ("mixed_2_6", "mixed_3_4", "mixed_3_6", "mixed_4_6")
GROUP_SIZE = 64
# 32 steps; with them the scales go as far, for their size, as in the 512 of 1e-6 that are mlx-lm's defaults.
DWQ_PASSES, DWQ_RATE = 2, 5e-5
# Bits of a weight in the folders of mlx-lm; mixed_3_4 and mixed_4_6, of 3.66 and 4.82, meet those of 3.5 and 4.5.
BUDGETS = (2.5, 3.13, 3.5, 3.97, 4.5)
CHOICES: tuple[int | str, ...] = ("2g128", "2g64", "3g128", "3g64", "4g128", "4g64", "5g64", "6g64", "8g64")
KEPT = ("embed_tokens", "lm_head", "gate", "shared_expert_gate")  # last parts of the names of what stays BF16


@dataclass(frozen=True)
class Case:
    """One folder; a seed is one calibration set, which rounding to nearest does not use."""

    seed: int
    quantizer: str
    kind: str


class Mlx(Study[Case]):
    """Every folder of both quantizers."""

    title = "MLX folders of equal size, in mlx-lm"
    legend = (
        "KL to the unquantized model in nats per token, mean over four domains of 8 windows of 256 tokens, +- over "
        "seeds (calibration sets); bits of a quantized weight with scales and offsets; bytes of all tensors of the "
        "folder, BF16 embedding, head and routers included. Of {model}. mlx-lm rounds to nearest in groups of 64, by "
        "itself and by its recipes (quant_predicate), which are kept from embedding, head and routers: it would round "
        "those, too. "
        "moeq's folders have the widths and groups that the allocator chose among 2 to 6 and 8 bits in groups of 64 "
        "and 2 to 4 in groups of 128 (one survey, on the first set), full-range symmetric, by AGQ with refitted "
        "routers, every value exact. "
        "Rows of mlx-lm's DWQ, where they stand, learned scales and offsets in 32 steps of 1,024 tokens "
        "at a rate of 5e-5, by dequantized products, since those with packed weights take a minute on this CPU; rows "
        "of its GPTQ, which knows 2, 4 and 8 bits, have one Hessian for all experts of a projection. Its AWQ knows no "
        "model with experts."
    )
    quick: ClassVar = {"seeds": [0], "budgets": [3.5], "kinds": ["3 bits"], "dwq": [], "gptq": []}

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--model", default=MODEL, help="folder of a model with the same tokenizer")
        parser.add_argument("--label", default="reference", choices=MODELS, help="name of the model in reports")
        parser.add_argument("--budgets", type=float, nargs="*", default=list(BUDGETS), help="bits of moeq's folders")
        parser.add_argument("--kinds", nargs="*", default=[*WIDTHS, *RECIPES], help="of mlx-lm's folders")
        parser.add_argument("--dwq", nargs="*", default=[*WIDTHS], help="folders that mlx-lm learns, too")
        parser.add_argument("--gptq", nargs="*", default=["2 bits", "4 bits"], help="folders by mlx-lm's GPTQ")

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(options)
        options.folder = options.folder / options.label
        self.legend = self.legend.format(model=MODELS[options.label])  # type: ignore[misc]

    def cases(self) -> list[Case]:
        """mlx-lm's once where they use no data; then size by size."""
        o = self.options
        theirs = [Case(o.seeds[0], MLX_LM, kind) for kind in o.kinds]
        for seed in o.seeds:
            theirs += [Case(seed, name, kind) for name, kinds in ((DWQ, o.dwq), (MLX_GPTQ, o.gptq)) for kind in kinds]
        return theirs + [Case(seed, OWN, f"{budget:g}") for budget in o.budgets for seed in o.seeds]

    @cached_property
    def yardstick(self) -> Yardstick:
        return Yardstick(self.options.model, Texts(num_windows=NUM_WINDOWS))

    @cached_property
    def dense(self) -> Path:
        """Folder of the unquantized model as mlx-lm reads it."""
        folder = self.options.folder / "dense"
        write_dense(self.yardstick.model, Path(self.options.model), folder)
        return Path(folder)

    @cached_property
    def judge(self) -> Judge:
        """mlx-lm's logits of the unquantized model."""
        windows = {domain: self.yardstick.windows(domain) for domain in self.yardstick.streams}
        return Judge.by(logits_of(self.dense), windows)

    def measure(self, case: Case) -> Row:
        judge = self.judge
        with TemporaryDirectory() as temporary:
            folder = self._make(case, Path(temporary))
            domains, num_bytes = judge.measure(logits_of(folder)), tensor_bytes(folder)
        return {"bytes": num_bytes, "bits": file_bits(num_bytes, tensor_bytes(self.dense), self.num_weights),
                "domains": domains}  # fmt: skip

    @property
    def num_weights(self) -> int:
        """How many are quantized in every folder."""
        tensors = load_file(Path(self.options.model) / "model.safetensors")
        return sum(
            t.numel() for name, t in tensors.items() if t.dim() == 2 and is_quantized(name.removesuffix(".weight"))
        )

    def _make(self, case: Case, folder: Path) -> Path:
        if case.quantizer == MLX_LM:
            write_mlx_lm(self.dense, folder, case.kind)
            return folder
        ids_NL = calibration_set(self.yardstick, "corpus", 64, case.seed, self.options.folder)
        if case.quantizer in (DWQ, MLX_GPTQ):
            write_learned(self.dense, folder, case, ids_NL)
            return folder
        survey = self.options.folder / "survey.json"
        first_NL = calibration_set(self.yardstick, "corpus", 64, 0, survey.parent)
        make_survey(survey, self.yardstick.model, first_NL, CHOICES, GROUP_SIZE)
        settings: dict[str, Any] = {"affinity_power": 1.0, "damping": DAMPING, "bits": 4, "grid": "full_range"}
        settings |= {"group_size": GROUP_SIZE, "model": self.options.model}
        return fit_file(ids_NL, steps_of(case.kind, survey), "mlx", folder, **settings)

    def report(self, rows: Sequence[Row]) -> str:
        return report(rows, (OWN,), MLX_LM)

    def draw(self, rows: Sequence[Row], path: Path) -> None:
        draw(rows, path)


def steps_of(budget: str, survey: Path) -> list[Callback]:
    """Steps of moeq for a number of bits of a weight in the folder."""
    plan = allocated(float(budget), survey, CHOICES, "mlx")
    return [plan, RouterCalibration(), HessianCalibration(), GPTQ()]


def is_quantized(path: str) -> bool:
    """Whether a linear or an embedding, by its path in the model, is quantized in every folder."""
    return path.rpartition(".")[2] not in KEPT


def write_dense(model: Any, source: Path, folder: Path) -> None:
    """The unquantized model for mlx-lm, with a head of its own where the class of its family there has one."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors, family = load_file(source / "model.safetensors"), find_family(model)
    if not family.has_tied_head:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    write_tensors(folder / "model.safetensors", tensors)
    config = json.loads((source / "config.json").read_text(encoding="utf8"))
    write_json(folder / "config.json", completed(config, model.config, family, has_head=not family.has_tied_head))


def write_mlx_lm(source: Path, folder: Path, kind: str) -> None:
    """A folder as ``mlx_lm.convert`` quantizes it, with one width of ``WIDTHS`` or one of its recipes."""
    from mlx_lm.convert import mixed_quant_predicate_builder
    from mlx_lm.utils import load_model, quantize_model, save_config, save_model

    model, config = load_model(source)
    recipe = mixed_quant_predicate_builder(kind, model, GROUP_SIZE) if kind in RECIPES else lambda path, module: True
    model, config = quantize_model(
        model, config, GROUP_SIZE, WIDTHS.get(kind, 4),
        quant_predicate=lambda path, module: is_quantized(path) and recipe(path, module),
    )  # fmt: skip
    save_model(folder, model)
    save_config(config, folder / "config.json")


def write_learned(source: Path, folder: Path, case: Case, ids_NL: Tensor) -> None:
    """A folder of one width by what mlx-lm learns it with."""
    from benchmarks.lab.mlx_learned import write_dwq, write_gptq

    if case.quantizer == DWQ:
        write_dwq(source, folder, WIDTHS[case.kind], GROUP_SIZE, ids_NL, DWQ_PASSES, DWQ_RATE, is_quantized)
    else:
        write_gptq(source, folder, WIDTHS[case.kind], GROUP_SIZE, ids_NL, is_quantized)


def logits_of(folder: Path) -> Callable[[Tensor], Tensor]:
    """mlx-lm's logits of a window, [L] to [L, V], on the CPU; scales and what is not quantized in float32."""
    import mlx.core as mx
    from mlx_lm.utils import load_model

    mx.set_default_device(mx.cpu)
    model, _ = load_model(folder)
    model.set_dtype(mx.float32)
    return lambda ids_L: torch.from_numpy(np.array(model(mx.array(ids_L[None].numpy()))[0]))


if __name__ == "__main__":
    Mlx.main()
