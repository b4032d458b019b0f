"""Several pictures in a question, LoRA, and a model object. usage: vision_lora.py MODEL FOLDER"""

import sys

from datasets import Dataset
from peft import LoraConfig
from PIL import Image
from transformers import AutoModelForImageTextToText
from trl import GRPOConfig, GRPOTrainer

model, folder = sys.argv[1:]

PAIRS = [("red", "red"), ("red", "blue"), ("green", "white"), ("white", "white")]


def row(one, other):
    parts = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Are they alike?"}]
    pictures = [Image.new("RGB", (56, 56), one), Image.new("RGB", (56, 56), other)]
    return {"prompt": [{"role": "user", "content": parts}], "images": pictures, "alike": one == other}


def says_so(completions, alike, **kwargs):
    texts = [completion[0]["content"].lower() for completion in completions]
    return [float(("yes" in text) == truth) + text.count("e") for text, truth in zip(texts, alike)]


trainer = GRPOTrainer(
    model=AutoModelForImageTextToText.from_pretrained(model, dtype="float32"),
    reward_funcs=says_so,
    args=GRPOConfig(
        output_dir=folder,
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=8,
        learning_rate=1e-3,
        gradient_checkpointing=True,
        max_steps=2,
        logging_steps=1,
        use_cpu=True,
        bf16=False,
        report_to="none",
    ),
    train_dataset=Dataset.from_list([row(*pair) for pair in PAIRS]),
    peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
)
trainer.train()
trainer.save_model(folder)
