"""WHAT is computed: one file a recurrence, with its equation, its `step` and its start; `fold` runs them."""
