r"""AutoRound's GGUF export, run with its own interpreter (and the package gguf); see README.md for the environment.

    runs/peers/env/autoround/bin/python benchmarks/peers/quantize_autoround_gguf.py --model assets/reference-moe \
        --ids ids.safetensors --type q4_0 --dense dense.gguf --output autoround.gguf

Its defaults: routers stay; 200 steps of signed gradient descent per block, none for the types that it only rounds.
What it made of the blocks' weights is put into the dense file, so that embedding, head and metadata are those of every
other file (llama.cpp refuses AutoRound's file of a tied model, which has no head).
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from auto_round import AutoRound
from auto_round.export.export_to_gguf.llama_cpp_conversion import get_conversion
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

BATCH = 8
# The converter inside AutoRound 0.16.1 names architectures that gguf 0.19 does not have; it needs their names alone.
NEWER = (
    "BAILINGMOE3", "COHERE2MOE", "DEEPSEEK32", "DEEPSEEK4", "DFLASH", "EAGLE3", "GEMMA4_ASSISTANT", "GRANITE_SWITCH",
    "HY_V3", "KIMI_K3", "LAGUNA", "MELLUM", "MINIMAX01", "MINIMAXM3", "MUSE_GLIMMER", "NANBEIGE", "POCKETTTS",
    "QWEN3TTS", "TALKIE",
)  # fmt: skip


def main() -> None:
    """Tune, export, put the blocks into the dense file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--type", required=True, help="of its formats, after gguf:")
    for name in ("model", "ids", "dense", "output"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--iters", type=int, default=200, help="steps per block; 0 is its search without tuning")
    options = parser.parse_args()
    for name in NEWER:
        if not hasattr(gguf.MODEL_ARCH, name):
            setattr(gguf.MODEL_ARCH, name, name)
    # Nor does it know the bundled tokenizer; that of the dense file is the one that counts.
    get_conversion(model_path=options.model)
    text_model = sys.modules["conversion.base"].TextModel
    text_model.get_vocab_base_pre = lambda *_: "smollm"
    split_stacks(sys.modules["conversion.llama"].LlamaModel, text_model.modify_tensors)
    ids_NL = load_file(options.ids)["ids"]
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype="auto")
    rounding = AutoRound(
        model, AutoTokenizer.from_pretrained(options.model), scheme=f"gguf:{options.type}", seqlen=ids_NL.shape[1],
        nsamples=len(ids_NL), batch_size=BATCH, iters=options.iters, device_map="cpu", enable_torch_compile=False,
        dataset=[{"input_ids": ids_BL, "attention_mask": torch.ones_like(ids_BL)} for ids_BL in ids_NL.split(BATCH)],
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        rounding.quantize_and_save(folder, format=f"gguf:{options.type}")
        made = next(Path(folder).rglob("*.gguf"))
        write(options.dense, gguf.GGUFReader(made), options.output)


def split_stacks(converter: Any, convert: Callable[..., Iterator[tuple[str, torch.Tensor]]]) -> None:
    """Teach a converter the stacks of experts that AutoRound makes of a Mixtral; it knows single experts alone.

    Args:
        converter: Class whose ``modify_tensors`` is replaced.
        convert: What it does with a tensor that needs no change.
    """
    known = converter.modify_tensors

    def modify_tensors(
        self: Any, tensor: torch.Tensor, name: str, block: int | None
    ) -> Iterator[tuple[str, torch.Tensor]]:
        parts = {"down": tensor}
        if name.endswith("mlp.experts.gate_up_proj"):
            parts = dict(zip(("gate", "up"), tensor.chunk(2, -2), strict=True))
        elif not name.endswith("mlp.experts.down_proj"):
            yield from known(self, tensor, name, block)
            return
        for part, rows in parts.items():
            yield from convert(self, rows.contiguous(), f"{name.rpartition('.')[0]}.{part}_proj.weight", block)

    converter.modify_tensors = modify_tensors


def write(dense: Path, made: gguf.GGUFReader, output: Path) -> None:
    """The dense file with the quantized tensors of another."""
    source, quantized = gguf.GGUFReader(dense), {tensor.name: tensor for tensor in made.tensors}
    writer = gguf.GGUFWriter(output, source.fields["general.architecture"].contents())
    for name, field in source.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], inner)
    for tensor in source.tensors:
        is_weight = tensor.name.startswith("blk.") and tensor.tensor_type == gguf.GGMLQuantizationType.BF16
        chosen = quantized[tensor.name] if is_weight else tensor
        print(chosen.name, chosen.tensor_type.name)
        writer.add_tensor(chosen.name, np.array(chosen.data), raw_dtype=chosen.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    sys.exit(main())
