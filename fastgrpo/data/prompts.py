"""Rows into prompts: text is rendered and tokenized, pictures are cut into patches, here and nowhere else."""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, Literal, TypeVar

import torch
import xxhash
from fastgrpo_profiling import span
from torch import Tensor

from fastgrpo.data.chat import message_text
from fastgrpo.data.images import make_thumbnail
from fastgrpo.data.row_dataset import Rows
from fastgrpo.data.rows import Row
from fastgrpo.model.families import FAMILIES, QWEN2_VL, Family
from fastgrpo.model.picture_styles import Grids
from fastgrpo.safe_text.inert import inert
from fastgrpo.settings.given import is_out_of_memory, one_line
from fastgrpo.types import Prompt, PromptBatch, RowError, SkippedRow

_CONVERSATION = (
    "A conversation between User and Assistant. The user asks a question about the image, and the "
    "Assistant solves it. The assistant first thinks about the reasoning process in the mind and then "
    "provides the user with the answer."
)
_TURNS = "\nUser: {question}\nAssistant: Let me solve this step by step.\n<think>"

BASE_PROMPT = _CONVERSATION + _TURNS
"""The prompt of arXiv 2503.05132 for a model that was never instruction-tuned; the completion starts inside
<think>."""

BASE_PROMPT_NAMED = (
    _CONVERSATION
    + " The reasoning is enclosed within <think> </think> tags and the answer within <answer> </answer> tags."
) + _TURNS
"""The same, naming the tags: the published wording never mentions <answer>, although the reward asks for it."""

DIRECT_PROMPT = (
    "A conversation between User and Assistant. The user asks a question about the image, and the Assistant solves it."
    "\nUser: {question}\nAssistant:"
)
"""The base prompt without reasoning: the answer follows at once."""

BASE_PROMPTS = {"paper": BASE_PROMPT, "answer": BASE_PROMPT_NAMED, "direct": DIRECT_PROMPT}

INSTRUCT_PROMPT = (
    "{question} Output the thinking process in <think> </think> and final answer (option) in <answer> </answer> tags."
)
"""The user turn's text for an instruction-tuned model (arXiv 2503.05132)."""

Built = TypeVar("Built")
Mode = Literal["base", "instruct"]
Template = Literal["paper", "answer", "direct"]


def mrope_position_ids(
    input_ids: Tensor, image_grid_thw: Tensor | None, image_token_id: int | None, merge_size: int
) -> Tensor:
    """M-RoPE positions of one prompt (Qwen2-VL, arXiv 2409.12191, section 2.1; equal to HF's
    `get_rope_index`).

    A text token advances all three axes by one. An image that begins at position p takes p + (frame, row, column) of
    its merged patches; the text behind it continues at p + max(rows, columns).

    Args:
        input_ids: [P] int64, one `image_token_id` per merged patch.
        image_grid_thw: [images, 3] int64 patch grids before merging, or None.
        merge_size: patches merged per side.

    Returns:
        [3, P] int64: temporal, height, width.
    """
    positions = torch.arange(len(input_ids)).expand(3, -1).clone()  # [3, P]
    if image_grid_thw is None or image_token_id is None:
        return positions
    start = 0
    for frames, rows, columns in image_grid_thw.tolist():
        rows, columns = rows // merge_size, columns // merge_size
        start += int((input_ids[start:] == image_token_id).nonzero()[0])
        end = start + frames * rows * columns
        assert bool((input_ids[start:end] == image_token_id).all()), "an image place is shorter than its grid"
        first = positions[0, start].item()
        grid = torch.cartesian_prod(torch.arange(frames), torch.arange(rows), torch.arange(columns))
        positions[:, end:] += max(rows, columns) - (end - start)
        positions[:, start:end] = grid.view(-1, 3).T + first
        start = end
    return positions


