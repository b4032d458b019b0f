"""What is transformers' own: saved models, callbacks, the user's optimizer."""

from pathlib import Path
from typing import Any

import torch
from run_files import changed, metrics_of, parameters
from transformers import Qwen2VLForConditionalGeneration, TrainerCallback

from fastgrpo.model.load import load_policy, load_processing
from fastgrpo.training.trainer import GRPOTrainer


def test_a_saved_model_loads_anywhere(build: Any, tmp_path: Path) -> None:
    trainer = build(max_steps=1)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    loaded = Qwen2VLForConditionalGeneration.from_pretrained(tmp_path / "saved")
    trained = parameters(trainer)
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, trained[name]), name
    processing = load_processing(str(tmp_path / "saved"))
    assert processing.tokenizer.get_vocab() == trainer.processing.tokenizer.get_vocab()
    assert processing.image_processor.size == trainer.processing.image_processor.size
    assert GRPOTrainer(str(tmp_path / "saved"), "length", trainer.config, trainer.train_dataset) is not None


def test_callbacks_are_called(build: Any) -> None:
    calls: list[tuple[str, int]] = []
    logs: list[dict[str, float]] = []

    class Watch(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            calls.append(("begin", state.global_step))

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            calls.append(("step", state.global_step))
            control.should_training_stop = state.global_step == 2

        def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            logs.append(kwargs["logs"])

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            calls.append(("end", state.global_step))

    trainer = build(callbacks=[Watch()], max_steps=5)
    trainer.train()
    assert calls == [("begin", 0), ("step", 1), ("step", 2), ("end", 2)]
    assert {"loss", "reward", "rewards/token_sum/mean"} <= set(logs[0])


def test_the_users_own_optimizer(build: Any, tiny_model_dir: Path) -> None:
    model = load_policy(str(tiny_model_dir))
    optimizer = torch.optim.SGD(model.lm_head.parameters(), lr=0.1)
    trainer = build(model=model, optimizers=(optimizer, None))
    before = parameters(trainer)
    trainer.train()
    assert changed(before, trainer) == {"model.language_model.embed_tokens.weight"}, "tied to the head"


def test_the_settings_stay_those_that_were_passed(build: Any) -> None:
    seen: list[Any] = []

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append((args, args.gradient_accumulation_steps, args.per_device_train_batch_size, state.max_steps))

    trainer = build(callbacks=[Watch()], gradient_accumulation_steps=4, per_device_train_batch_size=2, max_steps=3)
    trainer.train()
    assert seen == [(trainer.config, 4, 2, 3)] * 3
    assert trainer.args is trainer.config
    assert [step["epoch"] for step in metrics_of(trainer.args.output_dir)] == [n / 32 for n in (1, 2, 3)]
