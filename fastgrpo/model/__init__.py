"""What sampler and update share about the model: loading, families, the vision tower, ZeRO-3."""
