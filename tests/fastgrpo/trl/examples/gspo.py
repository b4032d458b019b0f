"""GSPO (arXiv 2507.18071): a ratio per sequence, and several steps on a rollout. usage: gspo.py MODEL FOLDER"""

import sys

from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer
from trl.rewards import think_format_reward

model, folder = sys.argv[1:]

questions = [f"What is {i} and {i}?" for i in range(4)]
dataset = Dataset.from_list([{"prompt": [{"role": "user", "content": question}]} for question in questions])


def vowels(completions, **kwargs):
    return [float(sum(letter in "aeiou" for letter in completion[0]["content"])) for completion in completions]


trainer = GRPOTrainer(
    model=model,
    reward_funcs=[think_format_reward, vowels],
    args=GRPOConfig(
        output_dir=folder,
        importance_sampling_level="sequence",
        loss_type="grpo",
        beta=0.0,
        epsilon=3e-4,
        epsilon_high=4e-4,
        steps_per_generation=2,
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
