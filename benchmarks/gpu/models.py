"""Whole models on the device against the CPU: a fit, its packed model, an evaluation, sequences that it writes.

The model is the bundled one, and of ``--quick`` a drawn one of a few thousand weights.
"""

import csv
import json
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.gpu.clock import peak_bytes, seconds, settle, start_peak
from benchmarks.gpu.steps import Setting
from benchmarks.lab.study import MODEL
from benchmarks.lab.tables import Row
from benchmarks.large.checkpoint import Shape, write_checkpoint
from main import main as moeq
from moeq.checkpoint.loading import load_model
from moeq.checkpoint.packed_self import packed_self
from moeq.checkpoint.prepare import model_bytes, prepare
from moeq.disk.atomic import write_tensors, write_text
from moeq.models.adapter import Adapter
from moeq.sampling.ebss import search
from moeq.sampling.ebss_spec import EBSSSpec
from moeq.sampling.next_token import ModelNextToken
from moeq.scoring.routing import count_same_routing, record_routing

TINY = Shape(64, 4, 2, 16, 8, 2, 32, 4096)
TEXTS = Path("assets/reference-moe/texts")
LINES = 40  # of each text, quick


def model_of(setting: Setting) -> str:
    """Folder of the model."""
    return str(drawn_model(setting, TINY)) if setting.quick else MODEL


def drawn_model(setting: Setting, shape: Shape) -> Path:
    """Two blocks with random weights, made at the first call."""
    folder = setting.folder / f"drawn_{shape.hidden_size}"
    write_checkpoint(folder, shape, 2, 0, MODEL)
    return folder


def fits(setting: Setting) -> Iterator[Row]:
    """The same fit on both: how many values are equal, and whether errors are."""
    model, ids = model_of(setting), setting.folder / "ids.safetensors"
    generator = torch.Generator().manual_seed(0)
    sizes = (4, 32) if setting.quick else (64, 256)
    write_tensors(ids, {"input_ids": torch.randint(1, 2000, sizes, generator=generator)})
    found: dict[str, dict[str, Any]] = {}
    for kind in dict.fromkeys(("cpu", setting.device.type)):
        start_peak(setting.device)
        start = time.perf_counter()
        folder = setting.folder / f"fit_{kind}"
        run_fit(model, ids, folder, kind)
        found[kind] = read_fit(folder)
        row = {"what": f"fit on {kind}", "seconds": time.perf_counter() - start}
        if kind != "cpu":
            memory = found[kind]["memory"]
            row |= {"device_gib": memory["device_measured"] / 2**30, "bound_gib": memory["device_expected"] / 2**30}
        yield row
    one, other = found["cpu"], found[setting.device.type]
    equal = sum(int((a == other["weights"][name]).sum()) for name, a in one["weights"].items())
    share = equal / sum(tensor.numel() for tensor in one["weights"].values())
    ratio = other["error"] / one["error"]
    # A tie turned early changes inputs of all that follows: values differ, how good they are does not.
    yield {"what": "codes", "equal": share, "error_ratio": ratio, "right": abs(ratio - 1) < 0.02}


def run_fit(model: str, ids: Path, folder: Path, kind: str, *options: str) -> None:
    """GPTQ at 4 bits in groups that every row has, packed export included."""
    width = json.loads((Path(model) / "config.json").read_text(encoding="utf8"))["moe_intermediate_size"]
    moeq([
        "fit", "--config", "benchmarks/large/fit_w4.yaml", "--model.name", model, "--data.path", str(ids),
        "--model.group_size", str(min(64, width)), "--model.placement", "memory",
        "--trainer.default_root_dir", str(folder), "--trainer.accelerator", "cpu" if kind == "cpu" else "gpu",
        "--trainer.devices", "1", *options,
    ])  # fmt: skip


def read_fit(folder: Path) -> dict[str, Any]:
    """Packed tensors of an export, the mean error of its weights, and the most memory of the device."""
    weights: dict[str, Tensor] = {}
    for path in sorted((folder / "export").glob("*.safetensors")):
        weights |= {name: value for name, value in load_file(path).items() if name.endswith("weight_packed")}
    table = read_table(folder / "memory.csv")
    memory = {name: max(float(row[name] or 0) for row in table) for name in ("device_measured", "device_expected")}
    errors = [float(row["relative_error"]) for row in read_table(folder / "errors.csv")]
    return {"weights": weights, "memory": memory, "error": sum(errors) / len(errors)}


