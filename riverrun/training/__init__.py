"""Making a model: loss, optimizer, schedule, loop, checkpoints, evaluation, reports."""
