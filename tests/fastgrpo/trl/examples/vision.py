"""Pictures: think, then answer between tags. usage: vision.py MODEL FOLDER"""

import re
import sys

from datasets import Dataset
from PIL import Image
from trl import GRPOConfig, GRPOTrainer

model, folder = sys.argv[1:]

SYSTEM = "Think between <think> and </think>, then give the answer between <answer> and </answer>."
COLOURS = ("red", "green", "blue", "white")

dataset = Dataset.from_list(
    [{"image": Image.new("RGB", (84, 56), colour), "question": "Which colour?", "colour": colour} for colour in COLOURS]
)


def as_conversation(row):
    return {
        "prompt": [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": row["question"]},
        ]
    }


def in_form(completions, **kwargs):
    texts = [completion[0]["content"] for completion in completions]
    return [float(bool(re.fullmatch(r"<think>.*</think>\s*<answer>.*</answer>", text, re.DOTALL))) for text in texts]


def right_colour(completions, image, colour, prompts, **kwargs):
    assert [picture.size for picture in image] == [(84, 56)] * len(prompts)
    texts = [completion[0]["content"] for completion in completions]
    return [float(name in text) + len(text) / 100 for name, text in zip(colour, texts)]


trainer = GRPOTrainer(
    model=model,
    reward_funcs=[in_form, right_colour],
    args=GRPOConfig(
        output_dir=folder,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        num_generations=4,
        max_completion_length=8,
        learning_rate=1e-3,
        max_steps=1,
        logging_steps=1,
        use_cpu=True,
        bf16=False,
        report_to="none",
    ),
    train_dataset=dataset.map(as_conversation, remove_columns="question"),
)
trainer.train()
