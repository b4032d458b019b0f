"""One GRPO step in plain torch and transformers: HF `generate`, one padded batch, full-vocabulary logits.

This is the executable specification of the engine and the policy. It is written to be read and to be right; the fast
paths are tested and measured against it, and it serves every model that they do not know.
"""
