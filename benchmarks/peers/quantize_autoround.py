r"""AutoRound (SignRound), run with its own interpreter; see README.md for the environment.

    runs/peers/env/autoround/bin/python benchmarks/peers/quantize_autoround.py --model assets/reference-moe \
        --ids ids.safetensors --bits 3 --output runs/peers/autoround

Its defaults: routers and the gate of the shared expert stay; 200 steps of signed gradient descent per block on batches
of 8 windows; experts learn from the tokens that are routed to them.  What is written are the weights of its own dense
export (format ``fake``).
"""

import sys
import tempfile
from pathlib import Path

import torch
from auto_round import AutoRound
from dense import load_folder, load_ids, parse, start_report, write_dense
from transformers import AutoModelForCausalLM, AutoTokenizer

EXTRA = {"--iters": {"type": int, "default": 200, "help": "steps per block"}}


def main() -> None:
    """Tune, save dense, write under the original's names."""
    options = parse(__doc__, EXTRA)
    report = start_report("AutoRound", options, ("auto-round",))
    ids_NL = load_ids(options.ids)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype="auto")
    rounding = AutoRound(
        model, AutoTokenizer.from_pretrained(options.model), bits=options.bits, group_size=options.group_size or -1,
        sym=options.symmetric, iters=options.iters, seqlen=ids_NL.shape[1], nsamples=len(ids_NL),
        batch_size=options.batch, seed=options.seed, device_map="cpu", enable_torch_compile=False,
        dataset=[
            {"input_ids": ids_BL, "attention_mask": torch.ones_like(ids_BL)} for ids_BL in ids_NL.split(options.batch)
        ],
    )  # fmt: skip
    with report.timed():
        rounding.quantize()
    with tempfile.TemporaryDirectory() as folder:
        rounding.save_quantized(folder, format="fake")
        found = {name: tensor for path in [Path(folder), *Path(folder).iterdir()] if path.is_dir()
                 for name, tensor in load_folder(path).items()}  # fmt: skip
    write_dense(options, found, report)


if __name__ == "__main__":
    sys.exit(main())
