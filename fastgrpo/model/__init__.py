"""What sampler and update both use: hub checkpoints in, where things are in a model, its view of pictures."""