def read_table(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV file."""
    with path.open(encoding="utf8", newline="") as file:
        return list(csv.DictReader(file))


@torch.no_grad()
def packed_models(setting: Setting) -> Iterator[Row]:
    """Logits and routing of a packed model by its kernels against the reference modules, on the device."""
    ids = torch.randint(1, 2000, (2, 16 if setting.quick else 256), generator=torch.Generator().manual_seed(1))
    for bits in (4,) if setting.quick else (2, 3, 4, 8):
        model = packed_self(Adapter(load_model(model_of(setting))), bits).to(setting.device)
        before, given = model_bytes(model), ids.to(setting.device)
        expected, routing = _logits(model, given)
        slow = seconds(lambda model=model, given=given: model(given), setting.device, 2)
        result = prepare(model)
        found, here = _logits(model, given)
        same, total = count_same_routing(here, routing)
        fast = seconds(lambda model=model, given=given: model(given), setting.device, 2)
        error = float((found - expected).norm() / expected.norm())
        share = float(same) / float(total)
        yield {
            "what": f"packed model, {bits} bits", "error": error, "routing_equal": share,
            "bytes_of_file": result.num_bytes[0] / before, "fallbacks": len(result.fallbacks), "reference_s": slow,
            "seconds": fast, "right": error < 0.03 and share > 0.98,
        }  # fmt: skip


def _logits(model: Any, ids: Tensor) -> tuple[Tensor, Any]:
    with record_routing(model) as routing:
        return model(ids, use_cache=False).logits.float(), routing


def validations(setting: Setting) -> Iterator[Row]:
    """Perplexities of the original by ``main.py validate``, on both."""
    found, texts = {}, texts_of(setting)
    windows = ("32", "2") if setting.quick else ("256", "16")
    for kind in dict.fromkeys(("cpu", setting.device.type)):
        folder, start = setting.folder / f"validate_{kind}", time.perf_counter()
        moeq([
            "validate", "--config", "configs/eval.yaml", "--model.name", model_of(setting), "--model.reference", "null",
            "--trainer.accelerator", "cpu" if kind == "cpu" else "gpu", "--trainer.devices", "1",
            "--trainer.default_root_dir", str(folder), "--data.tasks", "[]", "--data.data_dir", str(texts),
            "--data.window_length", windows[0], "--data.num_windows", windows[1],
        ])  # fmt: skip
        found[kind] = perplexities(folder / "results.json")
        yield {"what": f"validate on {kind}", "seconds": time.perf_counter() - start}
    pairs = [(value, found["cpu"][name]) for name, value in found[setting.device.type].items()]
    error = max(abs(one / other - 1) for one, other in pairs)
    yield {"what": "perplexities", "tasks": len(pairs), "error": error, "right": bool(pairs) and error < 0.01}


def texts_of(setting: Setting) -> Path:
    """Where the texts of the evaluation are; for a quick look their first lines."""
    if not setting.quick:
        return TEXTS
    for path in (*TEXTS.glob("*.txt"), *TEXTS.glob("*.jsonl")):
        with path.open(encoding="utf8") as file:
            write_text(setting.folder / "texts" / path.name, "".join(islice(file, LINES)))
    return setting.folder / "texts"


def perplexities(path: Path) -> dict[str, float]:
    """Every perplexity of a result, by its place in the file."""
    found = {}

    def visit(value: Any, place: str) -> None:
        if isinstance(value, dict | list):
            items = value.items() if isinstance(value, dict) else enumerate(value)
            for key, inner in items:
                visit(inner, f"{place}.{key}")
        elif isinstance(value, float) and "perplexity" in place and "stderr" not in place:
            found[place] = value

    visit(json.loads(path.read_text(encoding="utf8")), "")
    return found


def sequences(setting: Setting) -> Iterator[Row]:
    """What EBSS writes on both with the same draws, and how fast."""
    number, length = (2, 8) if setting.quick else (64, 256)
    written = {}
    for kind in dict.fromkeys(("cpu", setting.device.type)):
        few = min(number, 4) if kind == "cpu" and setting.device.type != "cpu" else number
        model = load_model(model_of(setting)).to(kind)
        write_sequences(model, few, 4)  # libraries, kernels
        settle(setting.device)
        start = time.perf_counter()
        written[kind] = write_sequences(model, few, length)
        settle(setting.device)
        yield {
            "what": f"EBSS on {kind}", "sequences": few, "length": length,
            "tokens_per_second": few * length / (time.perf_counter() - start),
            "device_gib": peak_bytes(setting.device) / 2**30,
        }  # fmt: skip
    one, other = (ids_NT[: len(written["cpu"])].cpu() for ids_NT in (written["cpu"], written[setting.device.type]))
    same = (one == other).int().cumprod(1)
    valid = bool((other >= 0).all())
    yield {"what": "tokens until the first that differs", "mean": float(same.sum(1).float().mean()), "right": valid}


def write_sequences(model: Any, number: int, length: int) -> Tensor:
    """Stochastic EBSS from the same first tokens and draws."""
    first_N = 1 + torch.randperm(2000, generator=torch.Generator().manual_seed(0))[:number]
    spec = EBSSSpec(length=length, branches=4, mode="stochastic", prefix_length=2)
    with ModelNextToken(model) as next_token:
        sampled = search(next_token, spec, first_N.to(model.device), torch.Generator().manual_seed(0))
    return sampled.ids_NT
