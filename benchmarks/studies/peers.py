"""The quantizers of other projects on one model, on the same token ids, judged by the same yardstick.

    OMP_NUM_THREADS=1 python -m benchmarks.studies.peers --json benchmarks/results/peers.json
    ... --model runs/mixtral_moe/model --folder runs/peers/mixtral --json benchmarks/results/peers_mixtral.json

Each peer runs in its own environment (``runs/peers/env/NAME``, see benchmarks/peers/README.md) as a process of its own,
and writes a dense folder, which is loaded like any model and compared with the original on four domains.  ``moeq`` is
this project's GPTQ with affinity weights, on the same ids.  Damage that a mean hides is counted: experts with a weight
that is constant or not finite, input columns that became zero, routers and other unquantized weights that changed.
"""

import argparse
import json
import os
import re
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import ClassVar

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.lab.sets import LENGTH, calibration_set
from benchmarks.lab.study import MODEL, Study
from benchmarks.lab.tables import Row
from benchmarks.lab.trial import fit
from benchmarks.lab.yardstick import Yardstick
from benchmarks.peers.dense import QUANTIZED, load_folder
from benchmarks.studies.peers_report import LEGEND, table, versions
from moeq.checkpoint.loading import load_model

SCRIPTS = Path(__file__).resolve().parents[1] / "peers"
# Environment and script of a peer, and what it is asked beyond its defaults.
PEERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "llmcompressor": ("llmcompressor", ()),
    "llmcompressor_routed": ("llmcompressor", ("--routed-only",)),
    "llmcompressor_mse": ("llmcompressor", ("--observer", "memoryless_mse")),
    "gptqmodel": ("gptqmodel", ()),
    "gptqmodel_mse": ("gptqmodel", ("--mse", "2")),
    "gptqmodel_bypass": ("gptqmodel", ("--bypass",)),
    "autoround": ("autoround", ()),
}
OWN = "moeq"
WARNING = re.compile(r"warn|fallback|failed|skipp|zeroed|not found", re.IGNORECASE)
COLOUR = re.compile(r"\x1b\[[\d;]*m")
PLACE = re.compile(r"/\S*/|\d{4}-\d\d-\d\d[ T][\d:.]+[ |]*")


@dataclass(frozen=True, order=True)
class Case:
    """One quantization; group 0 is one scale per output row."""

    data: str
    bits: int
    group: int
    peer: str
    seed: int
    num_windows: int


class Peers(Study[Case]):
    """Every quantizer on every set of ids."""

    title = "Other quantizers"
    legend = LEGEND
    quick: ClassVar = {"peers": ["llmcompressor", OWN], "bits": [3], "seeds": [0], "windows": 8}

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--model", default=MODEL, help="folder of a model with the bundled tokenizer")
        parser.add_argument("--peers", nargs="+", choices=[*PEERS, OWN], default=[*PEERS, OWN])
        parser.add_argument("--sets", nargs="+", choices=["mixture", "corpus", "prose"], default=["mixture"])
        parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4])
        parser.add_argument("--groups", type=int, nargs="+", default=[64], help="inputs of a group; 0 is per channel")
        parser.add_argument("--windows", type=int, default=64, help=f"of {LENGTH} tokens")
        parser.add_argument("--environments", type=Path, default=Path("runs/peers/env"), help="one folder per peer")

    @cached_property
    def yardstick(self) -> Yardstick:
        return Yardstick(self.options.model)

    def cases(self) -> list[Case]:
        o = self.options
        grid = product(o.sets, o.groups, o.bits, o.seeds, o.peers)
        return [Case(data, bits, group, peer, seed, o.windows) for data, group, bits, seed, peer in grid]

    def measure(self, case: Case) -> Row:
        o = self.options
        ids_NL = calibration_set(self.yardstick, case.data, case.num_windows, case.seed, o.folder)
        with TemporaryDirectory() as temporary:
            ids, output = Path(temporary) / "ids.safetensors", Path(temporary) / "dense"
            if case.peer == OWN:
                report = run_own(case, o.model, ids_NL, output)
            else:
                save_file({"ids": ids_NL.contiguous()}, ids)
                report = run_peer(case, o.model, ids, output, o.environments)
            found = damage(load_folder(Path(o.model)), load_folder(output))
            domains = self.yardstick.row(load_model(str(output), "auto"))
        return {
            "model": o.model,
            "tokens": case.num_windows * LENGTH,
            "report": report,
            "damage": found,
            "domains": domains,
        }

    def report(self, rows: Sequence[Row]) -> str:
        models = dict.fromkeys(row.get("model", MODEL) for row in rows)
        return f"Of {', '.join(models)}. Versions: {versions(rows)}.\n\n{table(rows)}"


