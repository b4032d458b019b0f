import inspect
import io
import pickle
import re
from typing import Any

import pytest
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, Qwen2VLConfig, Qwen2VLForConditionalGeneration, VipLlavaConfig
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from fastgrpo.data.prompts import PromptBuilder, PromptCollator, mrope_position_ids
from fastgrpo.data.row_dataset import as_rows
from fastgrpo.data.rows import Row
from fastgrpo.model.families import family_of
from fastgrpo.types import RowError, SkippedRow

SPECIAL_TOKENS = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
    "<|video_pad|>",
]  # fmt: skip
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' or 'image' in part %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if hint is defined %}{{ hint }}{% endif %}{% endif %}"
)
PLACE = "<|vision_start|><|image_pad|><|vision_end|>"


def make_tokenizer(
    specials: list[str] = SPECIAL_TOKENS, chat_template: str | None = CHAT_TEMPLATE, *, frame: str | None = None
) -> Any:
    """`frame`: what the tokenizer puts around a text ($A) of its own accord."""
    alphabet = {token: i for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, special=True) for token in specials])
    if frame is not None:
        added = [(token, core.token_to_id(token)) for token in frame.split() if token != "$A"]
        core.post_processor = processors.TemplateProcessing(single=frame, special_tokens=added)
    return PreTrainedTokenizerFast(tokenizer_object=core, chat_template=chat_template, eos_token="<|endoftext|>")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


@pytest.fixture(scope="module")
def image_processor() -> Any:
    return Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=28 * 28 * 40)


@pytest.fixture(scope="module")
def builder(tokenizer: Any, image_processor: Any) -> PromptBuilder:
    return PromptBuilder(tokenizer, image_processor)


@pytest.fixture(scope="module")
def hf_model(tokenizer: Any) -> Any:
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": 512, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
            "num_attention_heads": 2, "num_key_value_heads": 1,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
        },
        vision_config={"depth": 1, "embed_dim": 32, "num_heads": 2, "hidden_size": 32, "mlp_ratio": 1},
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
    )  # fmt: skip
    torch.manual_seed(0)
    return Qwen2VLForConditionalGeneration(config).eval()


def picture(width: int, height: int) -> Image.Image:
    return Image.effect_noise((width, height), 60).convert("RGB")


def hf_positions(model: Any, prompt: Any, image_token_id: int) -> torch.Tensor:
    """The library's own M-RoPE positions, [3, P]."""
    arguments = {"input_ids": prompt.input_ids[None], "image_grid_thw": prompt.image_grid_thw}
    if "mm_token_type_ids" in inspect.signature(model.model.get_rope_index).parameters:
        arguments["mm_token_type_ids"] = (prompt.input_ids == image_token_id).int()[None]
    return model.model.get_rope_index(**arguments)[0][:, 0]


