"""Reward models: by name, by folder, as objects, among functions."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from fastgrpo.model.reward_model import BATCH, RewardModel
from fastgrpo.scoring.rewards import resolve_reward_functions


@pytest.fixture(scope="module")
def judge(reward_model: Path) -> RewardModel:
    model = AutoModelForSequenceClassification.from_pretrained(reward_model, num_labels=1)
    return RewardModel(model, AutoTokenizer.from_pretrained(reward_model))


def lone_score(judge: RewardModel, text: str) -> float:
    """What the classifier says of one text, without padding."""
    ids = judge.tokenizer(text, return_tensors="pt", add_special_tokens=False)
    with torch.no_grad():
        return float(judge.model(**ids).logits[0, 0])


def test_a_score_does_not_depend_on_the_batch(judge: RewardModel) -> None:
    prompts = ["a", "Simple is better", "Explicit is", "b"] * 10
    completions = ["b c d e f g", " than", "", " better than implicit is"] * 10
    assert len(prompts) > BATCH
    scores = judge(prompts, completions)
    for i in range(4):
        assert scores[i] == pytest.approx(lone_score(judge, prompts[i] + completions[i]), abs=1e-5)
    assert scores[:4] == pytest.approx(scores[36:], abs=1e-5)


def test_a_conversation_is_read_by_the_judges_own_template(judge: RewardModel) -> None:
    prompt, completion = [{"role": "user", "content": "Hi"}], [{"role": "assistant", "content": "Ho"}]
    text = judge.tokenizer.apply_chat_template([*prompt, *completion], tokenize=False)
    assert judge([prompt], [completion]) == [pytest.approx(lone_score(judge, text), abs=1e-5)]


def test_padding_is_what_the_classifier_takes_for_padding(reward_model: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(reward_model, num_labels=1)
    tokenizer = AutoTokenizer.from_pretrained(reward_model)
    tokenizer.pad_token = "<|vision_pad|>"
    judge = RewardModel(model, tokenizer)
    assert model.config.pad_token_id == tokenizer.pad_token_id
    assert judge(["a", "a b c"], ["", ""])[0] == pytest.approx(lone_score(judge, "a"), abs=1e-5)


def test_without_a_padding_token_the_end_token_pads(reward_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(reward_model)
    tokenizer.pad_token = None
    RewardModel(AutoModelForSequenceClassification.from_pretrained(reward_model, num_labels=1), tokenizer)
    assert tokenizer.pad_token == tokenizer.eos_token


def test_a_reward_model_is_frozen(judge: RewardModel) -> None:
    assert not judge.model.training
    assert not any(parameter.requires_grad for parameter in judge.model.parameters())


def test_a_folder_names_a_reward_model(build: Any, reward_model: Path) -> None:
    trainer = build(reward_funcs=str(reward_model))
    trainer.train()
    line = trainer.state.log_history[0]
    assert {"rewards/tiny-judge/mean", "rewards/tiny-judge/std", "reward"} <= set(line)
    assert line["reward"] == pytest.approx(line["rewards/tiny-judge/mean"])


def test_a_model_object_is_a_reward(build: Any, reward_model: Path, chats: list[Any]) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(reward_model, num_labels=1)
    trainer = build(reward_funcs=model, train_dataset=chats)
    trainer.train()
    assert trainer.reward_funcs == [model]
    assert trainer.state.log_history[0]["rewards/tiny-judge/mean"] != 0


def test_functions_and_models_may_be_mixed(build: Any, reward_model: Path) -> None:
    def constant(completions: list[str], **_: Any) -> list[float]:
        return [2.0] * len(completions)

    trainer = build(reward_funcs=[constant, str(reward_model), "length"], reward_weights=[1.0, 2.0, 0.0])
    trainer.train()
    line = trainer.state.log_history[0]
    assert line["reward"] == pytest.approx(2.0 + 2 * line["rewards/tiny-judge/mean"], abs=1e-5)
    assert trainer.reward_func_names == ["constant", "tiny-judge", "token_length"]


def test_two_models_have_their_own_tokenizers(build: Any, reward_model: Path, other_reward_model: Path) -> None:
    given = [AutoTokenizer.from_pretrained(reward_model), AutoTokenizer.from_pretrained(other_reward_model)]
    trainer = build(reward_funcs=[str(reward_model), str(other_reward_model)], reward_processing_classes=given)
    assert trainer.reward_processing_classes == given


def test_one_tokenizer_serves_one_model(build: Any, reward_model: Path, tokenizer: Any) -> None:
    trainer = build(reward_funcs=str(reward_model), reward_processing_classes=tokenizer)
    assert len(trainer.reward_processing_classes) == 1
    assert trainer.reward_processing_classes[0] is tokenizer


def test_as_many_tokenizers_as_rewards(build: Any, reward_model: Path, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=r"reward_processing_classes.*must match"):
        build(reward_funcs=[str(reward_model), str(reward_model)], reward_processing_classes=tokenizer)


def test_a_functions_tokenizer_is_none(build: Any, reward_model: Path) -> None:
    trainer = build(reward_funcs=["length", str(reward_model)], reward_processing_classes=[None, None])
    assert trainer.reward_processing_classes[0] is None
    assert trainer.reward_processing_classes[1].pad_token_id is not None


def test_a_model_that_cannot_be_loaded_is_named(build: Any, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"reward_funcs: .*empty.* cannot be loaded as a reward model"):
        build(reward_funcs=str(tmp_path / "empty"))


def test_names_of_functions_paths_and_models_are_told_apart(reward_model: Path) -> None:
    names = ["accuracy", "think_format_reward", "os.path:basename", "os.path.basename", str(reward_model), "org/judge"]
    resolved = resolve_reward_functions(names)
    assert [isinstance(one, str) for one in resolved] == [False, False, False, False, True, True]


def test_something_that_is_no_reward_is_refused(build: Any) -> None:
    with pytest.raises(ValueError, match=r"reward_funcs: 3 is a int"):
        build(reward_funcs=[3])
