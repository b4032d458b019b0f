"""Fine-tunes three SGD steps on as many ranks as there are; run by test_sft_ranks.py, alone and by torchrun.

Usage: sft_run.py MODEL_DIR OUTPUT_DIR SCENARIO…, of ddp, zero2, zero3
"""

import os
import sys
from pathlib import Path

import torch
from data_parallel_run import rows
from deepspeed_run import shipped
from transformers.utils import logging

from fastgrpo.settings.sft_config import SFTConfig
from fastgrpo.training.sft import SFTTrainer


def main() -> None:
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    model, out, *names = sys.argv[1:]
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    records = [record | {"solution": "a" * (i % 3 + 1)} for i, record in enumerate(rows())]
    for name in names:
        config = SFTConfig(
            output_dir=str(Path(out) / name), use_cpu=True, bf16=False, report_to=[], save_strategy="no", max_steps=3,
            per_device_train_batch_size=2 // ranks, gradient_accumulation_steps=2, shuffle_dataset=False, optim="sgd",
            learning_rate=0.5, disable_tqdm=True, deepspeed=None if name == "ddp" else shipped(name),
        )  # fmt: skip
        trainer = SFTTrainer(model, config, records)
        trainer.train()
        trainer.save_model()
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
