"""Lightning callbacks: one step of a run each."""
