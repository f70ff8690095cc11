"""moeq's GGUF files beside llama.cpp's own and AutoRound's, at equal size, judged by llama.cpp itself.

    OMP_NUM_THREADS=1 python -m benchmarks.studies.gguf --json benchmarks/results/gguf.json
    ... --model runs/mixtral_moe/model --label Mixtral --json benchmarks/results/gguf_mixtral.json

One model; every quantizer gets the same token ids, which the model wrote itself (EBSS, corpus mode, 64
sequences of 256 tokens, another set for each seed).  Embedding and head are BF16, routers and norms F32 in every file.
llama.cpp computes the logits of each file, and those of the unquantized model (F32) that they are compared with.
AutoRound runs in an environment of its own (``--autoround``, see benchmarks/peers/README.md); without one its rows are
left out.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import ClassVar

import gguf
import torch
from torch import Tensor

from benchmarks.lab.allocated import make_survey
from benchmarks.lab.files import MODELS, fit_file
from benchmarks.lab.judge import Judge, file_bits
from benchmarks.lab.llama_quantize import MIXTURES, importances, is_quantized, quantize_file
from benchmarks.lab.sets import calibration_set
from benchmarks.lab.study import MODEL, Study
from benchmarks.lab.tables import Row
from benchmarks.lab.yardstick import Texts, Yardstick
from benchmarks.runtimes.llama_cpp import LlamaCpp
from benchmarks.studies.files_report import draw, report
from benchmarks.studies.gguf_arms import (
    BUDGETS,
    CHOICES,
    GRIDS,
    LEARNED,
    OWN,
    OWN_LEARNED,
    UNIFORM,
    run_autoround,
    steps_of,
)
from moeq.checkpoint.loading import load_model, load_tokenizer
from moeq.export.contents import read_contents
from moeq.export.finished import silent
from moeq.formats.gguf import FORMAT, NAME
from moeq.formats.gguf_plan import plan_file
from moeq.formats.source import PackedExport

NUM_WINDOWS = 8  # per domain
LLAMA, IMATRIX, AUTOROUND, DENSE = "llama.cpp", "llama.cpp, imatrix", "AutoRound", "unquantized"
NEED_IMATRIX = ("IQ2_XS", "IQ3_XXS")  # llama.cpp refuses the first without; the second is not meant to be
AUTOROUND_TYPES = ("q4_0", "q4_k_s", "q2_k_s")  # of its formats


@dataclass(frozen=True)
class Case:
    """One file; a seed is one calibration set."""

    seed: int
    quantizer: str
    kind: str


class Gguf(Study[Case]):
    """Every file of every quantizer."""

    title = "GGUF files of equal size, in llama.cpp"
    legend = (
        "KL to the unquantized model in nats per token, mean over four domains of 8 windows of 256 tokens, +- over "
        "seeds (calibration sets); bits of a quantized weight with scales; bytes of the file, BF16 embedding and head "
        "included. Of {model}. moeq's files with a number of bits have the types that the allocator chose among Q2_0, "
        "Q2_K, Q3_K, Q4_K, IQ4_NL, Q4_0, Q5_0 and Q8_0 (one survey, on the first set), full-range where a type has one "
        "level of scales; those with the name of a K-quant have it in every weight but the experts' down projections, "
        "which take Q4_0 or Q5_0, as in llama.cpp's files of a model whose rows there are too short (the bundled one). "
        "All by AGQ with refitted routers, where the rounding is learned without IQ4_NL. AutoRound with 0 steps is its "
        "search without tuning."
    )
    quick: ClassVar = {"seeds": [0], "budgets": [3.0], "types": ["Q4_0"], "grids": []}

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--model", default=MODEL, help="folder of a model with the same tokenizer")
        parser.add_argument("--label", default="reference", choices=MODELS, help="name of the model in reports")
        parser.add_argument("--budgets", type=float, nargs="*", default=list(BUDGETS), help="bits of allocated files")
        parser.add_argument("--types", nargs="*", default=[*MIXTURES, "Q2_0"], help="of llama.cpp and uniform ones")
        parser.add_argument("--grids", nargs="*", default=list(GRIDS), help="K-quants that moeq solves")
        parser.add_argument("--learned", nargs="*", default=list(LEARNED), help="kinds with learned rounding, too")
        parser.add_argument("--autoround", type=Path, metavar="PYTHON", help="interpreter that has auto-round")
        parser.add_argument("--steps", type=int, nargs="+", default=[0, 200], help="of AutoRound's tuning per block")

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(options)
        options.folder = options.folder / options.label
        self.legend = self.legend.format(model=MODELS[options.label])  # type: ignore[misc]

    def cases(self) -> list[Case]:
        """The unquantized file, then seed by seed; what uses no data comes once."""
        o = self.options
        theirs = [kind for kind in MIXTURES if kind in o.types]
        cases = [Case(o.seeds[0], DENSE, "BF16")]
        for seed in o.seeds:
            cases += [Case(seed, IMATRIX, kind) for kind in theirs]
            if seed == o.seeds[0]:
                cases += [Case(seed, LLAMA, kind) for kind in theirs if kind not in NEED_IMATRIX]
                tuned = [f"{kind}, {steps} steps" for steps in o.steps for kind in AUTOROUND_TYPES]
                cases += [Case(seed, AUTOROUND, kind) for kind in tuned if o.autoround]
            own = [*o.grids, *(f"{budget:g}" for budget in o.budgets), *(kind for kind in UNIFORM if kind in o.types)]
            cases += [Case(seed, OWN, kind) for kind in own]
            cases += [Case(seed, OWN_LEARNED, kind) for kind in o.learned]
        return cases

    @cached_property
    def yardstick(self) -> Yardstick:
        return Yardstick(self.options.model, Texts(num_windows=NUM_WINDOWS))

    @cached_property
    def dense(self) -> PackedExport:
        """The unquantized model; its file in BF16 is beside the rows."""
        source = Path(self.options.model)
        export = PackedExport(source, read_contents(source))
        folder = self.options.folder / "dense"
        if not folder.is_dir():
            folder.mkdir(parents=True)
            FORMAT.write(export, folder, "exact", silent)
        return export

    @property
    def dense_file(self) -> Path:
        """In BF16, as moeq writes it: what llama.cpp quantizes."""
        return Path(self.options.folder / "dense" / NAME)

    @cached_property
    def judge(self) -> Judge:
        """llama.cpp's logits of the unquantized model in F32."""
        with TemporaryDirectory() as temporary:
            source, folder = Path(temporary) / "source", Path(temporary)
            load_model(self.options.model, "float32").save_pretrained(source)
            load_tokenizer(self.options.model).save_pretrained(source)
            FORMAT.write(PackedExport(source, read_contents(source)), folder, "exact", silent)
            file = LlamaCpp(folder / NAME)
            made = Judge.by(file.logits, {domain: self.yardstick.windows(domain) for domain in self.yardstick.streams})
            file.close()
        return made

    @cached_property
    def num_weights(self) -> int:
        """How many are quantized in every file."""
        tensors = gguf.GGUFReader(self.dense_file).tensors
        return sum(int(t.n_elements) for t in tensors if is_quantized(t.name, tuple(t.shape.tolist())))

    def ids(self, seed: int) -> Tensor:
        """Calibration ids of a seed."""
        return calibration_set(self.yardstick, "corpus", 64, seed, self.options.folder)

    @cache  # noqa: B019  one study per process
    def importance(self, seed: int) -> dict[str, Tensor]:
        """Of the tensors of the file, on the ids that moeq gets."""
        plan = plan_file(self.dense.model, {}, "exact")
        found = importances(self.yardstick.model, self.ids(seed))
        return {each.name: torch.stack([found[name] for name in each.weights])
                for each in plan if each.weights and all(name in found for name in each.weights)}  # fmt: skip

    def measure(self, case: Case) -> Row:
        judge = self.judge
        with TemporaryDirectory() as temporary:
            path = self._make(case, Path(temporary))
            file = LlamaCpp(path)
            domains = judge.measure(file.logits)
            file.close()
            num_bytes = path.stat().st_size
        bits = file_bits(num_bytes, self.dense_file.stat().st_size, self.num_weights)
        return {"bytes": num_bytes, "bits": bits, "domains": domains}

    def _make(self, case: Case, folder: Path) -> Path:
        """The file of a case."""
        self.dense  # noqa: B018  writes the file
        if case.quantizer == DENSE:
            return self.dense_file
        if case.quantizer == AUTOROUND:
            o = self.options
            return run_autoround(o.autoround, o.model, case.kind, self.ids(case.seed), self.dense_file, folder)
        if case.quantizer in (LLAMA, IMATRIX):
            importance = self.importance(case.seed) if case.quantizer == IMATRIX else None
            quantize_file(self.dense_file, folder / NAME, case.kind, importance)
            return folder / NAME
        survey, ids_NL = self.options.folder / "survey.json", self.ids(case.seed)
        if case.kind not in (*UNIFORM, *GRIDS):
            make_survey(survey, self.yardstick.model, self.ids(0), CHOICES, group_size=32)
        steps, settings = steps_of(case.kind, survey, learned=case.quantizer == OWN_LEARNED)
        return fit_file(ids_NL, steps, "gguf", folder, self.options.model, **settings) / NAME

    def report(self, rows: Sequence[Row]) -> str:
        return report(rows, (OWN, OWN_LEARNED), IMATRIX)

    def draw(self, rows: Sequence[Row], path: Path) -> None:
        draw(rows, path)


if __name__ == "__main__":
    Gguf.main()
