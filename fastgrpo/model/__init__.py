"""Hub checkpoints in: a model to train, and the tokenizer and image processor its prompts are built with."""
