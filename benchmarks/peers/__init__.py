"""Other quantizers: scripts for their own environments, and what reads their checkpoints."""
