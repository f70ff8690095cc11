"""What a run is going to take, and what it took: memory, disk and time by phase."""
