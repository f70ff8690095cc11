"""Checkpoints: packing, writing, loading, verifying."""
