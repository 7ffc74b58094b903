"""WHAT is computed: one file a recurrence, each with its equation, its `step` and its start; `fold` is their meaning."""
