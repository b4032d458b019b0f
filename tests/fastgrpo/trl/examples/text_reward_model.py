"""Conversations, judged by a reward model and by length. usage: text_reward_model.py MODEL FOLDER JUDGE"""

import sys

from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

model, folder, judge = sys.argv[1:]

questions = ["What is a tree?", "Why is it cold?", "Who are you?", "Where is up?"]
dataset = Dataset.from_list([{"prompt": [{"role": "user", "content": question}]} for question in questions])
dataset = dataset.train_test_split(test_size=0.5, seed=0)


async def not_too_long(completion_ids, log_metric, **kwargs):
    lengths = [len(ids) for ids in completion_ids]
    log_metric("tokens", sum(lengths))
    return [-0.1 * length for length in lengths]


trainer = GRPOTrainer(
    model=model,
    reward_funcs=[judge, not_too_long],
    args=GRPOConfig(
        output_dir=folder,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=4,
        num_generations=4,
        max_completion_length=8,
        reward_weights=[1.0, 0.5],
        learning_rate=1e-3,
        beta=0.04,
        max_steps=2,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=2,
        use_cpu=True,
        bf16=False,
        report_to="none",
    ),
    train_dataset=dataset["train"],
    eval_dataset=dataset["test"],
)
trainer.train()
