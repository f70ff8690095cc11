r"""GPTQ of GPTQModel, run with its own interpreter; see README.md for the environment.

    runs/peers/env/gptqmodel/bin/python benchmarks/peers/quantize_gptqmodel.py --model assets/reference-moe \
        --ids ids.safetensors --bits 3 --output runs/peers/gptqmodel

Its defaults: each expert sees the tokens that are routed to it, an expert with less than 0.5 % of them is rounded to
nearest, group-aware activation order, no search of ranges (``--mse 2`` turns it on), ``--bypass`` gives every token to
every expert.  What is written is unpacked from the checkpoint that it saves; which experts fell back is in the notes.
"""

import os
import sys
import tempfile
from pathlib import Path

# On two cores it asks for one worker, then for two of that one, and stops; the variable is read when it is imported.
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")

import torch
from dense import QUANTIZED, load_folder, load_ids, parse, read_gptq, spelled, start_report, write_dense
from gptqmodel import GPTQModel, QuantizeConfig
from gptqmodel.quantization.config import ExpertsRoutingBypass, MoEConfig

EXTRA = {
    "--mse": {"type": float, "default": 0.0, "help": "norm of the search of ranges; 0 is none, the default"},
    "--bypass": {"action": "store_true", "help": "every token to every expert"},
}


def main() -> None:
    """Quantize, save packed, read back, write dense."""
    options = parse(__doc__, EXTRA)
    report = start_report("GPTQModel", options, ("gptqmodel", "defuser"))
    torch.manual_seed(options.seed)
    config = QuantizeConfig(
        bits=options.bits, group_size=options.group_size or -1, sym=options.symmetric, mse=options.mse,
        moe=MoEConfig(ExpertsRoutingBypass()) if options.bypass else None,
        # Its default order needs groups: "act_group_aware=True requires group_size > 0".
        act_group_aware=bool(options.group_size),
    )  # fmt: skip
    model = GPTQModel.load(str(options.model), config, device="cpu")
    windows = [{"input_ids": ids_L, "attention_mask": torch.ones_like(ids_L)} for ids_L in load_ids(options.ids)]
    with report.timed():
        log = model.quantize(windows, batch_size=options.batch)
    with tempfile.TemporaryDirectory() as folder:
        model.save(folder)
        packed = load_folder(Path(folder))
    report.notes += [f"{entry}" for entries in log.values() for entry in entries if "fallback" in str(entry)]
    found = dict(packed)
    for name in filter(QUANTIZED.fullmatch, load_folder(options.model)):
        module = name.removesuffix(".weight")
        try:
            saved = spelled(packed, module, "qweight")
        except ValueError:
            report.notes.append(f"left as it was: {module}")
        else:
            found[name] = read_gptq(packed, saved, options.bits, zero_offset=1)
    write_dense(options, found, report)


if __name__ == "__main__":
    sys.exit(main())
