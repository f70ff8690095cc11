"""Log-probabilities of vLLM on the CPU in bfloat16; runs in its environment: ``in_vllm.py JOBS.json``."""

import gc
import json
import os
import sys
from pathlib import Path

import numpy as np

_SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING",
}  # fmt: skip
_NUM_WINDOWS = 2  # it gives a Python object for each token of the vocabulary at each position


def main(jobs: Path) -> None:
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    for job in json.loads(jobs.read_text(encoding="utf8")):
        output = Path(job["output"])
        try:
            np.save(output, log_probabilities(job["folder"], np.load(job["ids"])[:_NUM_WINDOWS]))
        except Exception as error:  # whatever it raises is its refusal
            output.with_suffix(".txt").write_text(f"{type(error).__name__}: {error}", encoding="utf8")
        gc.collect()
        cleanup_dist_env_and_memory()


def log_probabilities(folder: str, ids: np.ndarray) -> np.ndarray:
    """[N, L, V]; the last position of a window, which vLLM does not give, is zero."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=folder, dtype="bfloat16", enforce_eager=True, max_model_len=ids.shape[1] + 8, max_num_seqs=2,
        enable_prefix_caching=False, max_logprobs=-1, disable_log_stats=True,
    )  # fmt: skip
    asked = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=-1)
    answers = llm.generate([{"prompt_token_ids": row.tolist()} for row in ids], asked, use_tqdm=False)
    vocabulary = len(answers[0].prompt_logprobs[1])
    found = np.zeros((*ids.shape, vocabulary), np.float32)
    for window, answer in enumerate(answers):
        for position, values in enumerate(answer.prompt_logprobs[1:]):
            for token, value in values.items():
                if token < vocabulary:
                    found[window, position, token] = value.logprob
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]))
