"""A tiny Qwen2-VL that learns to look, on a laptop."""
