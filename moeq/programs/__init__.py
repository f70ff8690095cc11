"""Running what a model wrote: programs in a sandbox, and pass@k."""
