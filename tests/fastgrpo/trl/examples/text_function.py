"""Text and a reward function: completions that use many different letters. usage: text_function.py MODEL FOLDER"""

import sys

from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

model, folder = sys.argv[1:]

dataset = Dataset.from_dict({"prompt": ["The sky is", "Two and two are", "Once upon a", "The best colour"]})


def different_letters(completions, **kwargs):
    return [float(len(set(completion))) for completion in completions]


trainer = GRPOTrainer(
    model=model,
    reward_funcs=different_letters,
    args=GRPOConfig(
        output_dir=folder,
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=8,
        learning_rate=1e-3,
        max_steps=2,
        logging_steps=1,
        use_cpu=True,
        bf16=False,
        report_to="none",
    ),
    train_dataset=dataset,
)
trainer.train()
trainer.save_model(folder)
