"""Tiny models as GGUF files, dense or of a packed export, beside what transformers computes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from moeq.checkpoint.loading import load_model
from moeq.checkpoint.names import dense_weight, weight_names
from moeq.disk.folder import write_manifest
from moeq.export.contents import read_contents
from moeq.export.finished import silent
from moeq.export.moeq_format import write_checkpoint
from moeq.formats.gguf import FORMAT, NAME
from moeq.formats.source import PackedExport
from moeq.models.experts import expert_modules
from moeq.quant.spec import QuantizedWeight
from tests.export.rounding import ROUTERS, real_weight, round_float, round_weight
from tests.tiny import save_tiny, tiny_tokenizer

Grid = tuple[int, int | None, bool] | Literal["mxfp4", "nvfp4"]  # bits, group size, symmetric
IDS = torch.randint(1, 257, (40,), generator=torch.Generator().manual_seed(3))


def write_dense(family: str, folder: Path, **overrides: Any) -> tuple[Path, Path]:
    """A tiny model in float32 and its file in F32: (folder of the source, file)."""
    source = save_tiny(family, folder / "source", dtype=torch.float32, **overrides)
    write_manifest(source, {})
    export = PackedExport(source, read_contents(source))
    (folder / "gguf").mkdir()
    FORMAT.check(export.model, export.grids, "exact")
    FORMAT.write(export, folder / "gguf", "exact", silent)
    return source, folder / "gguf" / NAME


class GeluByTable(nn.Module):
    """What llama.cpp computes on a CPU: of arguments in float16, in float16."""

    def forward(self, x: Tensor) -> Tensor:
        found = functional.gelu(x.half().float(), approximate="tanh").half().float()
        return torch.where(x.abs() < 10, found, x.relu())


def transformers_logits(source: Path, ids: Tensor = IDS, *, by_table: bool = False) -> Tensor:
    model = load_model(str(source), "float32")
    for module in model.modules() if by_table else ():
        if hasattr(module, "act_fn"):
            module.act_fn = GeluByTable()
    with torch.no_grad():
        return model(ids[None]).logits[0].float()


def divergence(of: Tensor, found: Tensor) -> float:
    """Mean KL divergence of the predictions that logits give."""
    one, other = (logits.double().log_softmax(-1) for logits in (of, found))
    return float((one.exp() * (one - other)).sum(-1).mean())


def write_packed(
    family: str,
    folder: Path,
    grid_of: Callable[[str], Grid | None],
    *,
    change: Callable[[str, QuantizedWeight], None] = lambda name, weight: None,
    **overrides: Any,
) -> tuple[Path, dict[str, QuantizedWeight]]:
    """A packed export of a tiny model in bfloat16, its weights rounded to grids by canonical name, and the codes."""
    source = save_tiny(family, folder / "source", **overrides)
    model = load_model(str(source), "bfloat16")
    experts, quantized = expert_modules(model), {}
    with torch.no_grad():
        for name in weight_names(model):
            if name.rpartition(".")[2] in ROUTERS or (grid := grid_of(name)) is None:
                continue
            weight_OI = dense_weight(model, name, experts)
            quantized[name] = round_float(weight_OI, grid) if isinstance(grid, str) else round_weight(weight_OI, *grid)
            change(name, quantized[name])
            weight_OI.copy_(real_weight(quantized[name]))
    write_checkpoint(model, tiny_tokenizer(), quantized, folder / "export", metadata={})
    return folder / "export", quantized
