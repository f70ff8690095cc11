"""Files: whole or not at all, checked, and the digests that tell one from another."""
