"""What a run is going to take, before it starts, and what it took: memory, disk and time by phase."""
