"""Supervised fine-tuning's loss and gradients against those that transformers works out from labels."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from plain_forward import hf_inputs
from torch import Tensor
from transformers import GptOssConfig, GptOssForCausalLM, Qwen2Config, Qwen2ForCausalLM

from fastgrpo.data.examples import ExampleBuilder
from fastgrpo.data.prompts import PromptBuilder
from fastgrpo.data.rows import Row
from fastgrpo.model.load import load_policy, load_processing
from fastgrpo.plain.supervised import PlainSupervisedUpdater
from fastgrpo.types import Example, Prompt
from fastgrpo.update.supervised import SupervisedUpdater

EVERYTHING = 10**6
"""A budget that no batch exceeds."""
ROWS = [
    Row(0, [Image.new("RGB", (112, 84), "red")], "How many cubes are there?", columns={"solution": "three"}),
    Row(1, [], "Is two more than one?", columns={"solution": "yes"}),
    Row(2, [Image.new("RGB", (56, 56), c) for c in ("blue", "white")], "Which is darker?", columns={"solution": "(A)"}),
]


@pytest.fixture(scope="module", params=["answers alone", "prompts too"])
def examples(request: pytest.FixtureRequest, tiny_model_dir: Path) -> list[Example]:
    """With one picture, without, with two."""
    processing = load_processing(str(tiny_model_dir))
    prompts = PromptBuilder(processing.tokenizer, processing.image_processor, mode="instruct", template="direct")
    builder = ExampleBuilder(prompts, train_on_prompt=request.param == "prompts too")
    return [builder.build(row) for row in ROWS]


def sharpened(model: Any) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
    return model


@pytest.fixture
def model(tiny_model_dir: Path) -> Any:
    return sharpened(load_policy(str(tiny_model_dir)))


def text_examples() -> list[Example]:
    draw = torch.Generator().manual_seed(0)
    found = []
    for row, length in enumerate((9, 4, 14)):
        ids = torch.randint(3, 90, (length,), generator=draw)
        prompt = Prompt(row, ids[:-1], torch.arange(length - 1).expand(3, -1), None, None, "")
        rows = torch.arange(length // 2, length - 1)
        found.append(Example(prompt, rows, ids[rows + 1]))
    return found


def theirs(model: Any, examples: Sequence[Example]) -> Tensor:
    """transformers' own loss of each example, weighted to the mean over all targets; leaves its gradients."""
    total = sum(len(example.targets) for example in examples)
    losses = []
    for example in examples:
        prompt, last = example.prompt, example.targets[-1:]
        ids = torch.cat([prompt.input_ids, last])
        labels = torch.full_like(ids, -100)
        labels[example.rows + 1] = example.targets
        loss = model(**hf_inputs(model, prompt, last), labels=labels[None]).loss * len(example.targets) / total
        loss.backward()
        losses.append(loss.detach())
    return torch.stack(losses).sum()


def gradients(model: Any) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(model: Any, updater: Any, examples: list[Example]) -> None:
    expected = theirs(model, examples)
    wanted = gradients(model)
    model.zero_grad()
    total = sum(len(example.targets) for example in examples)
    loss, entropy = updater.accumulate(examples, total)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    found = gradients(model)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert (found[name] - value).norm() <= 1e-4 * value.norm() + 1e-7, name
    summed = updater.loss(examples)
    assert (summed / total).tolist() == pytest.approx([loss.item(), entropy.item()], rel=1e-5)


@pytest.mark.parametrize("budget", [1, 70, EVERYTHING])
def test_loss_and_gradients_are_those_of_transformers_however_packed(
    model: Any, examples: list[Example], budget: int
) -> None:
    assert_same(model, SupervisedUpdater(model, token_budget=budget), examples)


def test_plain_too(model: Any, examples: list[Example]) -> None:
    assert_same(model, PlainSupervisedUpdater(model), examples)


TEXT = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


def test_a_text_model() -> None:
    torch.manual_seed(0)
    model = sharpened(Qwen2ForCausalLM(Qwen2Config(**TEXT)))
    assert_same(model, SupervisedUpdater(model, token_budget=20), text_examples())


def test_a_model_that_cannot_be_packed_takes_the_plain_path() -> None:
    torch.manual_seed(0)
    model = GptOssForCausalLM(GptOssConfig(**TEXT, head_dim=8, num_local_experts=2, num_experts_per_tok=1))
    with pytest.raises(ValueError, match="attention sinks"):
        SupervisedUpdater(model, token_budget=20)
    model.config._attn_implementation = "eager"
    assert_same(model, PlainSupervisedUpdater(model), text_examples())
