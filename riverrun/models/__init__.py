"""Stacks of mixers: models with parameters, a state and a folder on disk."""
