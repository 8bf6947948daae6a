"""What the train stage does: base, batches, shared prefix, checkpoints, merge."""
