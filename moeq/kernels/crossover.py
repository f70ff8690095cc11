"""Up to how many rows the operation on codes of 4 bits is faster than to dequantize the weight and multiply.

From a table, never from a timing at load, so that runs on one kind of processor agree; `python -m
benchmarks.speed.packed --crossover` measures it.
"""

# On AVX-512 with AMX 1.1 ms for 32 rows of a weight of 768 x 2048, where to dequantize takes 1.0 and the product 0.35;
# on AVX2 1.2 ms for 16 rows and 5 for 64, where the product alone takes 1.4 and 3.
FEW_ROWS = 32