def image_digests(
    pixel_values: Tensor | None, image_grid_thw: Tensor | None, style: Grids = QWEN2_VL.style
) -> tuple[bytes, ...]:
    """128-bit XXH3 of each image's patches and grid: the same for the same picture in another prompt.

    Every picture is hashed, even where no cache reads it: 1,900 patches take 0.2 ms, cutting them 22 ms.
    """
    if pixel_values is None or image_grid_thw is None:
        return ()
    digests = []
    for image, grid in zip(pixel_values.split(style.sizes(image_grid_thw)), image_grid_thw, strict=True):
        digest = xxhash.xxh3_128(image.numpy())
        digest.update(grid.numpy())
        digests.append(digest.digest())
    return tuple(digests)


class PromptBuilder:
    """Builds `Prompt`s for one model. It can be pickled and sent to data loader workers.

    Args:
        tokenizer: the model's tokenizer.
        image_processor: the one that comes with the model, or None for a text-only model.
        family: how the model takes pictures, from `family_of`.
        mode: how a bare question is asked. "base": plain text, no roles; "instruct": a user turn in the
            model's chat template. Conversations always go through the chat template, plain-text prompts are
            taken as they are.
        template: wording of the base mode: "paper", or "answer", which names the answer tags.
        max_prompt_length: longest prompt in tokens, image tokens included; None for no limit.
        chat_template_kwargs: further arguments of the tokenizer's `apply_chat_template`.

    Raises:
        ValueError: unknown mode or template, or a limit below 1.
    """

    def __init__(
        self,
        tokenizer: Any,
        image_processor: Any | None,
        *,
        family: Family = QWEN2_VL,
        mode: Mode = "base",
        template: Template = "paper",
        max_prompt_length: int | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> None:
        if mode not in ("base", "instruct"):
            raise ValueError(f"mode={mode!r} is unknown: use 'base' or 'instruct'")
        if template not in BASE_PROMPTS:
            raise ValueError(f"template={template!r} is unknown: use one of {sorted(BASE_PROMPTS)}")
        if max_prompt_length is not None and max_prompt_length < 1:
            raise ValueError(f"max_prompt_length={max_prompt_length} must be at least 1, or None for no limit")
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.mode = mode
        self.base_prompt = BASE_PROMPTS[template]
        self.instruct_prompt = "{question}" if template == "direct" else INSTRUCT_PROMPT
        self.max_prompt_length = max_prompt_length
        self.chat_template_kwargs = chat_template_kwargs or {}
        self.tools: Mapping[str | None, list[dict[str, Any]]] = {}
        """JSON schemas of the tools that a conversation offers, by the row's `environment`; None: of any other row."""
        self.merge_size: int = getattr(image_processor, "merge_size", 1)
        self.family = family
        vocabulary = tokenizer.get_vocab()  # once: a large one takes 50 ms
        self.image_token_id: int | None = vocabulary.get(family.image_token)
        self._absent_tokens = [token for token in family.picture_tokens if token not in vocabulary]
        self._first_tokens = _added_in_front(tokenizer)
        specials = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        specials |= {family.image_token} - {None}
        # Without any special token, a pattern that matches nothing.
        self._special_pattern = re.compile("|".join(map(re.escape, sorted(specials))) or r"(?!)")

    def build(self, row: Row) -> Prompt:
        """Renders, tokenizes and lays out one row.

        Raises:
            RowError: the text holds a special token, image places and images differ in number, an image is
                too narrow, or the prompt is longer than `max_prompt_length`.
            ValueError: the model cannot take such rows at all: it has no chat template, or no image
                processor.
        """
        if row.images and (reason := self.lacking_for_pictures()):
            raise ValueError(
                f"row {row.row_id} has images, but {reason}, or leave the image columns out of the data set"
            )
        messages, text = self._render(row)
        pixel_values, image_grid_thw = self.pictures(row.images)
        # A chat template writes the tokens that open a text itself.
        input_ids = self.tokenize(text, image_grid_thw, self._first_tokens if messages is None else [])
        if self.max_prompt_length is not None and len(input_ids) > self.max_prompt_length:
            # Cutting it would cut image tokens, which then no longer fit their pixels.
            raise RowError(
                f"prompt of {len(input_ids)} tokens ({sum(self.places(image_grid_thw))} of them image tokens) is "
                f"longer than max_prompt_length={self.max_prompt_length}"
            )
        return Prompt(
            row_id=row.row_id,
            input_ids=input_ids,
            position_ids=self.positions(input_ids, image_grid_thw),
            pixel_values=pixel_values,
            image_grid_thw=image_grid_thw,
            text=text,
            messages=messages,
            columns=row.columns,
            thumbnail=make_thumbnail(row.images) if row.images else None,
            image_digests=image_digests(pixel_values, image_grid_thw, self.family.style),
            images=tuple(row.images),
        )

    def positions(self, input_ids: Tensor, image_grid_thw: Tensor | None) -> Tensor:
        """[3, P], see `Prompt.position_ids`."""
        grid = None if self.family.mrope_sections is None else image_grid_thw
        return mrope_position_ids(input_ids, grid, self.image_token_id, self.merge_size)

    def places(self, image_grid_thw: Tensor | None) -> list[int]:
        """How often each placeholder of a prompt's text is repeated: those of a picture, or of a tile."""
        return [] if image_grid_thw is None else self.family.style.places(image_grid_thw, self.merge_size)

    def lacking_for_pictures(self) -> str | None:
        """What keeps this model from taking pictures, and what to train instead; None where it takes them."""
        if self.image_processor is None or self._absent_tokens:
            lacking = "image processor" if self.image_processor is None else f"{self._absent_tokens[0]} token"
            return f"this model has no {lacking}: train a vision-language model"
        if self.family.image_token is None:
            known = ", ".join(family.name for family in FAMILIES if family.image_token is not None)
            return f"how {self.family.name} models take pictures is not known to fastgrpo: train one of {known}"
        return None

    def _render(self, row: Row) -> tuple[list[dict[str, Any]] | None, str]:
        """The conversation (None for plain text) and the prompt's text, one image token per image."""
        if isinstance(row.messages, str):
            # Special tokens are allowed here: a finished prompt may be a rendered chat template.
            text, tokens = row.messages, (self.family.image_token, self.family.template_token)
            place = "" if any(token and token in text for token in tokens) else self.family.image_place
            return None, place * len(row.images) + self._with_markers(text)
        if row.messages is not None:
            for message in row.messages:
                self.check_text(message_text(message))
            return row.messages, self.render(row.messages, tools=self.tools_of(row.columns))
        assert row.question is not None, "a row has a question or messages"
        self.check_text(row.question)
        if self.mode == "base":
            return None, self.family.image_place * len(row.images) + self.base_prompt.format(question=row.question)
        text = self.instruct_prompt.format(question=row.question)
        parts = [*({"type": "image"} for _ in row.images), {"type": "text", "text": text}]
        messages = [{"role": "user", "content": parts if row.images else text}]
        return messages, self.render(messages)

    def check_text(self, text: str) -> None:
        """Raises a RowError for a text with a special token in it."""
        if found := self._special_pattern.search(text):
            raise RowError(f"the text holds the special token {found[0]}, which the model would take for structure")

    def tools_of(self, columns: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The tools that a row's prompt offers."""
        name = columns.get("environment")
        return self.tools.get(name if isinstance(name, str) else None, self.tools.get(None, []))

    def render(
        self, messages: list[dict[str, Any]], *, complete: bool = False, tools: list[dict[str, Any]] | None = None
    ) -> str:
        """The conversation in the model's template, up to where its answer begins; `complete`: with its last turn
        ended; `tools`: JSON schemas of what it offers."""
        if self.tokenizer.chat_template is None:
            raise ValueError(
                "this model's tokenizer has no chat template, which instruct mode and conversations need: "
                "use base mode with a `question` column, or an instruction-tuned model"
            )
        messages = self._in_parts(messages)
        prefilled = messages[-1]["role"] == "assistant" and not complete
        try:
            text: str = self.tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=not (prefilled or complete),
                continue_final_message=prefilled,
                **({"tools": tools} if tools else {}),
                **self.chat_template_kwargs,
            )
        except Exception as error:  # a template is a program of its own: it may refuse what it was not made for
            if is_out_of_memory(error):
                raise
            given = f", with chat_template_kwargs={self.chat_template_kwargs}," if self.chat_template_kwargs else ""
            raise RowError(f"the model's chat template{given} fails: {one_line(error)}") from error
        return self._with_markers(text)

    def _with_markers(self, text: str) -> str:
        """The text with the family's own place for what its template writes for a picture."""
        token, place = self.family.template_token, self.family.image_place
        return text if token is None or place in text else text.replace(token, place)

    def _in_parts(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Texts as lists of parts, for a template that leaves plain strings out (LLaVA, SmolVLM)."""
        if self.family.image_token is None or self._writes_strings:
            return messages
        return [
            message | {"content": [{"type": "text", "text": message["content"]}]}
            if isinstance(message.get("content"), str)
            else message
            for message in messages
        ]

    @cached_property
    def _writes_strings(self) -> bool:
        """Whether the chat template writes a message whose content is a string."""
        asked = [{"role": "user", "content": "a question"}]
        try:
            return "a question" in self.tokenizer.apply_chat_template(asked, tokenize=False)
        except Exception:  # a template is a program of its own: `render` says what it raises
            return False

    def pictures(self, images: Sequence[Any]) -> tuple[Tensor | None, Tensor | None]:
        """`Prompt.pixel_values` and `Prompt.image_grid_thw`, or None twice.

        Raises:
            RowError: a picture is too narrow.
        """
        if not images:
            return None, None
        assert self.image_processor is not None
        try:
            with span("data/images"):
                return self.family.style.process(self.image_processor, images)
        except (ValueError, ZeroDivisionError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "sizes should be greater than 0" not in str(error):  # of torch
                raise  # not of the picture's sides, so not the row's fault
            raise RowError(f"image cannot be cut into patches: {one_line(error)}") from error

    def tokenize(self, text: str, image_grid_thw: Tensor | None, first_tokens: Sequence[int] = ()) -> Tensor:
        """[P] int64: the text's tokens with every image token repeated as often as its picture or tile asks.

        `first_tokens` go in front, unless the text has them already.

        Raises:
            RowError: no token, or image places and pictures differ in number.
        """
        lengths = self.places(image_grid_thw)
        if image_grid_thw is not None and self.family.image_token is not None:
            text = self.family.style.written_out(text, self.family.image_token, image_grid_thw)
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if not ids:
            raise RowError("the prompt is empty")
        ids = ids if ids[: len(first_tokens)] == list(first_tokens) else [*first_tokens, *ids]
        input_ids = torch.tensor(ids, dtype=torch.int64)
        is_image = input_ids == (-1 if self.image_token_id is None else self.image_token_id)
        if int(is_image.sum()) != len(lengths):
            raise RowError(f"the prompt has {int(is_image.sum())} image places for {len(lengths)} images")
        repeats = torch.ones_like(input_ids)
        repeats[is_image] = torch.tensor(lengths, dtype=torch.int64)
        return input_ids.repeat_interleave(repeats)


def _added_in_front(tokenizer: Any) -> list[int]:
    """The tokens that a tokenizer puts in front of a text of its own accord: a BOS, for Llama and Gemma."""
    whole, text = tokenizer("a")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
    return next((whole[:i] for i in range(len(whole)) if whole[i : i + len(text)] == text), [])


def build_rows(
    dataset: Rows, build: Callable[[Row], Built], items: Sequence[tuple[int, dict[str, Any]]]
) -> tuple[list[Built], list[SkippedRow]]:
    """What `build` makes of records, in their order, and those that raise `RowError`."""
    built, skipped = [], []
    for row_id, raw in items:
        try:
            built.append(build(dataset.convert(row_id, raw)))
        except RowError as error:
            skipped.append(SkippedRow(row_id, inert(str(error))))
    return built, skipped


class PromptCollator:
    """A data loader's `collate_fn`: turns (row_id, raw record) pairs into a `PromptBatch` and sets bad rows aside."""

    def __init__(self, dataset: Rows, builder: PromptBuilder) -> None:
        self.dataset = dataset
        self.builder = builder

    def __call__(self, items: Sequence[tuple[int, dict[str, Any]]]) -> PromptBatch:
        """Prompts in the order of their rows. A row that raises `RowError` becomes a `SkippedRow`."""
        return PromptBatch(*build_rows(self.dataset, self.builder.build, items))
