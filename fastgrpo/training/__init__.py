"""A run: transformers' Trainer around the step, its checkpoints, logs and progress."""