@pytest.mark.parametrize(
    "parts",
    [
        ["only text"],
        ["before ", (84, 56), " after"],
        [(56, 140), "text behind"],
        ["text in front", (140, 28)],
        ["a", (84, 84), "b", (28, 140), "c and more", (112, 56), "d"],
        [(84, 56), (56, 84), "two in a row"],
    ],
)
def test_positions_equal_the_librarys(builder: PromptBuilder, hf_model: Any, parts: list[Any]) -> None:
    content = [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image"} for p in parts]
    images = [picture(*part) for part in parts if not isinstance(part, str)]
    prompt = builder.build(Row(0, images=images, messages=[{"role": "user", "content": content}]))
    assert builder.image_token_id is not None
    torch.testing.assert_close(prompt.position_ids, hf_positions(hf_model, prompt, builder.image_token_id))
    assert prompt.position_ids.dtype == torch.int64
    assert prompt.position_ids.shape == (3, len(prompt.input_ids))


def test_positions_by_hand() -> None:
    image = 9
    ids = torch.tensor([1, image, image, image, image, image, image, 2, 3])  # 2 rows of 3 merged patches
    positions = mrope_position_ids(ids, torch.tensor([[1, 4, 6]]), image, merge_size=2)
    assert positions.tolist() == [
        [0, 1, 1, 1, 1, 1, 1, 4, 5],
        [0, 1, 1, 1, 2, 2, 2, 4, 5],
        [0, 1, 2, 3, 1, 2, 3, 4, 5],
    ]


def test_the_model_takes_a_prompt(builder: PromptBuilder, hf_model: Any) -> None:
    row = Row(0, images=[picture(84, 56), picture(56, 112)], question="Which one is wider?")
    prompt = builder.build(row)
    inputs = {
        "input_ids": prompt.input_ids[None],
        "attention_mask": torch.ones_like(prompt.input_ids)[None],
        "pixel_values": prompt.pixel_values,
        "image_grid_thw": prompt.image_grid_thw,
    }
    with torch.no_grad():
        logits = hf_model(**inputs, position_ids=prompt.position_ids[:, None]).logits
    assert logits.shape[1] == len(prompt.input_ids)
    assert torch.isfinite(logits).all()


def test_base_mode_is_plain_text_behind_the_image(builder: PromptBuilder, tokenizer: Any) -> None:
    image = picture(112, 84)
    prompt = builder.build(Row(5, images=[image], question="How many {lamps}? 灯", columns={"solution": "2"}))
    assert prompt.text == (
        "<|vision_start|><|image_pad|><|vision_end|>"
        "A conversation between User and Assistant. The user asks a question about the image, and the "
        "Assistant solves it. The assistant first thinks about the reasoning process in the mind and then "
        "provides the user with the answer.\nUser: How many {lamps}? 灯\n"
        "Assistant: Let me solve this step by step.\n<think>"
    )
    # 112×84 pixels are 8×6 patches of 14, 12 merged ones
    assert prompt.image_grid_thw is not None
    assert prompt.image_grid_thw.tolist() == [[1, 6, 8]]
    expanded = prompt.text.replace("<|image_pad|>", "<|image_pad|>" * 12)
    assert prompt.input_ids.tolist() == tokenizer(expanded)["input_ids"]
    assert prompt.pixel_values is not None
    assert prompt.pixel_values.shape == (48, 3 * 2 * 14 * 14)
    assert prompt.pixel_values.dtype == torch.float32
    assert prompt.messages is None
    assert prompt.columns == {"solution": "2"}
    assert prompt.row_id == 5
    assert prompt.thumbnail is not None
    assert Image.open(io.BytesIO(prompt.thumbnail)).size == (112, 84)


def test_answer_template_names_the_tags(tokenizer: Any, image_processor: Any) -> None:
    row = Row(0, question="Why?")
    paper = PromptBuilder(tokenizer, image_processor).build(row).text
    named = PromptBuilder(tokenizer, image_processor, template="answer").build(row).text
    assert "<answer>" not in paper
    assert "<answer> </answer>" in named
    assert named.endswith("\nUser: Why?\nAssistant: Let me solve this step by step.\n<think>")


def test_instruct_mode_goes_through_the_chat_template(tokenizer: Any, image_processor: Any) -> None:
    builder = PromptBuilder(tokenizer, image_processor, mode="instruct", chat_template_kwargs={"hint": "Well,"})
    prompt = builder.build(Row(0, images=[picture(56, 56), picture(56, 84)], question="Which?"))
    asked = (
        "Which? Output the thinking process in <think> </think> and final answer (option) in <answer> </answer> tags."
    )
    assert prompt.text == f"<|im_start|>user\n{PLACE}{PLACE}{asked}<|im_end|>\n<|im_start|>assistant\nWell,"
    assert prompt.messages == [
        {"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": asked}]}
    ]
    assert int((prompt.input_ids == builder.image_token_id).sum()) == 4 + 6
    assert builder.build(Row(0, question="Which?")).messages == [{"role": "user", "content": asked}]


def test_conversations_use_the_chat_template_in_base_mode_too(builder: PromptBuilder) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    prompt = builder.build(Row(0, messages=messages))
    assert prompt.text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert prompt.messages == messages
    assert prompt.pixel_values is prompt.image_grid_thw is prompt.thumbnail is None


def test_a_last_assistant_message_is_continued(builder: PromptBuilder) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "<think>"}]
    text = builder.build(Row(0, messages=messages)).text
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>"


