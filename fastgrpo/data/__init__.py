"""From data sets to prompts: `loading` reads records, `sat`, `cvbench` and `chat` turn them into rows, `prompts` builds
the model's inputs."""
