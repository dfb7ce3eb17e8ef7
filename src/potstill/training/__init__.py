"""The loop: transformers.Trainer behind one thin seam, a deterministic order of samples, checkpoints that resume bit by bit."""
