"""Data sets in, prompts out: `loading` reads records, `sat`, `cvbench`, `chat` make rows, `prompts` texts."""
