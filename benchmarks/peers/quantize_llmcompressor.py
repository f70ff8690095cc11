r"""GPTQ of llm-compressor, run with its own interpreter; see README.md for the environment.

    runs/peers/env/llmcompressor/bin/python benchmarks/peers/quantize_llmcompressor.py --model assets/reference-moe \
        --ids ids.safetensors --bits 3 --output runs/peers/llmcompressor

Its defaults: every expert sees every token (``--routed-only`` gives each its own), static activation order, damping
0.01, scales from the observer ``--observer``.  What is written is unpacked from the checkpoint that it saves for vLLM;
``--packed`` keeps that, too.  ``--rtn`` rounds to nearest in place of GPTQ.
"""

import shutil
import sys
import tempfile
from pathlib import Path

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from dense import (
    IGNORED,
    QUANTIZED,
    largest_difference,
    load_folder,
    load_ids,
    parse,
    read_compressed_tensors,
    spelled,
    start_report,
    write_dense,
)
from llmcompressor import oneshot
from llmcompressor.modeling.moe.linearize import linearize_moe
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import AutoModelForCausalLM, AutoTokenizer

EXTRA = {
    "--routed-only": {"action": "store_true", "help": "moe_calibrate_all_experts=False"},
    "--observer": {"default": "memoryless_minmax", "help": "of scales; memoryless_minmax is the default, or mse"},
    "--rtn": {"action": "store_true", "help": "round to nearest (QuantizationModifier)"},
    "--packed": {"type": Path, "help": "folder that keeps the checkpoint as it was saved; must not exist"},
}


def main() -> None:
    """Quantize, save packed, read back, write dense."""
    options = parse(__doc__, EXTRA)
    report = start_report("llm-compressor", options, ("llmcompressor", "compressed-tensors"))
    torch.manual_seed(options.seed)
    # Not ``load_quantizable_moe``: its patch of transformers imports torchvision, which the CPU build of torch lacks.
    model = linearize_moe(AutoModelForCausalLM.from_pretrained(options.model, dtype="auto"))
    weights = QuantizationArgs(
        num_bits=options.bits, type="int", symmetric=options.symmetric, observer=options.observer,
        strategy="group" if options.group_size else "channel", group_size=options.group_size or None,
    )  # fmt: skip
    recipe = (QuantizationModifier if options.rtn else GPTQModifier)(
        config_groups={"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}, ignore=list(IGNORED)
    )
    batches = [
        {"input_ids": ids_BL, "attention_mask": torch.ones_like(ids_BL)}
        for ids_BL in load_ids(options.ids).split(options.batch)
    ]
    loader = torch.utils.data.DataLoader(batches, batch_size=None)
    with report.timed():
        oneshot(
            model=model, tokenizer=AutoTokenizer.from_pretrained(options.model), recipe=recipe, dataset=loader,
            moe_calibrate_all_experts=not options.routed_only, num_calibration_samples=len(batches),
        )  # fmt: skip
    linears = [name.removesuffix(".weight") for name in load_folder(options.model) if QUANTIZED.fullmatch(name)]
    state = model.state_dict()
    memory = {f"{name}.weight": state[f"{spelled(state, name, 'weight')}.weight"].clone() for name in linears}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, save_compressed=True)
        packed = load_folder(Path(folder))
        if options.packed is not None:
            shutil.copytree(folder, options.packed)
    missing = [name for name in linears if f"{name}.weight" in packed]
    if missing:
        report.notes.append(f"left as they were: {missing}")
    found = dict(packed)
    for name in set(linears) - set(missing):
        stored = spelled(packed, name, "weight_packed")
        found[f"{name}.weight"] = read_compressed_tensors(packed, stored, options.bits)
    report.max_difference = largest_difference({name: found[name] for name in memory}, memory)
    write_dense(options, found, report)


if __name__ == "__main__":
    sys.exit(main())