def run_peer(case: Case, model: str, ids: Path, output: Path, environments: Path) -> dict[str, object]:
    """The report of a peer's run, with what it printed that reads like a warning.

    Raises:
        RuntimeError: It failed; the end of what it printed is in the message.
    """
    environment, flags = PEERS[case.peer]
    python = environments.absolute() / environment / "bin" / "python"
    if not python.exists():
        raise FileNotFoundError(f"--environments has no {python}; make it as benchmarks/peers/README.md says")
    command = [
        str(python), str(SCRIPTS / f"quantize_{environment}.py"), "--model", str(Path(model).absolute()),
        "--ids", str(ids), "--bits", str(case.bits), "--group-size", str(case.group), "--seed", str(case.seed),
        "--output", str(output), *flags,
    ]  # fmt: skip
    # No progress bars in what is searched for warnings, no look-ups of what is on the disk, no logs in this folder.
    variables = os.environ | {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=variables, cwd=output.parent)
    printed = done.stdout + done.stderr
    if done.returncode:
        raise RuntimeError(f"{case} failed:\n{printed[-2000:]}")
    report: dict[str, object] = json.loads((output / "report.json").read_text())
    report["warnings"] = warnings_of(printed)
    return report


def run_own(case: Case, model: str, ids_NL: Tensor, output: Path) -> dict[str, object]:
    """The same of this project; its memory is not that of a process of its own."""
    start, cpu_start = time.perf_counter(), time.process_time()
    fitted = fit(ids_NL, name=model, bits=case.bits, group_size=case.group or None).model
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    fitted.save_pretrained(output)
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "versions": {"torch": torch.__version__}}


def warnings_of(printed: str) -> list[str]:
    """Lines that read like warnings, each once, without colours, times and the places of files."""
    lines = [PLACE.sub("", COLOUR.sub("", line)).strip() for line in printed.splitlines() if WARNING.search(line)]
    return list(dict.fromkeys(line[:300] for line in lines if len(line.split()) > 2))[:20]


def damage(original: Mapping[str, Tensor], dense: Mapping[str, Tensor]) -> dict[str, int]:
    """What a mean divergence hides.

    Args:
        original: Weights by name.
        dense: Those of the quantized model.

    Returns:
        Experts with a weight that is constant or not finite, input columns of quantized weights that were not zero and
        are, routers that changed, other unquantized weights that changed.
    """
    broken, columns, routers, others = set(), 0, 0, 0
    for name, before in original.items():
        after = dense[name]
        if QUANTIZED.fullmatch(name):
            columns += int(((before != 0).any(0) & (after == 0).all(0)).sum())
            if not bool(after.isfinite().all()) or bool((after == after.flatten()[0]).all()):
                broken.add(name.rpartition(".")[0].rpartition(".")[0])
        elif not torch.equal(before, after):
            is_router = name.endswith((".gate.weight", "shared_expert_gate.weight"))
            routers, others = routers + is_router, others + (not is_router)
    return {
        "broken_experts": len(broken),
        "zeroed_columns": columns,
        "changed_routers": routers,
        "changed_others": others,
    }


if __name__ == "__main__":
    Peers.main()
