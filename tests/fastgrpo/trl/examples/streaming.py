"""A file read as a stream. usage: streaming.py MODEL FOLDER ROWS"""

import sys

from datasets import load_dataset
from trl import GRPOConfig, GRPOTrainer

model, folder, rows = sys.argv[1:]

dataset = load_dataset("json", data_files=rows, split="train", streaming=True)


def near(completions, length, **kwargs):
    return [-float(abs(len(completion) - wanted)) for completion, wanted in zip(completions, length)]


trainer = GRPOTrainer(
    model=model,
    reward_funcs=near,
    args=GRPOConfig(
        output_dir=folder,
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=8,
        learning_rate=1e-3,
        max_steps=3,
        logging_steps=1,
        use_cpu=True,
        bf16=False,
        report_to="none",
    ),
    train_dataset=dataset,
)
trainer.train()
