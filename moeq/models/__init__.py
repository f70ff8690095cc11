"""Where things are in a model (blocks, linears, routers, experts), and running and observing one block."""
