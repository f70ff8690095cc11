"""llama.cpp for tests, which are skipped where it is not installed."""

import importlib.util

import pytest

from benchmarks.runtimes.llama_cpp import LlamaCpp

__all__ = ["LlamaCpp", "needs_llama_cpp"]

needs_llama_cpp = pytest.mark.skipif(
    importlib.util.find_spec("xllamacpp") is None, reason="llama.cpp is not installed (pip install xllamacpp)"
)
