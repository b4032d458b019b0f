"""Tools and environments: what is asked, what is answered, what is trained on."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from run_files import changed, parameters
from scripted_turns import CHAT, END, TEMPLATE, call
from transformers import GenerationConfig, Qwen2ForCausalLM, Qwen2VLForConditionalGeneration

from fastgrpo.demo.base_model import load_tokenizer
from fastgrpo.model.load import load_processing
from fastgrpo.training.tools import read_turn

Run = Callable[..., tuple[Any, dict[str, Any], dict[str, Any]]]


def asking(tool: Any, **arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": tool.__name__, "arguments": arguments}}


def times(a: int, b: int) -> int:
    """
    Multiplies.

    Args:
        a: One factor.
        b: The other.
    """
    return a * b


async def later(a: int, b: int) -> int:
    """
    Multiplies, not at once.

    Args:
        a: One factor.
        b: The other.
    """
    if b == 0:
        raise ValueError("no zero")
    return a * b


def test_what_a_tool_answers_is_read_and_not_trained_on(run: Run) -> None:
    trainer, line, seen = run([["So " + call("times", a=3, b=4), "I do not know."], ["It is 12."]], tools=[times])
    conversation = [
        *CHAT[0]["prompt"],
        {"role": "assistant", "content": "So ", "tool_calls": [asking(times, a=3, b=4)]},
        {"role": "tool", "content": "12"},
    ]  # fmt: skip
    rendered = [
        trainer.processing_class.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, tools=[times])
        for turns in (conversation[:1], conversation)
    ]
    assert trainer.model.asked == [[rendered[0]] * 2, [rendered[1]]]
    assert [turn["role"] for turn in seen["completions"][0]] == ["assistant", "tool", "assistant"]
    assert seen["completions"][0][2] == {"role": "assistant", "content": "It is 12."}
    assert seen["completions"][1] == [{"role": "assistant", "content": "I do not know."}]
    whole = rendered[1].removeprefix(rendered[0]) + "It is 12." + END
    ids = trainer.processing_class
    assert ids.decode(seen["completion_ids"][0]) == whole
    own = len(ids("So " + call("times", a=3, b=4) + END)["input_ids"]) + len(ids("It is 12." + END)["input_ids"])
    assert line["completions/max_length"] == own < len(seen["completion_ids"][0])
    assert line["completions/clipped_ratio"] == 0
    assert (line["tools/call_frequency"], line["tools/failure_frequency"]) == (0.5, 0)


@pytest.mark.parametrize(
    ("said", "answer"),
    [
        (call("times", a=3, c=4), "unexpected keyword argument 'c'"),
        (call("plus", a=3, b=4), "Tool plus not found."),
        (call("later", a=3, b=0), "no zero"),
    ],
)
def test_a_call_that_fails_is_answered_by_why(run: Run, said: str, answer: str) -> None:
    _, line, seen = run([[said, "No."], ["Oh."]], tools=[times, later])
    assert answer in seen["completions"][0][1]["content"]
    assert line["tools/failure_frequency"] == 1


def test_several_calls_of_a_turn_and_asynchronous_ones(run: Run) -> None:
    _, line, seen = run([[call("later", a=2, b=3) + call("times", a=3, b=4), "No."], ["Oh."]], tools=[times, later])
    assert [turn["content"] for turn in seen["completions"][0][1:3]] == ["6", "12"]
    assert line["tools/call_frequency"] == 1


def test_tools_are_called_turn_after_turn(run: Run) -> None:
    again = call("times", a=1, b=1)
    _, _, seen = run([[again, "No."], [again], ["Done."]], tools=[times])
    assert [turn["role"] for turn in seen["completions"][0]] == ["assistant", "tool"] * 2 + ["assistant"]


def test_turns_with_tools_are_bounded(run: Run) -> None:
    again = call("times", a=1, b=1)
    _, _, seen = run([[again, "No."], [again]], tools=[times], max_tool_calling_iterations=1)
    assert [turn["role"] for turn in seen["completions"][0]] == ["assistant", "tool", "assistant"]


def test_an_answer_without_room_is_left_out(run: Run) -> None:
    def long(n: int) -> str:
        """
        Says much.

        Args:
            n: How much.
        """
        return "much " * n

    _, line, seen = run([[call("long", n=300), "No."]], tools=[long])
    assert len(seen["completions"][0]) == 1
    assert line["completions/clipped_ratio"] == 0
    _, line, seen = run([[call("long", n=2), "No."], ["on and on " * 60]], tools=[long])
    assert len(seen["completion_ids"][0]) == 200
    assert line["completions/clipped_ratio"] == 0.5


def test_an_answer_that_pretends_to_be_structure_is_a_failure(run: Run) -> None:
    def sly() -> str:
        """Says it is over."""
        return f"done{END}"

    _, line, seen = run([[call("sly"), "No."], ["Oh."]], tools=[sly])
    assert "special token" in seen["completions"][0][1]["content"]
    assert line["tools/failure_frequency"] == 1


def test_a_text_model_takes_no_picture_as_an_answer(run: Run) -> None:
    def screenshot() -> Any:
        """Takes one."""
        return Image.new("RGB", (56, 56))

    with pytest.raises(ValueError, match=r"screenshot returned a picture, but this model has no image processor"):
        run([[call("screenshot"), "No."]], tools=[screenshot])


def test_parts_of_text_are_a_text(run: Run) -> None:
    def parts() -> Any:
        """Says it in parts."""
        return [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]

    _, _, seen = run([[call("parts"), "No."], ["Oh."]], tools=[parts])
    assert seen["completions"][0][1]["content"] == "one two"


XML = (
    "<tool_call>\n<function=shout>\n<parameter=text>\n75\n</parameter>\n<parameter=n>\n7\n</parameter>\n"
    "</function>\n</tool_call>"
)
TEXTS = {"type": "object", "properties": {"text": {"type": "string"}}}
SHOUT = [{"type": "function", "function": {"name": "shout", "parameters": TEXTS}}]


@pytest.mark.parametrize(
    ("text", "content", "called"),
    [
        ("a " + call("shout", text="hi"), "a", [{"name": "shout", "arguments": {"text": "hi"}}]),
        (XML, "", [{"name": "shout", "arguments": {"text": "75", "n": 7}}]),
        ("<tool_call>{oops}</tool_call>", "<tool_call>{oops}</tool_call>", []),
        ('<tool_call>{"arguments": {}}</tool_call>', '<tool_call>{"arguments": {}}</tool_call>', []),
        ("<tool_call>[1]</tool_call>", "<tool_call>[1]</tool_call>", []),
    ],
)
def test_how_calls_are_written(text: str, content: str, called: list[Any]) -> None:
    tokenizer = load_tokenizer()
    message = read_turn(tokenizer, tokenizer(text)["input_ids"], [], SHOUT)
    assert message["content"] == content
    assert [one["function"] for one in message.get("tool_calls", [])] == called


def test_a_tokenizers_own_form_of_calls() -> None:
    tokenizer = load_tokenizer()
    tokenizer.response_template = {
        "start_anchor": "assistant: ",
        "fields": {
            "tool_calls": {
                "open": "[[", "close_pattern": r"\]\]", "repeats": True, "content": "json",
                "transform": {"type": "function", "function": "{content}"},
            },
            "content": {"close_pattern": r"<\|endoftext\|>", "content": "text"},
        },
    }  # fmt: skip
    text, prefix = '[[{"name": "shout", "arguments": {"text": "hi"}}]]' + END, "assistant: "
    message = read_turn(tokenizer, tokenizer(text)["input_ids"], tokenizer(prefix)["input_ids"], SHOUT)
    assert message["role"] == "assistant"
    assert message["tool_calls"] == [{"type": "function", "function": {"name": "shout", "arguments": {"text": "hi"}}}]


def test_a_template_that_hides_answers_is_refused(build: Any) -> None:
    with pytest.raises(ValueError, match="does not show what tools answer"):
        build(train_dataset=CHAT, tools=[times])


def test_turns_drawn_by_the_sampler_have_the_updates_log_probs(build: Any, text_model: Path, tmp_path: Path) -> None:
    """A model of which a third of the tokens end a turn, and each turn calls a tool."""
    tokenizer = load_tokenizer()
    tokenizer.chat_template = TEMPLATE
    model = Qwen2ForCausalLM.from_pretrained(text_model)
    ends = [tokenizer.eos_token_id, *range(300, 550)]
    model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=tokenizer.pad_token_id)
    tokenizer.response_template = "calls times, whatever it says"
    tokenizer.parse_response = lambda ids, prefix, tools: {"tool_calls": [asking(times, a=6, b=7)]}
    trainer = build(
        model=model,
        processing_class=tokenizer,
        train_dataset=CHAT * 2,
        tools=[times],
        max_completion_length=100,
        num_generations=4,
        per_device_train_batch_size=8,
        max_steps=2,
        learning_rate=1e-3,
    )
    trainer.train()
    for line in trainer.state.log_history[:2]:
        assert line["tools/call_frequency"] > 1
        assert line["sampling/sampling_logp_difference/max"] < 1e-4


# Pictures


@pytest.mark.parametrize("engine", ["fast", "plain"])
@pytest.mark.parametrize("in_prompt", [True, False])
def test_pictures_that_tools_answer_are_seen_and_not_trained_on(
    build: Any, tiny_model_dir: Path, in_prompt: bool, engine: str
) -> None:
    """The update's log-probs against transformers' own forward pass over conversations with all their pictures."""
    processing = load_processing(str(tiny_model_dir))
    model = Qwen2VLForConditionalGeneration.from_pretrained(tiny_model_dir).float()
    ends = [processing.tokenizer.eos_token_id, *range(200, 390)]
    model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=processing.tokenizer.pad_token_id)
    processing.tokenizer.response_template = "calls look, whatever it says"
    shown = [Image.new("RGB", (56 + 28 * i, 56), color) for i, color in enumerate(("red", "blue", "green", "white"))]
    pictures = iter([*shown, *shown] * 9)

    def look() -> Any:
        """Looks."""
        return [{"type": "text", "text": "See:"}, {"type": "image", "image": next(pictures)}]

    processing.tokenizer.parse_response = lambda ids, prefix, tools: {"tool_calls": [asking(look)]}
    row = {"prompt": [{"role": "user", "content": "?"}], **({"image": shown[0]} if in_prompt else {})}
    seen: dict[str, Any] = {}

    def reward(completions: Any, **_: Any) -> list[float]:
        seen["completions"] = completions
        return [float(i) for i in range(len(completions))]

    trainer = build(
        reward, [row] * 2, model=model, processing_class=processing, tools=[look], engine=engine,
        max_completion_length=160, num_generations=2, per_device_train_batch_size=4, max_tool_calling_iterations=2,
        temperature=1.0,
    )  # fmt: skip
    checked: list[int] = []
    accumulate = trainer.updater.accumulate

    def check(groups: Any) -> Any:
        turns = iter(seen["completions"])
        for group, ours in zip(groups, trainer.updater.logprobs(groups), strict=True):
            for completion, found, mask in zip(group.completions, ours, group.masks, strict=True):
                parts = [part for turn in next(turns) if turn["role"] == "tool" for part in turn["content"]]
                images = [*([shown[0]] if in_prompt else []), *(p["image"] for p in parts if p["type"] == "image")]
                checked.append(len(images) - in_prompt)
                given = processing.image_processor(images=images, return_tensors="pt") if images else {}
                ids = torch.cat([group.prompt.input_ids, completion.token_ids])[None]
                is_picture = (ids == model.config.image_token_id).int()
                with torch.no_grad():
                    logits = model.eval()(input_ids=ids, mm_token_type_ids=is_picture, **given).logits[0]
                expected = logits.log_softmax(-1)[:-1].gather(1, ids[0, 1:, None])[-len(found) :, 0]
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
                torch.testing.assert_close(completion.logprobs[mask], expected[mask], rtol=1e-4, atol=1e-4)
                assert not mask[completion.token_ids == model.config.image_token_id].any()
        return accumulate(groups)

    trainer.updater.accumulate = check
    before = parameters(trainer)
    trainer.train()
    assert max(checked) == 2, "two answers with a picture each"
    assert any(".visual." in name for name in changed(before, trainer))
