"""The sampler: paged KV cache, prompts shared by their group, a decode step over static buffers."""
