"""The recipe of the reference model."""
