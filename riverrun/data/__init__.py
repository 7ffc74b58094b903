"""Text as tokens, and tokens as batches. Knows no model."""
