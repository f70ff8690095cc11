"""Open packed checkpoints in a process that knows nothing but the folders, and save the logits.

Arguments: a file of token ids, then folders; each gets ``logits.pt`` beside it.
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import moeq.checkpoint.quantizer  # noqa: F401

torch.set_num_threads(1)
ids = torch.load(sys.argv[1])
for folder in map(Path, sys.argv[2:]):
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # out of the memory-mapped file, into aligned memory
    with torch.no_grad():
        torch.save(model(input_ids=ids).logits, folder.with_name(f"{folder.name}.logits.pt"))
