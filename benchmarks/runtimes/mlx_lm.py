"""mlx-lm on the CPU, in this process: how long the model of a folder takes for tokens."""

import importlib.util
from pathlib import Path
from time import process_time
from typing import Any


class MlxLm:
    """A folder that mlx-lm has opened; scales, offsets and what is not quantized in float32.

    On a CPU MLX multiplies experts that are not quantized in no other dtype.

    Raises:
        ImportError: mlx-lm is not installed.
    """

    def __init__(self, folder: Path) -> None:
        if importlib.util.find_spec("mlx_lm") is None:
            raise ImportError("mlx-lm is not installed; pip install mlx-lm 'mlx[cpu]'")
        import mlx.core as mx
        from mlx_lm.utils import load_model

        mx.set_default_device(mx.cpu)
        self._mx = mx
        self._model, _ = load_model(folder)
        self._model.set_dtype(mx.float32)

    def step_seconds(self, sequences: int, prompt: int, num_tokens: int) -> list[float]:
        """Processor seconds, of all threads, of each of some tokens after a prompt, of several sequences at once."""
        return self._seconds(sequences, prompt, num_tokens)[1:]

    def prompt_seconds(self, length: int) -> float:
        """Processor seconds, of all threads, of reading one prompt."""
        return self._seconds(1, length, 0)[0]

    def _seconds(self, sequences: int, prompt: int, num_tokens: int) -> list[float]:
        from mlx_lm.models.cache import make_prompt_cache

        cache, steps = make_prompt_cache(self._model), []
        for start in (0, *range(prompt, prompt + num_tokens)):
            length = prompt if start == 0 else 1
            ids = [[1 + 7 * (sequence * prompt + place + start) % 997 for place in range(length)]
                   for sequence in range(sequences)]  # fmt: skip
            begin = process_time()
            self._mx.eval(self._model(self._mx.array(ids), cache=cache))
            steps.append(process_time() - begin)
        return steps

    def close(self) -> None:
        """Let the weights go."""
        self._model: Any = None
        self._mx.clear_cache()
