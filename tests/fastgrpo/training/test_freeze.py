"""Frozen parts stay as they are, on both engines, and say so when nothing is left to train."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from fastgrpo.config import GRPOConfig
from fastgrpo.model.load import load_policy
from fastgrpo.training.trainer import GRPOTrainer


def token_sum(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [float(sum(ids) % 7) for ids in completion_ids]


def rows(pictures: bool) -> list[dict[str, Any]]:
    picture = Image.new("RGB", (56, 84), "red") if pictures else None
    return [{"prompt": [{"role": "user", "content": f"What is {i}?"}], "image": picture} for i in range(4)]


def train(model: Any, out: Path, engine: str, *, pictures: bool = True) -> set[str]:
    """The names of the parameters that two steps have moved."""
    config = GRPOConfig(
        output_dir=str(out), use_cpu=True, report_to=[], save_strategy="no", max_steps=2, num_generations=4,
        per_device_train_batch_size=8, max_completion_length=4, learning_rate=0.1, disable_tqdm=True, beta=0.04,
        engine=engine,
    )  # fmt: skip
    before = whole(model)
    trainer = GRPOTrainer(model, token_sum, config, rows(pictures), processing_class=None)
    trainer.train()
    return {name for name, value in whole(trainer.model).items() if not torch.equal(value, before[name])}


def whole(model: Any) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def part_of(name: str) -> str:
    if "merger" in name:
        return "merger"
    return "tower" if ".visual." in name else "language"


@pytest.mark.parametrize("engine", ["fast", "plain"])
@pytest.mark.parametrize(
    ("freeze_vision", "freeze_llm", "trained"),
    [(True, False, {"language", "merger"}), (False, True, {"tower", "merger"}), (True, True, {"merger"})],
)
def test_frozen_parts_stay(
    tiny_model_dir: Path, tmp_path: Path, engine: str, freeze_vision: bool, freeze_llm: bool, trained: set[str]
) -> None:
    model = load_policy(str(tiny_model_dir), freeze_vision=freeze_vision, freeze_llm=freeze_llm)
    names = {name for name, _ in model.named_parameters()}
    assert train(model, tmp_path, engine) == {name for name in names if part_of(name) in trained}


@pytest.mark.parametrize("engine", ["fast", "plain"])
def test_a_step_of_text_alone_moves_nothing_of_the_vision_tower(
    tiny_model_dir: Path, tmp_path: Path, engine: str
) -> None:
    model = load_policy(str(tiny_model_dir), freeze_llm=True)
    assert train(model, tmp_path, engine, pictures=False) == set()


def test_a_model_without_anything_to_train_is_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    model = load_policy(str(tiny_model_dir)).requires_grad_(False)
    with pytest.raises(ValueError, match=r"nothing to train: every parameter of Qwen2VL.* is frozen"):
        train(model, tmp_path, "fast")
