"""HOW a recurrence is computed in parallel, in plain PyTorch: same arguments and results as its fold."""
