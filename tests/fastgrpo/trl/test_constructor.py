"""What TRL's constructor takes, and what it leaves on the trainer."""

import inspect
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from fastgrpo import GRPOConfig, GRPOTrainer

datasets = pytest.importorskip("datasets")

TRLS_ARGUMENTS = [
    "model", "reward_funcs", "args", "train_dataset", "eval_dataset", "processing_class", "reward_processing_classes",
    "callbacks", "optimizers", "quantization_config", "peft_config", "tools", "rollout_func", "environment_factory",
]  # fmt: skip


def test_the_constructor_takes_trls_arguments_in_trls_order() -> None:
    assert list(inspect.signature(GRPOTrainer).parameters) == TRLS_ARGUMENTS


def test_arguments_that_trls_scripts_pass_as_none_are_accepted(build: Any) -> None:
    nothing = dict.fromkeys(
        ("quantization_config", "peft_config", "tools", "rollout_func", "environment_factory", "callbacks"), None
    )
    assert build(**nothing).train_dataset


def test_an_empty_list_of_tools_is_no_tools(build: Any) -> None:
    assert build(tools=[]).num_generations == 2


def test_quantization_is_refused_by_name_where_it_cannot_run(build: Any) -> None:
    with pytest.raises(ValueError, match="quantization_config"):
        build(quantization_config=BitsAndBytesConfig(load_in_8bit=True))


def test_quantization_of_a_loaded_model_is_refused(build: Any, text_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(text_model)
    with pytest.raises(ValueError, match="loaded already"):
        build(model=model, quantization_config=BitsAndBytesConfig(load_in_8bit=True))


def test_rewards_are_asked_for(build: Any) -> None:
    with pytest.raises(ValueError, match="reward_funcs is missing"):
        build(reward_funcs=[])


def test_a_training_set_is_asked_for(text_model: Path, quick: Any) -> None:
    with pytest.raises(ValueError, match="`train_dataset` is required"):
        GRPOTrainer(str(text_model), "length", quick())


def test_a_stream_wants_max_steps(build: Any, texts: list[Any]) -> None:
    with pytest.raises(ValueError, match="max_steps"):
        build(train_dataset=datasets.Dataset.from_list(texts).to_iterable_dataset(), max_steps=-1)


def test_settings_are_those_that_were_passed(build: Any, text_model: Path, quick: Any, texts: list[Any]) -> None:
    settings = quick(gradient_accumulation_steps=2, max_steps=-1, num_train_epochs=2)
    trainer = GRPOTrainer(str(text_model), "length", settings, texts)
    assert trainer.args is settings
    assert (trainer.args.gradient_accumulation_steps, trainer.args.per_device_train_batch_size) == (2, 4)
    assert (trainer.args.max_steps, trainer.args.num_train_epochs) == (-1, 2)


def test_data_sets_are_those_that_were_passed(build: Any, texts: list[Any]) -> None:
    rows, held_out = datasets.Dataset.from_list(texts), {"one": datasets.Dataset.from_list(texts[:1])}
    trainer = build(train_dataset=rows, eval_dataset=held_out)
    assert trainer.train_dataset is rows
    assert trainer.eval_dataset is held_out


def test_a_run_without_settings_writes_beside_the_models_name(
    text_model: Path, texts: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    trainer = GRPOTrainer(model=str(text_model), reward_funcs="length", train_dataset=texts * 4)
    assert Path(trainer.args.output_dir).name == "tiny-qwen2-GRPO"
    assert isinstance(trainer.args, GRPOConfig)


def test_the_processing_class_is_the_tokenizer_of_a_text_model(build: Any) -> None:
    trainer = build()
    assert trainer.processing_class("a b")["input_ids"] == trainer.processing.tokenizer("a b")["input_ids"]


def test_the_processing_class_is_the_one_that_was_passed(build: Any, text_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(text_model)
    assert build(processing_class=tokenizer).processing_class is tokenizer


def test_the_processing_class_of_a_vision_model_decodes(build: Any, tiny_model_dir: Path) -> None:
    trainer = build(model=str(tiny_model_dir))
    ids = trainer.processing.tokenizer("Simple")["input_ids"]
    assert trainer.processing_class.decode(ids) == "Simple"
    assert trainer.processing_class.pad_token_id == trainer.processing.tokenizer.pad_token_id


def test_a_model_object_trains_in_place(build: Any, text_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(text_model)
    before = model.lm_head.weight.detach().clone()
    trainer = build(model=model)
    trainer.train()
    assert trainer.model is model
    assert not before.equal(model.lm_head.weight)


def test_callbacks_see_the_tokenizer_and_every_log_line(build: Any) -> None:
    from transformers import TrainerCallback

    seen: list[Any] = []

    class Watch(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **parts: Any) -> None:
            seen.append((sorted(logs), parts["processing_class"].pad_token_id))

    trainer = build(callbacks=[Watch()])
    trainer.train()
    assert len(seen) == 2, "the step's line and the run's"
    assert "reward" in seen[0][0]
    assert {pad for _, pad in seen} == {trainer.processing.tokenizer.pad_token_id}
