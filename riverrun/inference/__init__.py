"""Using a trained model: text that goes on from a prompt or a saved state, in memory that does not grow."""
