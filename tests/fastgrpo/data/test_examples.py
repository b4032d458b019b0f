"""Rows into prompt and answer, and which of their tokens count."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from fastgrpo.data.examples import ExampleBuilder, ExampleCollator
from fastgrpo.data.prompts import DIRECT_PROMPT, PromptBuilder, mrope_position_ids
from fastgrpo.data.row_dataset import as_rows
from fastgrpo.data.rows import Row
from fastgrpo.model.load import Processing, load_processing
from fastgrpo.types import RowError

PICTURE = Image.new("RGB", (112, 84), "red")


@pytest.fixture(scope="module")
def processing(tiny_model_dir: Path) -> Processing:
    return load_processing(str(tiny_model_dir))


def builder(processing: Processing, mode: Any = "instruct", **options: Any) -> ExampleBuilder:
    return ExampleBuilder(
        PromptBuilder(processing.tokenizer, processing.image_processor, mode=mode, template="direct"), **options
    )


def question(solution: Any = "three", **columns: Any) -> Row:
    return Row(0, [PICTURE], "How many cubes?", columns={"solution": solution, **columns})


def text_of(processing: Processing, ids: torch.Tensor) -> str:
    return processing.tokenizer.decode(ids)


def test_the_answer_alone_counts_with_what_ends_it(processing: Processing) -> None:
    example = builder(processing).build(question())
    prompt = builder(processing).prompts.build(question())
    end = processing.tokenizer.apply_chat_template([{"role": "assistant", "content": "three"}], tokenize=False)
    assert text_of(processing, example.targets) == end[end.index("three") :]
    assert example.rows[0] == len(prompt.input_ids) - 1
    whole = torch.cat([example.prompt.input_ids, example.targets[-1:]])
    assert torch.equal(whole[: len(prompt.input_ids)], prompt.input_ids)
    assert torch.equal(whole[example.rows + 1], example.targets)
    assert "<think>" not in example.prompt.text


def test_positions_go_on_behind_the_pictures(processing: Processing) -> None:
    example = builder(processing).build(question()).prompt
    expected = mrope_position_ids(
        example.input_ids, example.image_grid_thw, builder(processing).prompts.image_token_id, 2
    )
    assert torch.equal(example.position_ids, expected)


def test_of_the_prompt_all_but_pictures_may_count_too(processing: Processing) -> None:
    example = builder(processing, train_on_prompt=True).build(question())
    whole = torch.cat([example.prompt.input_ids, example.targets[-1:]])
    family = processing.family
    pictures = processing.tokenizer.convert_tokens_to_ids([family.image_token, *family.image_markers])
    expected = [i for i in range(len(whole) - 1) if int(whole[i + 1]) not in pictures]
    assert example.rows.tolist() == expected
    assert torch.equal(example.targets, whole[example.rows + 1])


def test_base_mode_asks_in_plain_text(processing: Processing) -> None:
    example = builder(processing, "base").build(question())
    end = processing.tokenizer.eos_token
    place = processing.family.image_place
    assert example.prompt.text == f"{place}{DIRECT_PROMPT.format(question='How many cubes?')} three{end}"
    assert text_of(processing, example.targets) == f" three{end}"


@pytest.mark.parametrize(
    ("solution", "said"),
    [(3, "3"), (["yes"], "yes"), ("so it is <answer> 4 </answer>", "so it is <answer> 4 </answer>"), (" b ", "b")],
)
def test_golds_are_imitated_as_they_are_written(processing: Processing, solution: Any, said: str) -> None:
    example = builder(processing, "base").build(question(solution))
    assert text_of(processing, example.targets) == f" {said}{processing.tokenizer.eos_token}"


def test_trls_prompts_and_completions(processing: Processing) -> None:
    make, end = builder(processing), processing.tokenizer.eos_token
    texts = Row(0, [], messages="1, 2,", columns={"completion": " 3, 4"})
    assert text_of(processing, make.build(texts).targets) == f" 3, 4{end}"
    ended = Row(0, [], messages="1, 2,", columns={"completion": f" 3{end}"})
    assert text_of(processing, make.build(ended).targets) == f" 3{end}"
    asked = [{"role": "user", "content": "How many?"}]
    told = make.build(Row(0, [], messages=asked, columns={"completion": [{"role": "assistant", "content": "four"}]}))
    assert text_of(processing, told.targets).startswith("four")
    begun = make.build(
        Row(0, [], messages=[*asked, {"role": "assistant", "content": "fo"}], columns={"solution": "ur"})
    )
    assert begun.prompt.text == told.prompt.text
    assert text_of(processing, begun.targets).startswith("ur")


@pytest.mark.parametrize(
    ("row", "options", "reason"),
    [
        (Row(0, [], "How many?"), {}, "the row has no answer"),
        (question(""), {}, "wanted one answer in it"),
        (question("<|im_end|>"), {}, "special token"),
        (question(), {"max_length": 5}, r"row of \d+ tokens is longer than max_length=5"),
        (Row(0, [], messages="1, 2", columns={"completion": "<|image_pad|>"}), {}, "a picture's token"),
    ],
)
def test_rows_without_a_usable_answer(processing: Processing, row: Row, options: Any, reason: str) -> None:
    with pytest.raises(RowError, match=reason):
        builder(processing, **options).build(row)


def test_a_bad_row_is_set_aside(processing: Processing) -> None:
    rows = as_rows([{"question": "How many?", "answer": "4"}, {"question": "How many?", "answer": None}])
    batch = ExampleCollator(rows, builder(processing))([rows[0], rows[1]])
    assert [example.prompt.row_id for example in batch.examples] == [0]
    assert [(row.row_id, "no answer" in row.reason) for row in batch.skipped] == [(1, True)]
