"""GPTQ's layout, for GPTQModel: each weight as it was solved, down to single experts of other widths.

Under the names that modules have in transformers, for which GPTQModel looks (files of Mixtral call them otherwise, and
what it does not find stays as it was made): ``qweight`` (int32, codes packed along in-features, transposed), ``qzeros``
(zero points packed along out-features; less one in the layout "gptq", as they are in "gptq_v2"), ``scales`` (float16)
and ``g_idx`` (the group of each in-feature).  Zero points are integers of the codes' width, so that asymmetric grids
need no wider type; one such grid makes the whole folder "gptq_v2", whose readers use the zero points of every weight.

Source: GPTQModel 7.7 (nn_modules/qlinear, quantization/config.py).
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moeq.checkpoint.names import dense_weight, split_expert_name
from moeq.checkpoint.packed_weight import PackedFormat
from moeq.checkpoint.sources import raw_tensors
from moeq.disk.tensor_file import Declared
from moeq.export.finished import Progress
from moeq.formats.card import Card
from moeq.formats.carriers import check_experts_apart, choose_carriers, count_types
from moeq.formats.format import Format, FormatReport
from moeq.formats.gptq_reader import dequantize_words
from moeq.formats.hf_folder import (
    Piece,
    check_pieces,
    check_values,
    fill_folder,
    kept_pieces,
    renamed,
    report,
    unreadable_draft,
)
from moeq.formats.patterns import patterns
from moeq.formats.source import PackedExport
from moeq.models.experts import expert_modules
from moeq.quant.carrier import Carrier, CarrierMode, recentre
from moeq.quant.grid import dequantize_weight
from moeq.quant.packing import num_words, pack
from moeq.quant.spec import QuantizedWeight

# transformers reads the key before it reads weights, and stops with this text: it would look for linears alone, and
# make the experts anew.
_BARRIER = {
    "transformers_weights": "none. transformers reads no experts of this layout and would make random ones: open the "
    "folder with GPTQModel"
}
# Families whose quantized folders GPTQModel 7.7 opens and computes as something else (``benchmarks/runtimes``).
_MISREAD = ("lfm2_moe",)
# Wrappers that it opens rightly, of which it has this one's experts one by one.
WRAPPERS = ("qwen3_5_moe", "qwen3_vl_moe", "glm4v_moe")
_TAKEN_APART = ("qwen3_vl_moe",)
# In- and out-features of a weight are multiples: words of 32 bits then hold whole codes of every width.
_MULTIPLE = 32


def check(model: PreTrainedModel, grids: Mapping[str, PackedFormat], mode: CarrierMode) -> None:
    """Raise ValueError where GPTQModel would read a model on these grids wrongly or not at all."""
    if (family := model.config.model_type) in _MISREAD:
        raise ValueError(
            f"GPTQModel opens {family} and computes something else; choose compressed-tensors, gguf or mlx"
        )
    if model.config.get_text_config() is not model.config and family not in WRAPPERS:
        raise ValueError(
            f"GPTQModel was not seen to read {family} rightly; of wrappers it does {', '.join(WRAPPERS)}: choose "
            "gguf, mlx or compressed-tensors"
        )
    _carriers(model, grids, mode)


def write(export: PackedExport, folder: Path, mode: CarrierMode, progress: Progress) -> None:
    """Fill an empty folder; see ``Format``.

    Raises:
        ValueError: Scales that float16 does not hold.
    """
    carriers, symmetric = _carriers(export.model, export.grids, mode), _is_symmetric(export)
    config: dict[str, Any] = json.loads(json.dumps(export.config))
    dropped = unreadable_draft(export, config)
    pieces = _kept(export, dropped)
    pieces += [_piece(export, name, carrier, symmetric) for name, carrier in carriers.items()]
    config |= {"quantization_config": _quantization(export, carriers, symmetric), **_BARRIER}
    # Where GPTQModel looks first.
    own = {"quantize_config.json": json.dumps(config["quantization_config"], indent=2) + "\n"}
    fill_folder(export, folder, pieces, config, _card(carriers, bool(dropped)), progress, own)


def verify(export: PackedExport, folder: Path, mode: CarrierMode, progress: Progress) -> FormatReport:
    """Read the folder back, number by number, after the description of the layout."""
    config = json.loads((folder / "config.json").read_text(encoding="utf8"))["quantization_config"]
    carriers, stored = _carriers(export.model, export.grids, mode), raw_tensors(folder)
    names, num_bits, num_weights = list(carriers), 0, 0
    for index in progress(range(len(names)), "reading"):
        name, (rows, columns) = names[index], export.shape(names[index])
        parts = {part: stored[f"{name}.{part}"].read() for part in ("qweight", "qzeros", "scales", "g_idx")}
        # Scales and numbers are exact, and so is their product: nothing is rounded before it is compared.
        theirs = dequantize_weight(export.quantized(name), torch.float32)
        check_values(folder, name, dequantize_words(parts, config, name), theirs)
        num_bits += carriers[name].num_bits(rows, columns)
        num_weights += rows * columns
    return report(
        folder, "gptq", "numpy, after GPTQModel's description",
        types=count_types(_label(carrier) for carrier in carriers.values()),
        num_other=check_pieces(folder, _kept(export, unreadable_draft(export, {}))),
        num_bits=num_bits, num_weights=num_weights, largest_error=0.0,
    )  # fmt: skip


def serve(folder: Path) -> str:
    """The command that opens a folder."""
    return f"python -c \"from gptqmodel import GPTQModel; GPTQModel.load('{folder}')\""


def _carriers(model: PreTrainedModel, grids: Mapping[str, PackedFormat], mode: CarrierMode) -> dict[str, Carrier]:
    carriers = choose_carriers("gptq", model, grids, mode)
    check_experts_apart(model, carriers, "gptq", _TAKEN_APART)
    experts = expert_modules(model)
    for name in carriers:
        rows, columns = dense_weight(model, name, experts).shape
        if rows % _MULTIPLE or columns % _MULTIPLE:
            raise ValueError(
                f"{name} has {rows} x {columns} values, and GPTQModel reads multiples of {_MULTIPLE}; leave it as it is"
            )
    return carriers


def _is_symmetric(export: PackedExport) -> bool:
    """Whether no weight has zero points of its own, so that readers that do not look at them are right, too."""
    return all(grid.symmetric for grid in export.grids.values())


def _kept(export: PackedExport, dropped: Sequence[str]) -> list[Piece]:
    """Everything that is not quantized, under the names of the model in transformers; what it does not have, as it is.

    Raises:
        ValueError: A tensor of the files is not simply a parameter of the model.
    """
    experts = expert_modules(export.model)
    names = [n for n in export.weight_names if n not in export.grids and split_expert_name(n, experts) is not None]
    pieces = [_dense(export, name) for name in names]
    parameter_of = export.contents.parameter_of
    others = kept_pieces(export, [*dropped, *export.keys_of(names)])
    for key in (key for piece in others for key in piece.declared):
        if key in parameter_of and export.contents.sources[parameter_of[key]].converter is not None:
            raise ValueError(
                f"{key} is stored otherwise than {parameter_of[key]} of the model, and GPTQModel reads parameters as "
                "they are; choose compressed-tensors, gguf or mlx"
            )
    return pieces + [renamed(piece, lambda key: parameter_of.get(key, key)) for piece in others]


def _dense(export: PackedExport, name: str) -> Piece:
    key = f"{name}.weight"
    return Piece({key: Declared(export.dtype(name), export.shape(name))}, lambda: {key: export.weight(name)})


def _piece(export: PackedExport, name: str, carrier: Carrier, symmetric: bool) -> Piece:
    rows, columns = export.shape(name)
    groups = 1 if carrier.group_size is None else columns // carrier.group_size
    declared = {
        f"{name}.qweight": Declared(torch.int32, (num_words(columns, carrier.bits), rows)),
        f"{name}.qzeros": Declared(torch.int32, (groups, num_words(rows, carrier.bits))),
        f"{name}.scales": Declared(torch.float16, (groups, rows)),
        f"{name}.g_idx": Declared(torch.int32, (columns,)),
    }

    def make() -> dict[str, Tensor]:
        made = _tensors(name, export.quantized(name), carrier.bits, symmetric)
        return dict(zip(declared, made, strict=True))

    return Piece(declared, make)


def _tensors(name: str, weight: QuantizedWeight, bits: int, symmetric: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``qweight``, ``qzeros``, ``scales`` and ``g_idx`` of a weight."""
    if weight.zero_point_OG is None:
        weight = recentre(weight, bits)
    columns, groups = weight.codes_OI.shape[1], weight.scale_OG.shape[1]
    scale_GO = weight.scale_OG.mT.to(torch.float16).contiguous()
    if not torch.equal(scale_GO.float(), weight.scale_OG.mT.float()):
        raise ValueError(
            f"scales of {name} are not exact in float16, which this layout stores; choose compressed-tensors or mlx"
        )
    middle_OG = torch.full_like(weight.scale_OG, 2 ** (bits - 1), dtype=torch.uint8)
    zero_OG = middle_OG if weight.zero_point_OG is None else weight.zero_point_OG
    stored_GO = (zero_OG - 1 if symmetric else zero_OG).mT.contiguous()
    group_I = torch.arange(columns, dtype=torch.int32) // (columns // groups)
    return pack(weight.codes_OI, bits).mT.contiguous(), pack(stored_GO, bits), scale_GO, group_I


