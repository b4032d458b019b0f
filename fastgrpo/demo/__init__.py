"""The demo: a tiny Qwen2-VL, synthetic scenes, and a GRPO run on a CPU."""
