"""``python -m benchmarks.runtimes``."""

from benchmarks.runtimes.command import main

if __name__ == "__main__":
    main()
