"""The mathematics: grids, Hessians, solvers; plain torch functions."""
