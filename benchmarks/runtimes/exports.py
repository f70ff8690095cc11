"""Packed exports that are rounded to nearest, and what transformers computes in float32 on exactly their values."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.lab.study import MODEL
from benchmarks.runtimes.cells import OPTIONS, REFERENCE, REFERENCE_GRIDS, TINY_GRIDS, Cell, grids_of
from moeq.checkpoint.loading import DType, load_model, load_tokenizer
from moeq.checkpoint.names import dense_weight
from moeq.disk.texts import read_documents, token_stream
from moeq.export.moeq_format import write_checkpoint
from moeq.formats.gguf_plan import plan_file
from moeq.formats.mlx_known import find_family
from moeq.formats.source import PackedExport, open_packed
from moeq.models.experts import expert_modules
from moeq.quant.carrier import choose_carrier
from moeq.quant.grid import dequantize_weight
from moeq.quant.rtn import round_to_nearest
from moeq.quant.spec import GridSpec
from moeq.tasks.windows import consecutive_windows
from tests.tiny import save_tiny

_TEXT = Path(MODEL) / "texts" / "wikitext2_test.txt"
_OFFSETS = {"gguf": torch.float16, "mlx": torch.bfloat16}  # dtypes of offsets; MLX's are the model's
_TINY_SHAPE, _FIRST_ID, _NUM_IDS = (4, 64), 1, 256  # windows and tokens; ids that are no special token


@dataclass(frozen=True)
class Source:
    """A model to export.

    Attributes:
        name: "reference", or a family.
        folder: Of its files, in bfloat16.
        ids_NL: Token ids on which it is judged.
    """

    name: str
    folder: Path
    ids_NL: Tensor

    def grids(self, model: PreTrainedModel, key: str) -> dict[str, GridSpec]:
        """Grids of its weights; see ``grids_of``."""
        return grids_of(model, key, REFERENCE_GRIDS if self.name == REFERENCE else TINY_GRIDS)


def reference_source(num_windows: int, length: int = 256) -> Source:
    """The bundled model, judged on the first windows of its prose."""
    ids_T = token_stream(read_documents(_TEXT), load_tokenizer(MODEL))
    return Source(REFERENCE, Path(MODEL), consecutive_windows(ids_T, length)[:num_windows])


def tiny_source(family: str, folder: Path, seed: int) -> Source:
    """A tiny random model of a family, judged on random ids."""
    save_tiny(family, folder, seed=seed, **OPTIONS.get(family, {}))
    generator = torch.Generator().manual_seed(seed)
    return Source(family, folder, torch.randint(_FIRST_ID, _FIRST_ID + _NUM_IDS, _TINY_SHAPE, generator=generator))


def write_packed(source: Source, key: str, folder: Path) -> PackedExport:
    """Round a model to nearest and write its packed export."""
    model = load_model(str(source.folder), "bfloat16")
    experts, quantized = expert_modules(model), {}
    with torch.no_grad():
        for name, grid in source.grids(model, key).items():
            weight_OI = dense_weight(model, name, experts)
            quantized[name] = round_to_nearest(weight_OI[None], grid, torch.bfloat16).expert(0, grid)
            weight_OI.copy_(dequantize_weight(quantized[name], torch.bfloat16))
    write_checkpoint(model, load_tokenizer(str(source.folder)), quantized, folder, metadata={})
    return open_packed(folder)


def open_reference(
    source: Source, export: PackedExport, cell: Cell, rounded: Collection[str], dtype: DType = "float32"
) -> PreTrainedModel:
    """The model with the values of an export.

    Args:
        source: What was exported.
        export: Packed.
        cell: The file that is made of it.
        rounded: Names of weights that a runtime has dequantized in the dtype of the model; of others it multiplies
            codes and scales in float32 as it goes.
        dtype: In which it computes.
    """
    model = load_model(str(source.folder), dtype)
    model.set_experts_implementation("eager")
    experts = expert_modules(model)
    with torch.no_grad():
        for name in export.grids:
            weight_OI = values_in_file(export, name, cell)
            weight_OI = weight_OI.to(torch.bfloat16) if name in rounded else weight_OI
            dense_weight(model, name, experts).copy_(weight_OI)
    return model


def values_in_file(export: PackedExport, name: str, cell: Cell) -> Tensor:
    """A quantized weight [O, I] in float32 as a file means it: offsets that are stored as numbers are rounded."""
    weight = export.quantized(name)
    if weight.zero_point_OG is None:
        return dequantize_weight(weight, torch.float32)
    grid, columns = GridSpec(weight.bits, weight.group_size), weight.codes_OI.shape[1]
    carrier = choose_carrier(cell.format, grid, columns, cell.carrier)
    if carrier.zero_point != "real" or carrier.bits != weight.bits:
        return dequantize_weight(weight, torch.float32)
    scale_OG = weight.scale_OG.float()
    offset_OG = (-weight.zero_point_OG.float() * scale_OG).to(_OFFSETS[cell.format]).float()
    codes_OGg = weight.codes_OI.float().unflatten(1, (scale_OG.shape[1], -1))
    return (codes_OGg * scale_OG[..., None] + offset_OG[..., None]).flatten(1)


def dequantized_in_file(export: PackedExport, cell: Cell) -> frozenset[str]:
    """Names of quantized weights that the file of a cell holds by their values in the dtype of the model."""
    if cell.format == "gguf":
        plan = plan_file(export.model, export.grids, cell.carrier)
        return frozenset(name for each in plan if not each.has_blocks for name in each.weights if name in export.grids)
    if cell.format == "mlx":
        taken_apart = find_family(export.model).taken_apart
        return frozenset(name for name in export.grids if name.rpartition(".")[2] in taken_apart)
    return frozenset()


def log_probabilities(model: PreTrainedModel, ids_NL: Tensor) -> Tensor:
    """Of the next token at each position, float32 [N, L, V]; one window at a time, as runtimes compute them."""
    with torch.no_grad():
        return torch.cat([model(ids_L[None]).logits.float().log_softmax(-1) for ids_L in ids_NL])
