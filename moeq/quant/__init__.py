"""The mathematics of weight quantization: grids, Hessians, solvers; plain torch functions."""
