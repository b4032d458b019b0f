"""The model, as sampler and update both need it: loading, families, the vision tower, ZeRO-3."""