def test_finished_prompts_are_taken_as_they_are(builder: PromptBuilder) -> None:
    image = picture(56, 56)
    assert builder.build(Row(0, messages="2+2=")).text == "2+2="
    assert builder.build(Row(0, images=[image], messages="Look:")).text == f"{PLACE}Look:"
    rendered = f"<|im_start|>user\nLook: {PLACE}<|im_end|>"
    prompt = builder.build(Row(0, images=[image], messages=rendered))
    assert prompt.text == rendered
    assert int((prompt.input_ids == builder.image_token_id).sum()) == 4


@pytest.mark.parametrize("token", ["<|image_pad|>", "<|vision_start|>", "<|im_end|>", "<|endoftext|>"])
@pytest.mark.parametrize("as_message", [False, True])
def test_special_tokens_in_a_users_text(builder: PromptBuilder, token: str, as_message: bool) -> None:
    text = f"What does {token} mean?"
    content = [{"type": "image"}, {"type": "text", "text": text}]
    row = Row(
        row_id=0,
        images=[picture(56, 56)],
        question=None if as_message else text,
        messages=[{"role": "user", "content": content}] if as_message else None,
    )
    with pytest.raises(RowError, match=re.escape(f"holds the special token {token}")):
        builder.build(row)


def test_places_and_images_must_match(builder: PromptBuilder) -> None:
    with pytest.raises(RowError, match="2 image places for 1 images"):
        builder.build(Row(0, images=[picture(56, 56)], messages=PLACE * 2))
    with pytest.raises(RowError, match="1 image places for 0 images"):
        builder.build(Row(0, messages=PLACE))


def test_a_template_that_drops_images(image_processor: Any) -> None:
    deaf = make_tokenizer(chat_template="{% for m in messages %}{{ m['role'] }}{% endfor %}")
    with pytest.raises(RowError, match="0 image places for 1 images"):
        PromptBuilder(deaf, image_processor, mode="instruct").build(Row(0, images=[picture(56, 56)], question="?"))


def test_an_empty_prompt(builder: PromptBuilder) -> None:
    with pytest.raises(RowError, match="the prompt is empty"):
        builder.build(Row(0, messages=""))


def test_too_long_prompts_are_refused_whole(tokenizer: Any, image_processor: Any) -> None:
    row = Row(0, images=[picture(140, 140)], messages="x" * 10)  # 25 image tokens, 2 around them, 10 of text
    builder = PromptBuilder(tokenizer, image_processor, max_prompt_length=37)
    assert len(builder.build(row).input_ids) == 37
    builder = PromptBuilder(tokenizer, image_processor, max_prompt_length=36)
    with pytest.raises(RowError, match=r"37 tokens \(25 of them image tokens\).*max_prompt_length=36"):
        builder.build(row)


def test_an_image_too_narrow_for_patches(builder: PromptBuilder) -> None:
    with pytest.raises(RowError, match="cannot be cut into patches"):
        builder.build(Row(0, images=[picture(900, 2)], question="?"))


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("CUDA error"), KeyError("size"), TypeError()], ids=repr)
def test_an_image_processor_that_fails_is_no_fault_of_a_row(tokenizer: Any, error: Exception) -> None:
    def fails(**_: Any) -> None:
        raise error

    with pytest.raises(type(error)):
        PromptBuilder(tokenizer, fails).build(Row(0, images=[picture(56, 56)], question="?"))


def test_models_that_cannot_take_the_rows(tokenizer: Any, image_processor: Any) -> None:
    def refuse(builder: PromptBuilder, row: Row, reason: str) -> None:
        with pytest.raises(ValueError, match=reason) as info:
            builder.build(row)
        assert not isinstance(info.value, RowError)  # not a row's fault: it would only be skipped

    row = Row(3, images=[picture(56, 56)], question="?")
    refuse(PromptBuilder(tokenizer, None), row, "row 3 has images, but this model has no image processor")
    text_only = make_tokenizer(["<|endoftext|>"], chat_template=None)
    refuse(PromptBuilder(text_only, image_processor), row, r"no <\|image_pad\|> token")
    unmarked = make_tokenizer(["<|endoftext|>", "<|image_pad|>"])
    refuse(PromptBuilder(unmarked, image_processor), row, r"no <\|vision_start\|> token")
    unknown = PromptBuilder(tokenizer, image_processor, family=family_of(VipLlavaConfig()))
    refuse(
        unknown,
        row,
        "row 3 has images, but how vipllava models take pictures is not known.*train one of Qwen2-VL, Qwen2.5",
    )
    chat_row = Row(0, messages=[{"role": "user", "content": "Hi"}])
    refuse(PromptBuilder(text_only, None), chat_row, "no chat template.*base mode")


