"""HOW it runs on a device: `cpu` in Numba, `gpu` in Triton. Importing them compiles nothing."""
