"""Log-probabilities of GPTQModel on the CPU in bfloat16; runs in its environment: ``in_gptqmodel.py JOBS.json``."""

import json
import sys
from pathlib import Path

import numpy as np


def main(jobs: Path) -> None:
    for job in json.loads(jobs.read_text(encoding="utf8")):
        output = Path(job["output"])
        try:
            np.save(output, log_probabilities(job["folder"], np.load(job["ids"])))
        except Exception as error:  # whatever it raises is its refusal
            output.with_suffix(".txt").write_text(f"{type(error).__name__}: {error}", encoding="utf8")


def log_probabilities(folder: str, ids: np.ndarray) -> np.ndarray:
    """[N, L, V]."""
    import torch
    from gptqmodel import BACKEND, GPTQModel

    model = GPTQModel.load(folder, device="cpu", backend=BACKEND.GPTQ_TORCH, dtype=torch.bfloat16).model
    with torch.no_grad():
        logits = [model(torch.from_numpy(row[None])).logits.float() for row in ids]
    return torch.cat(logits).log_softmax(-1).numpy()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