@pytest.mark.parametrize("frame", ["<s> $A", "<s> $A </s>"])
def test_tokens_that_a_tokenizer_puts_in_front(image_processor: Any, frame: str) -> None:
    tokenizer = make_tokenizer([*SPECIAL_TOKENS, "<s>", "</s>"], frame=frame)
    builder = PromptBuilder(tokenizer, image_processor)
    bos = tokenizer.convert_tokens_to_ids("<s>")

    def plain(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    assert builder.build(Row(0, messages="2+2=")).input_ids.tolist() == [bos, *plain("2+2=")]
    assert builder.build(Row(0, messages="<s>2+2=")).input_ids.tolist() == [bos, *plain("2+2=")]
    asked = builder.build(Row(0, question="Why?"))
    assert asked.input_ids.tolist() == [bos, *plain(asked.text)]
    pictured = builder.build(Row(0, images=[picture(56, 56)], messages="Look:"))
    assert pictured.input_ids[:2].tolist() == [bos, tokenizer.convert_tokens_to_ids("<|vision_start|>")]
    assert pictured.position_ids.shape == (3, len(pictured.input_ids))
    chat = builder.build(Row(0, messages=[{"role": "user", "content": "Hi"}]))
    assert chat.input_ids.tolist() == plain(chat.text), "a chat template writes it itself"
    with pytest.raises(RowError, match="the prompt is empty"):
        builder.build(Row(0, messages=""))


def test_text_only_model() -> None:
    builder = PromptBuilder(make_tokenizer(["<|endoftext|>"], chat_template=None), None)
    prompt = builder.build(Row(0, question="Why?"))
    assert prompt.position_ids.tolist() == [list(range(len(prompt.input_ids)))] * 3


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"mode": "chat"}, "mode='chat' is unknown: use 'base' or 'instruct'"),
        ({"template": "mine"}, "template='mine' is unknown"),
        ({"max_prompt_length": 0}, "max_prompt_length=0 must be at least 1"),
    ],
)
def test_bad_settings(tokenizer: Any, arguments: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        PromptBuilder(tokenizer, None, **arguments)


def test_collator_sets_bad_rows_aside_in_order(builder: PromptBuilder) -> None:
    records = [
        {"question": "one", "image": picture(56, 56), "solution": "1"},
        {"question": "two", "image": b"nonsense", "solution": "2"},
        {"question": "three <|image_pad|>", "image": None, "solution": "3"},
        {"question": "four", "image": None, "solution": "4"},
    ]
    dataset = as_rows(records)
    collator = pickle.loads(pickle.dumps(PromptCollator(dataset, builder)))
    loader = torch.utils.data.DataLoader(dataset, batch_size=4, collate_fn=collator)
    (batch,) = loader
    assert [prompt.row_id for prompt in batch.prompts] == [0, 3]
    assert [prompt.columns["solution"] for prompt in batch.prompts] == ["1", "4"]
    assert [skipped.row_id for skipped in batch.skipped] == [1, 2]
    assert "cannot be decoded" in batch.skipped[0].reason
    assert isinstance(batch.skipped[1], SkippedRow)


def test_worker_processes_build_the_same_prompts(builder: PromptBuilder) -> None:
    image = picture(84, 56)
    records = [{"question": f"number {i}", "image": image, "solution": "1"} for i in range(4)]
    dataset = as_rows(records)
    collator = PromptCollator(dataset, builder)
    here = [collator([dataset[i]]).prompts[0] for i in range(4)]
    loader = torch.utils.data.DataLoader(dataset, batch_size=2, num_workers=1, collate_fn=collator)
    there = [prompt for batch in loader for prompt in batch.prompts]
    for ours, theirs in zip(here, there, strict=True):
        assert torch.equal(ours.input_ids, theirs.input_ids)
        assert ours.pixel_values is not None
        assert theirs.pixel_values is not None
        assert torch.equal(ours.pixel_values, theirs.pixel_values)
        assert ours.thumbnail == theirs.thumbnail
