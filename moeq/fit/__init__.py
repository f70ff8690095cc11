"""One run of fit: passes over blocks, solving, finished blocks on disk."""