def _quantization(export: PackedExport, carriers: Mapping[str, Carrier], symmetric: bool) -> dict[str, Any]:
    """``quantization_config``: the most frequent type, and rules for every weight that has another, or none."""
    by_type: dict[Carrier, list[str]] = {}
    for name, carrier in carriers.items():
        by_type.setdefault(carrier, []).append(name)
    first = Counter(carriers.values()).most_common(1)[0][0]
    kept = [name for name in export.weight_names if name not in carriers]
    universe = export.weight_names
    dynamic: dict[str, dict[str, Any]] = {}
    for carrier, names in by_type.items():
        if carrier != first:
            rules = patterns(names, universe)
            dynamic |= {f"+:^{rule}$": {**_as_read(carrier), "sym": symmetric} for rule in rules}
    dynamic |= {f"-:^{rule}$": {} for rule in patterns(kept, universe)}
    return {
        **_as_read(first),
        "sym": symmetric,
        "desc_act": False,
        "lm_head": False,
        "quant_method": "gptq",
        "checkpoint_format": "gptq" if symmetric else "gptq_v2",
        "pack_dtype": "int32",
        "dynamic": dynamic or None,
        "meta": {"quantizer": ["moeq"]},
    }


def _as_read(carrier: Carrier) -> dict[str, Any]:
    return {"bits": carrier.bits, "group_size": carrier.group_size or -1}


def _label(carrier: Carrier) -> str:
    return f"{carrier.bits} bits, {'channels' if carrier.group_size is None else f'groups of {carrier.group_size}'}"


def _card(carriers: Mapping[str, Carrier], dropped: bool) -> Card:
    return Card(
        format="gptq",
        library="gptqmodel",
        opening='```python\nfrom gptqmodel import GPTQModel\n\nmodel = GPTQModel.load("gptq")\n```',
        types=count_types(_label(carrier) for carrier in carriers.values()),
        left_out="draft layers, which the source holds in a format of its own" if dropped else None,
    )


FORMAT = Format("gptq", check, write, verify, serve)
