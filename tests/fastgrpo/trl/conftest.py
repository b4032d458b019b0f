"""Tiny models and a trainer with TRL's arguments: a text model, its reward models, and quick settings."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from run_files import changed, parameters
from scripted_turns import CHAT, TEMPLATE, Scripted
from transformers import (
    AutoTokenizer,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2ForSequenceClassification,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from fastgrpo.config import GRPOConfig
from fastgrpo.demo.base_model import load_tokenizer
from fastgrpo.training.trainer import GRPOTrainer

SMALL = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512,
}  # fmt: skip


def save(folder: Path, model_class: Any, config: Any, seed: int) -> Path:
    """Random weights and the demo's tokenizer, in hub format."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model_class(config).save_pretrained(folder)
    load_tokenizer().save_pretrained(folder)
    return folder


def text_config(kind: Any = Qwen2Config, **overrides: Any) -> Any:
    tokenizer = load_tokenizer()
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return kind(vocab_size=len(tokenizer), **{**SMALL, **ids, **overrides})


@pytest.fixture(scope="session")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2 for text, two layers of 32."""
    return save(tmp_path_factory.mktemp("trl") / "tiny-qwen2", Qwen2ForCausalLM, text_config(), seed=0)


@pytest.fixture(scope="session")
def moe_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3 with four experts, of which a token sees two."""
    config = text_config(Qwen3MoeConfig, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, head_dim=8)
    return save(tmp_path_factory.mktemp("trl") / "tiny-moe", Qwen3MoeForCausalLM, config, seed=0)


@pytest.fixture(scope="session")
def reward_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sequence classifier with one label."""
    config = text_config(num_labels=1)
    return save(tmp_path_factory.mktemp("trl") / "tiny-judge", Qwen2ForSequenceClassification, config, seed=1)


@pytest.fixture(scope="session")
def other_reward_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another one, with other weights."""
    config = text_config(num_labels=1)
    return save(tmp_path_factory.mktemp("trl") / "tiny-critic", Qwen2ForSequenceClassification, config, seed=2)


@pytest.fixture(scope="session")
def tokenizer(reward_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(reward_model)


TEXTS = [{"prompt": text} for text in ("Beautiful is", "Explicit is better than", "Simple is", "Complex is better")]
CHATS = [{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in TEXTS]


@pytest.fixture
def texts() -> list[dict[str, Any]]:
    """Four rows of finished prompts."""
    return [dict(row) for row in TEXTS]


@pytest.fixture
def chats() -> list[dict[str, Any]]:
    """The same as conversations."""
    return [dict(row) for row in CHATS]


def quick_settings(folder: Path, **overrides: Any) -> GRPOConfig:
    """One step on two prompts, two completions of at most four tokens each."""
    given = {
        "output_dir": str(folder), "use_cpu": True, "report_to": "none", "save_strategy": "no", "max_steps": 1,
        "num_generations": 2, "per_device_train_batch_size": 4, "max_completion_length": 4, "learning_rate": 0.1,
        "lr_scheduler_type": "constant", "logging_steps": 1, "disable_tqdm": True, "log_completions": False,
        "gradient_checkpointing": False,
    }  # fmt: skip
    return GRPOConfig(**given | overrides)


@pytest.fixture
def quick(tmp_path: Path) -> Any:
    """Makes such settings; keyword arguments override them."""
    return functools.partial(quick_settings, tmp_path / "run")


@pytest.fixture(scope="session")
def first_line(text_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The log line of one step with a KL term."""
    settings = quick_settings(tmp_path_factory.mktemp("run"), beta=0.04)
    trainer = GRPOTrainer(str(text_model), spread, settings, [dict(row) for row in TEXTS])
    trainer.train()
    line: dict[str, Any] = trainer.state.log_history[0]
    return line


@pytest.fixture
def build(text_model: Path, quick: Any) -> Any:
    """A trainer of the text model, by TRL's arguments; what is no argument of the constructor is a setting."""
    arguments = {
        "model", "eval_dataset", "processing_class", "reward_processing_classes", "callbacks", "optimizers",
        "quantization_config", "peft_config", "tools", "rollout_func", "environment_factory",
    }  # fmt: skip

    def make(
        reward_funcs: Any = None, train_dataset: Any = None, trainer_class: type = GRPOTrainer, **given: Any
    ) -> Any:
        parts = {name: given.pop(name) for name in arguments & set(given)}
        return trainer_class(
            **{"model": str(text_model)} | parts,
            reward_funcs=spread if reward_funcs is None else reward_funcs,
            args=quick(**given),
            train_dataset=[dict(row) for row in TEXTS] if train_dataset is None else train_dataset,
        )

    return make


def spread(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """A reward that differs from completion to completion, whatever the model says."""
    return [float(sum(ids) % 17) for ids in completion_ids]


@pytest.fixture
def run(build: Any, text_model: Path) -> Any:
    """Trains a step by a script: the trainer, its log line, and what its reward function was called with."""

    def make(script: list[list[str]], rows: Any = CHAT, **given: Any) -> tuple[Any, dict[str, Any], dict[str, Any]]:
        model, tokenizer = Scripted.from_pretrained(text_model), load_tokenizer()
        model.script, model.asked = script, []
        tokenizer.chat_template = TEMPLATE
        seen: dict[str, Any] = {}

        def reward(completion_ids: Any, **others: Any) -> list[float]:
            seen.update(others, completion_ids=completion_ids)
            return [float(len(ids)) for ids in completion_ids]

        given = {"per_device_train_batch_size": 2, "max_completion_length": 200, "shuffle_dataset": False} | given
        trainer = build(reward, rows, model=model, processing_class=tokenizer, **given)
        before = parameters(trainer)
        trainer.train()
        assert changed(before, trainer) == set(before)
        return trainer, trainer.state.log_history[0], seen

    return make
