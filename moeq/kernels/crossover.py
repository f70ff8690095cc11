"""Up to how many rows the operation on codes of 4 bits is faster than to make the weight and multiply.

From a table, never from a timing at load, so that runs on one kind of processor agree; measured by

    OMP_NUM_THREADS=1 python -m benchmarks.speed.packed --parts weight
"""

# Of a weight of 768 x 2048 on AVX-512 with AMX: 2.4 ms for 64 rows and 4.9 for 128, beside 4.3 to 5.4 with the weight.
FEW_ROWS = 96
