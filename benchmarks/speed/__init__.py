"""How long things take, beside what else would do them."""
