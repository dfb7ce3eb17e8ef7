"""Training: the distiller, the seam to transformers.Trainer, checkpoints and callbacks."""
