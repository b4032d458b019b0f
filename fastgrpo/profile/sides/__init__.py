"""The sides of a comparison, each in a process of its own: ours, plain transformers, the published code, TRL."""
