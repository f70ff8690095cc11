"""``python -m benchmarks.runtimes``."""

from benchmarks.runtimes.command import main

main()
