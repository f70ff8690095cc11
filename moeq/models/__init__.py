"""Where things are in a model: blocks, linears, routers, experts; and how a model is loaded."""
