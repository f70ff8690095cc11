r"""moeq's folders for vLLM and SGLang beside llm-compressor's, at equal size, read by compressed-tensors.

    OMP_NUM_THREADS=1 python -m benchmarks.studies.compressed_tensors --llmcompressor ENV/bin/python \
        --json benchmarks/results/compressed_tensors.json
    ... --model runs/mixtral_moe/model --label Mixtral --json benchmarks/results/compressed_tensors_mixtral.json

One model; both quantizers get the same token ids, which the model wrote itself (EBSS, corpus mode, 64 sequences
of 256 tokens, another set for each seed), and quantize the same weights.  Every folder is read by compressed-tensors
with the scheme that it finds in its configuration, and its values are compared with the original in transformers: vLLM
has no kernel for these weights on most CPUs.  llm-compressor runs in an environment of its own
(benchmarks/peers/README.md); without one its rows are left out.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import ClassVar

from torch import Tensor, nn

from benchmarks.lab.allocated import make_survey
from benchmarks.lab.files import MODELS, fit_file, tensor_bytes
from benchmarks.lab.judge import file_bits
from benchmarks.lab.sets import calibration_set
from benchmarks.lab.study import MODEL, Study
from benchmarks.lab.tables import Row
from benchmarks.lab.yardstick import Texts, Yardstick
from benchmarks.peers.dense import QUANTIZED, load_folder, spelled
from benchmarks.studies.compressed_tensors_arms import (
    BEST,
    BUDGETS,
    CHOICES,
    GROUPS,
    LEARNED,
    OWN,
    OWN_BEST,
    OWN_LEARNED,
    RIVAL,
    SURVEY,
    THEIRS,
    is_uniform,
    run_llmcompressor,
    steps_of,
)
from benchmarks.studies.files_report import draw, report
from moeq.checkpoint.loading import load_model
from moeq.disk.atomic import write_json, write_tensors

NUM_WINDOWS = 8  # per domain


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
        "embedding and routers included. Of {model}. W4 gN is 4 bits, symmetric, in groups of N for every weight "
        "(W4A16). llm-compressor's GPTQ with its defaults (every token to every expert, ranges from minimum and "
        "maximum), with ranges by mean squared error, and rounding to nearest. moeq's folders with a number of bits "
        "have the schemes that the allocator chose for vLLM among 4 bits per channel and in groups of 128, 64 and 32 "
        "and 8 bits per channel and in groups of 128 and 64 (one survey, on the first set); all on full-range "
        "symmetric grids by AGQ with refitted routers. Two Hessians are those of inputs and of what the loss makes of "
        "outputs, over 262,144 tokens that the original wrote (KroneckerFactors, another set for each seed), and the "
        "rounding is learned behind them, too."
    )
    quick: ClassVar = {"seeds": [0], "groups": [64], "budgets": [], "learned": [], "best": []}

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--model", default=MODEL, help="folder of a model with the same tokenizer")
        parser.add_argument("--label", default="reference", choices=MODELS, help="name of the model in reports")
        parser.add_argument("--groups", type=int, nargs="*", default=list(GROUPS), help="of W4A16 folders")
        parser.add_argument("--budgets", type=float, nargs="*", default=list(BUDGETS), help="bits of allocated folders")
        parser.add_argument("--learned", nargs="*", default=list(LEARNED), help="kinds with learned rounding, too")
        parser.add_argument("--best", type=float, nargs="*", default=list(BEST), help="bits of those by two Hessians")
        parser.add_argument("--llmcompressor", type=Path, metavar="PYTHON", help="interpreter that has llm-compressor")

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(options)
        options.folder = options.folder / options.label
        self.legend = self.legend.format(model=MODELS[options.label])  # type: ignore[misc]

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
            cases += [Case(seed, OWN_BEST, f"{budget:g}") for budget in o.best]
        return cases

    @cached_property
    def yardstick(self) -> Yardstick:
        return Yardstick(self.options.model, Texts(num_windows=NUM_WINDOWS))

    @cached_property
    def num_weights(self) -> int:
        """How many are quantized in every folder."""
        tensors = load_folder(Path(self.options.model))
        return sum(tensor.numel() for name, tensor in tensors.items() if QUANTIZED.fullmatch(name))

    def ids(self, seed: int) -> Tensor:
        """Calibration ids of a seed."""
        return calibration_set(self.yardstick, "corpus", 64, seed, self.options.folder)

    def measure(self, case: Case) -> Row:
        source = Path(self.options.model)
        with TemporaryDirectory() as temporary:
            folder = self._make(case, Path(temporary))
            num_bytes = tensor_bytes(folder)
            values = write_values(folder, source, Path(temporary) / "values")
            domains = self.yardstick.row(load_model(str(values), "auto"))
        return {"bytes": num_bytes, "bits": file_bits(num_bytes, tensor_bytes(source), self.num_weights),
                "domains": domains}  # fmt: skip

    def _make(self, case: Case, folder: Path) -> Path:
        o, ids_NL, (seed, quantizer, kind) = self.options, self.ids(case.seed), (case.seed, case.quantizer, case.kind)
        if quantizer in THEIRS:
            return run_llmcompressor(o.llmcompressor, o.model, quantizer, kind, seed, ids_NL, folder)
        if not is_uniform(kind):
            make_survey(o.folder / SURVEY, self.yardstick.model, self.ids(0), CHOICES)
        steps, settings = steps_of(quantizer, kind, seed, o.folder)
        return fit_file(ids_NL, steps, "compressed-tensors", folder, o.model, **settings)

    def report(self, rows: Sequence[Row]) -> str:
        return report(rows, (OWN, OWN_LEARNED, OWN_BEST), RIVAL)

    def draw(self, rows: Sequence[Row], path: Path) -> None:
        draw(rows, path)


def write_values(packed: Path, source: Path, folder: Path) -> Path:
    """A folder with the values of another, as compressed-tensors reads them by its configuration.

    Args:
        packed: Folder of compressed-tensors, its weights under the keys of the original or what peers call them.
        source: The original, of one file.
        folder: To create.

    Raises:
        ValueError: A weight of the original is not there under any of its names.
    """
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.utils.match import is_match

    config = json.loads((packed / "config.json").read_text(encoding="utf8"))
    said = QuantizationConfig.model_validate(config["quantization_config"])
    stored, linear, values = load_folder(packed), nn.Linear(1, 1, device="meta"), dict[str, Tensor]()
    for key, original in load_folder(source).items():
        if key in stored:
            values[key] = stored[key]
            continue
        path = spelled(stored, key.removesuffix(".weight"), "weight_packed")
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
