import json

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration

from fastgrpo.data.prompts import BASE_PROMPT, PromptBuilder
from fastgrpo.demo.base_model import BASE_MODEL_PATH, PHRASES, SPECIAL_TOKENS, load_tokenizer, save_tiny_model
from fastgrpo.demo.corpus import completion, description
from fastgrpo.demo.documents import DEMO_KINDS, Examples, make_batch, pixel_values
from fastgrpo.demo.pretrain import LABEL_SIZES, image_token_labels
from fastgrpo.demo.scenes import SyntheticScenes, scene_question
from fastgrpo.model.load import load_processing
from fastgrpo.scoring.tagged import tagged_accuracy, tagged_format


@pytest.fixture(scope="module")
def processing():
    return load_processing(str(BASE_MODEL_PATH))


@pytest.fixture(scope="module")
def builder(processing):
    return PromptBuilder(processing.tokenizer, processing.image_processor)


def test_base_folder_is_small_and_complete():
    files = {file.name: file.stat().st_size for file in BASE_MODEL_PATH.iterdir()}
    assert sum(files.values()) <= 8 * 2**20
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= set(files)
    assert {"preprocessor_config.json", "generation_config.json"} <= set(files)
    config = json.loads((BASE_MODEL_PATH / "config.json").read_text())
    assert config["architectures"] == ["Qwen2VLForConditionalGeneration"]


def test_base_loads_offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = Qwen2VLForConditionalGeneration.from_pretrained(BASE_MODEL_PATH)
    assert sum(p.numel() for p in model.parameters()) < 2_000_000
    assert model.config.image_token_id == load_tokenizer().convert_tokens_to_ids("<|image_pad|>")


def test_tokenizer_round_trips_and_keeps_special_tokens_whole(processing):
    texts = ["i guess it is left. </think> <answer>left</answer>", "Ünïcödé 漢字\n\t 🙂  1234", BASE_PROMPT]
    for tokenizer in (processing.tokenizer, AutoTokenizer.from_pretrained(BASE_MODEL_PATH), load_tokenizer()):
        for text in texts:
            assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
        for token in (*SPECIAL_TOKENS, *PHRASES):
            assert len(tokenizer(token)["input_ids"]) == 1
        assert tokenizer.eos_token == tokenizer.pad_token == "<|endoftext|>"
    assert (
        processing.tokenizer.decode(
            processing.tokenizer("<think>a</think><|im_end|>")["input_ids"], skip_special_tokens=True
        )
        == "<think>a</think>"
    )


def test_prompts_and_completions_are_short(builder, processing):
    rng = np.random.default_rng(0)
    for index in range(40):
        example = Examples(0, 40, builder)[index]
        assert len(example.input_ids) <= 100
        text = completion(example.question, rng, careful=1.0)
        assert len(processing.tokenizer(text)["input_ids"]) < 48


def test_careful_completions_earn_the_reward_and_guesses_are_chance():
    rng = np.random.default_rng(0)
    for seed in range(60):
        question = scene_question(seed, 0, kinds=DEMO_KINDS)
        gold = {"solution": [question.answer], "choices": [list(question.choices)]}
        text = completion(question, rng, careful=1.0)
        assert tagged_accuracy(["<think>"], [text], **gold) == [1.0]
        assert tagged_format(["<think>"], [text]) == [1.0]
    guesses = [scene_question(1, index, kinds=("depth",)) for index in range(3000)]
    texts = [completion(question, rng, careful=0.0) for question in guesses]
    tagged = [(q, t) for q, t in zip(guesses, texts, strict=True) if "<answer>" in t]
    right = np.mean([f"<answer>{q.answer}</answer>" in t for q, t in tagged])
    assert 0.35 < len(tagged) / len(texts) < 0.55
    assert abs(right - 0.5) < 0.06


def test_description_states_places():
    question = scene_question(0, 1, kinds=("left_right",))
    text = description(question, np.random.default_rng(0))
    for thing in question.objects:
        assert text.count(f" {thing.colour} ") == 2


def test_batches_learn_what_stands_behind_the_prompt(builder, processing):
    examples = [Examples(0, 4, builder)[index] for index in range(4)]
    tokenizer = processing.tokenizer
    for careful in (None, 0.5):
        batch = make_batch(examples, tokenizer, np.random.default_rng(0), careful)
        for row, example in enumerate(examples):
            learnt = batch.labels[row] != -100
            start = int(learnt.nonzero()[0])
            assert torch.equal(batch.labels[row][learnt], batch.input_ids[row][learnt])
            assert torch.equal(batch.input_ids[row, :start], example.input_ids[:start])
            assert batch.labels[row][learnt][-1] == tokenizer.eos_token_id
            steps = batch.position_ids[:, row, start:][:, learnt[start:]].diff(dim=-1)
            assert (steps == 1).all()
    labels = image_token_labels(examples)
    assert len(labels) == sum(len(example.patches) for example in examples) // 4
    assert (labels < torch.tensor(LABEL_SIZES)).all()
    assert pixel_values(examples[:1]).shape == (len(examples[0].patches), 1176)


def test_base_answers_a_question_in_words(builder, processing):
    """Loose, since it only guards the shipped weights: greedy text ends by itself and holds an option."""
    model = Qwen2VLForConditionalGeneration.from_pretrained(BASE_MODEL_PATH).eval()
    tokenizer = processing.tokenizer
    for index in range(3):
        example = Examples(7, 4, builder)[index]
        input_ids = example.input_ids[None]
        output = model.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            mm_token_type_ids=(input_ids == model.config.image_token_id).int(),
            pixel_values=pixel_values([example]),
            image_grid_thw=example.grid,
            max_new_tokens=48,
            do_sample=False,
        )[0, input_ids.shape[1] :]
        assert output[-1] == tokenizer.eos_token_id
        text = tokenizer.decode(output, skip_special_tokens=True)
        assert any(choice in text for choice in example.question.choices), text


def test_tiny_model_is_seeded_and_reloads(tmp_path):
    first = Qwen2VLForConditionalGeneration.from_pretrained(save_tiny_model(tmp_path / "a", seed=1))
    again = Qwen2VLForConditionalGeneration.from_pretrained(save_tiny_model(tmp_path / "b", seed=1))
    other = Qwen2VLForConditionalGeneration.from_pretrained(save_tiny_model(tmp_path / "c", seed=2))
    for (name, weight), same, different in zip(
        first.named_parameters(), again.parameters(), other.parameters(), strict=True
    ):
        assert torch.equal(weight, same), name
        if weight.std() > 0:
            assert not torch.equal(weight, different), name
    assert load_processing(str(tmp_path / "a")).image_processor is not None


def test_demo_rows_are_asked_of_the_demo_kinds():
    assert {row["question_type"] for row in (SyntheticScenes(0, kinds=DEMO_KINDS)[i] for i in range(40))} == set(
        DEMO_KINDS
    )
