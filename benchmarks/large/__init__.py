"""Models larger than memory: checkpoints of their shapes, runs under a limit, and the floor of what a fit costs."""
