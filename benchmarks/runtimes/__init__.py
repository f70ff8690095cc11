"""Every export, opened by the runtime that it is for: right, refused, or wrong."""

from benchmarks.runtimes.command import main

__all__ = ["main"]
