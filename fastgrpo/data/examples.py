"""Rows into examples for supervised fine-tuning: the prompt of a row, and the answer that its data set gives."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from fastgrpo.data.chat import message_text
from fastgrpo.data.prompts import PromptBuilder, build_rows
from fastgrpo.data.row_dataset import RowDataset
from fastgrpo.data.rows import Row
from fastgrpo.scoring.golds import gold_text
from fastgrpo.types import Example, ExampleBatch, Prompt, RowError


class ExampleBuilder:
    """Builds `Example`s for one model.

    Args:
        prompts: renders what comes before the answer.
        train_on_prompt: count the prompt's tokens too, but for those of pictures.
        max_length: rows of more tokens raise `RowError`; None for no limit.
    """

    def __init__(self, prompts: PromptBuilder, *, train_on_prompt: bool = False, max_length: int | None = None) -> None:
        self.prompts = prompts
        self.train_on_prompt = train_on_prompt
        self.max_length = max_length
        family, vocabulary = prompts.family, prompts.tokenizer.get_vocab()
        self._of_pictures = torch.tensor([vocabulary[token] for token in family.picture_tokens if token in vocabulary])

    def build(self, row: Row) -> Example:
        """A row with its answer: column `completion` as it is, else `solution`.

        Prompt and answer are tokenized apart, as when the model is asked.

        Raises:
            RowError: as `PromptBuilder.build`; no answer, an answer with a special token in it, or too many tokens.
        """
        prompt = self.prompts.build(row)
        text = self._ending(row, prompt)
        tokenizer = self.prompts.tokenizer
        answer = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.int64)
        token_ids = torch.cat([prompt.input_ids, answer])
        if self.max_length is not None and len(token_ids) > self.max_length:
            raise RowError(f"row of {len(token_ids)} tokens is longer than max_length={self.max_length}")
        first = 0 if self.train_on_prompt else len(prompt.input_ids) - 1
        counts = ~torch.isin(token_ids[1:], self._of_pictures)
        counts[:first] = False
        rows = counts.nonzero()[:, 0]
        start = int(prompt.position_ids.max()) + 1
        positions = torch.arange(start, start + len(answer) - 1).expand(3, -1)
        inputs = replace(
            prompt,
            input_ids=token_ids[:-1],
            position_ids=torch.cat([prompt.position_ids, positions], dim=1),
            text=prompt.text + text,
        )
        return Example(inputs, rows, token_ids[rows + 1])

    def _ending(self, row: Row, prompt: Prompt) -> str:
        """The answer as it follows the prompt, with what ends it."""
        answer, end = _answer(row), self.prompts.tokenizer.eos_token or ""
        if isinstance(row.messages, str):  # both are finished texts, which may hold special tokens
            if self.prompts.family.image_token and self.prompts.family.image_token in answer:
                raise RowError("the answer holds a picture's token")
            return answer if end and answer.endswith(end) else answer + end
        self.prompts.check_text(answer)
        if prompt.messages is None:
            return f" {answer}{end}"
        *asked, last = prompt.messages
        begun = message_text(last) if last["role"] == "assistant" else None
        told = {"role": "assistant", "content": (begun or "") + answer}
        whole = self.prompts.render([*asked, *([last] if begun is None else []), told], complete=True)
        # Some templates write into the opening of an answer what they leave out of a given one.
        return whole.removeprefix(prompt.text) if whole.startswith(prompt.text) else answer + end


def _answer(row: Row) -> str:
    value = row.columns.get("completion")
    if isinstance(value, list) and value and isinstance(value[-1], dict):
        value = message_text(value[-1])
    if isinstance(value, str) and value.strip():
        return value
    value = row.columns.get("solution")
    if value is None:
        raise RowError("the row has no answer: wanted a column `completion`, `solution` or `answer`, or `messages`")
    return value.strip() if isinstance(value, str) and value.strip() else gold_text(value)


class ExampleCollator:
    """A data loader's `collate_fn`: as `PromptCollator`, for examples."""

    def __init__(self, dataset: RowDataset, builder: ExampleBuilder) -> None:
        self.dataset = dataset
        self.builder = builder

    def __call__(self, items: Sequence[tuple[int, dict[str, Any]]]) -> ExampleBatch:
        """Examples in the order of their rows. A row that raises `RowError` becomes a `SkippedRow`."""
        return ExampleBatch(*build_rows(self.dataset, self.builder.build, items))
