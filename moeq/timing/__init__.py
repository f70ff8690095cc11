"""How long packed products take on this machine: time as a budget."""
