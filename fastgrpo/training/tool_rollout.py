"""Rollouts in which the model calls tools: it writes, tools answer, it writes on. Its own tokens alone train it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from fastgrpo.data.chat import message_text
from fastgrpo.data.images import decode_image
from fastgrpo.data.prompts import PromptBuilder, image_digests
from fastgrpo.data.rows import Row
from fastgrpo.scoring.rewards import shown_prompt
from fastgrpo.training.tools import EMPTY_PROMPT, ToolBox, call_tools, read_turn
from fastgrpo.types import Completion, Engine, FinishReason, Prompt, Rollout, RowError, SamplingParams


@dataclass(frozen=True)
class Pictures:
    """Pictures of a conversation, as a `Prompt` holds them."""

    pixel_values: Tensor | None = None
    image_grid_thw: Tensor | None = None
    image_digests: tuple[bytes, ...] = ()

    @staticmethod
    def joined(parts: "Sequence[Pictures | Prompt]") -> "Pictures":
        """Those of all parts, in order."""
        pixels = [part.pixel_values for part in parts if part.pixel_values is not None]
        grids = [part.image_grid_thw for part in parts if part.image_grid_thw is not None]
        digests = tuple(digest for part in parts for digest in part.image_digests)
        return Pictures(torch.cat(pixels), torch.cat(grids), digests) if pixels else NO_PICTURES


NO_PICTURES = Pictures()


@dataclass
class Talk:
    """A completion in the making."""

    prompt: Prompt
    index: int
    environment: Any
    ids: Tensor
    own: Tensor
    logprobs: Tensor
    sampling_logprobs: Tensor
    reason: FinishReason
    messages: list[dict[str, Any]]
    pictures: Pictures = NO_PICTURES
    """What tools showed."""
    calls: int = 0
    failures: int = 0
    is_full: bool = False
    """There was no room for what tools answered last."""

    @property
    def pending(self) -> list[dict[str, Any]]:
        """The tool calls that its last turn ends with."""
        goes_on = self.reason == "stop" and not self.is_full
        calls: list[dict[str, Any]] = self.messages[-1].get("tool_calls", []) if goes_on else []
        return calls

    def append(self, part: Completion | Tensor) -> None:
        """A turn of the model's, or the tokens that tools' answers are."""
        if isinstance(part, Completion):
            pieces = part.token_ids, torch.ones(len(part.token_ids)).bool(), part.logprobs, part.sampling_logprobs
            self.reason = part.finish_reason
        else:
            none = torch.zeros(len(part))
            pieces = part, none.bool(), none, none
        kept = self.ids, self.own, self.logprobs, self.sampling_logprobs
        self.ids, self.own, self.logprobs, self.sampling_logprobs = (
            torch.cat([old, new]) for old, new in zip(kept, pieces, strict=True)
        )


class ToolRollout:
    """`Engine` that draws turn by turn from another one, and has tools answer in between.

    Args:
        most_turns: turns in which tools may be called; None: as many as fit.
        end_ids: the tokens that end a turn.

    Raises:
        ValueError: the chat template does not show tool calls and what tools answer.
    """

    def __init__(
        self, box: ToolBox, sampler: Engine, builder: PromptBuilder, end_ids: Sequence[int], most_turns: int | None
    ) -> None:
        self.box = box
        self.sampler = sampler
        self.builder = builder
        self.most_turns = most_turns
        self.ends = [builder.tokenizer.decode([token]) for token in end_ids]
        probe = self._answer_ids([{"role": "tool", "name": "a_tool", "content": "an answer"}])
        if "an answer" not in builder.tokenizer.decode(probe):
            raise ValueError(
                "tools: the model's chat template does not show what tools answer. Use a model whose template does, or "
                "pass rollout_func."
            )

    def sync(self) -> None:
        """See `Engine.sync`."""
        self.sampler.sync()

    def generate(
        self, prompts: Sequence[Prompt], num_generations: int, params: SamplingParams, step: int
    ) -> Iterator[Rollout]:
        """See `Engine.generate`. A completion has at most `max_new_tokens`, answers of tools included.

        Raises:
            ValueError: an environment that is unknown, or that opens differently for completions of one row.
        """
        size = num_generations
        names = [prompt.columns.get("environment") if self.box.chooses else None for prompt in prompts]
        environments = self.box.take([name for name in names for _ in range(size)])
        prompts = [self._opened(p, environments[i * size : (i + 1) * size]) for i, p in enumerate(prompts)]
        drawn = {one.prompt.row_id: one.completions for one in self.sampler.generate(prompts, size, params, step)}
        talks = [
            self._begun(prompt, completion, environments[i * size + completion.index] if environments else None)
            for i, prompt in enumerate(prompts)
            for completion in drawn[prompt.row_id]
        ]
        turn = 0
        while (calling := [talk for talk in talks if talk.pending]) and turn != self.most_turns:
            turn += 1
            answered = self._answer(calling, params.max_new_tokens)
            if not answered:
                break
            self._go_on(answered, params, step, turn)
        for i, prompt in enumerate(prompts):
            yield Rollout(prompt, tuple(self._completion(talk) for talk in talks[i * size : (i + 1) * size]))

    def _opened(self, prompt: Prompt, environments: Sequence[Any]) -> Prompt:
        """Resets a row's environments; the prompt with what they say to begin with."""
        if not environments:
            return prompt
        row = dict(prompt.columns)
        if self.box.chooses:
            del row["environment"]
        if prompt.messages != EMPTY_PROMPT:
            row["prompt"] = shown_prompt(prompt)
        said = [environment.reset(**row) for environment in environments]
        if any(one != said[0] for one in said):
            raise ValueError(
                f"reset() of {type(environments[0]).__name__} says different things to completions of row "
                f"{prompt.row_id}, which are compared with each other: make it depend on the row alone."
            )
        if said[0] is None:
            return prompt
        if not isinstance(said[0], str) or prompt.messages is None:
            raise ValueError(f"reset() of {type(environments[0]).__name__} must return a text, for a conversation.")
        *before, last = prompt.messages
        text = last["content"]
        text = text + said[0] if isinstance(text, str) else [*text, {"type": "text", "text": said[0]}]
        messages = [*before, {**last, "content": text}]
        return self.builder.build(Row(prompt.row_id, list(prompt.images), None, messages, prompt.columns))

    def _begun(self, prompt: Prompt, completion: Completion, environment: Any) -> Talk:
        nothing = torch.zeros(0)
        empty = (nothing.long(), nothing.bool(), nothing, nothing)
        talk = Talk(prompt, completion.index, environment, *empty, completion.finish_reason, [])
        self._add_turn(talk, completion)
        return talk

    def _add_turn(self, talk: Talk, completion: Completion) -> None:
        prefix = [*talk.prompt.input_ids.tolist(), *talk.ids.tolist()]
        tools = self.builder.tools_of(talk.prompt.columns)
        talk.messages.append(read_turn(self.builder.tokenizer, completion.token_ids.tolist(), prefix, tools))
        talk.append(completion)

    def _answer(self, talks: Sequence[Talk], most: int) -> list[Talk]:
        """Has tools answer; the completions that have room for it, and for a token behind it."""
        pairs = [(talk, call) for talk in talks for call in talk.pending]
        tools = {id(talk): self.box.tools_of(talk.environment) for talk in talks}
        results = call_tools([(tools[id(talk)], call) for talk, call in pairs])
        answers: dict[int, list[tuple[dict[str, Any], Pictures]]] = {id(talk): [] for talk in talks}
        for (talk, call), (result, failed) in zip(pairs, results, strict=True):
            name = call["function"]["name"]
            content = _content(result)
            try:
                pictures = self._pictures(name, content)
            except RowError as error:
                content, pictures, failed = str({"error": str(error)}), NO_PICTURES, True
            answers[id(talk)].append(({"role": "tool", "name": name, "content": content}, pictures))
            talk.calls += 1
            talk.failures += failed
        fitting = []
        for talk in talks:
            messages = [message for message, _ in answers[id(talk)]]
            shown = Pictures.joined([pictures for _, pictures in answers[id(talk)]])
            ids = self._answer_ids(messages, shown)
            if len(talk.ids) + len(ids) < most:
                talk.messages += messages
                talk.pictures = Pictures.joined([talk.pictures, shown])
                talk.append(ids)
                fitting.append(talk)
            else:
                talk.is_full = True
        return fitting

    def _pictures(self, name: str, content: str | list[dict[str, Any]]) -> Pictures:
        """Those of a tool's answer.

        Raises:
            RowError: its text holds a special token, or a picture is too narrow.
            ValueError: the model takes no pictures.
        """
        self.builder.check_text(message_text({"content": content}))
        parts = [] if isinstance(content, str) else content
        images = [decode_image(part["image"]) for part in parts if part["type"] == "image"]
        if images and (reason := self.builder.lacking_for_pictures()):
            raise ValueError(f"tools: {name} returned a picture, but {reason}, or answer with texts.")
        pixel_values, grid = self.builder.pictures(images)
        return Pictures(pixel_values, grid, image_digests(pixel_values, grid, self.builder.family.style))

    def _go_on(self, talks: Sequence[Talk], params: SamplingParams, step: int, turn: int) -> None:
        """Draws the next turn of each."""
        room = [params.max_new_tokens - len(talk.ids) for talk in talks]
        prompts = [replace(_whole(self.builder, talk), row_id=_number(talk, turn)) for talk in talks]
        drawn = {
            one.prompt.row_id: one.completions[0]
            for one in self.sampler.generate(prompts, 1, replace(params, max_new_tokens=max(room)), step)
        }
        for talk, prompt, most in zip(talks, prompts, room, strict=True):
            self._add_turn(talk, _cut(drawn[prompt.row_id], most))

    def _answer_ids(self, answers: list[dict[str, Any]], pictures: Pictures = NO_PICTURES) -> Tensor:
        """[N] int64: what follows an assistant's turn that ended: tools' answers, up to where its next turn begins."""
        calls = [{"type": "function", "function": {"name": one["name"], "arguments": {}}} for one in answers]
        turn: dict[str, Any] = {"role": "assistant", "content": "", "tool_calls": calls}
        asked = [{"role": "user", "content": "?"}, turn]
        before, whole = self.builder.render(asked, complete=True), self.builder.render([*asked, *answers])
        end = next((end for end in self.ends if end in before), None)
        # Templates write less of a turn that is not the last: the ends of turns are counted.
        pieces = [] if end is None else whole.split(end)[before.count(end) :]
        text = (end or "").join(pieces)
        return self.builder.tokenize(text, pictures.image_grid_thw) if text else torch.zeros(0, dtype=torch.int64)

    def _completion(self, talk: Talk) -> Completion:
        whole = None
        if talk.pictures.pixel_values is not None:
            whole = _whole(self.builder, talk)
            whole = replace(whole, input_ids=whole.input_ids[:-1], position_ids=whole.position_ids[:, :-1])
        return Completion(
            talk.prompt.row_id,
            talk.index,
            talk.ids,
            self.builder.tokenizer.decode(talk.ids, skip_special_tokens=True),
            talk.reason,
            talk.logprobs,
            talk.sampling_logprobs,
            talk.own,
            {} if talk.environment is None else {"environments": talk.environment},
            talk.messages,
            (talk.calls, talk.failures),
            whole,
        )


def _whole(builder: PromptBuilder, talk: Talk) -> Prompt:
    """The prompt with all that was said since."""
    ids = torch.cat([talk.prompt.input_ids, talk.ids])
    pictures = Pictures.joined([talk.prompt, talk.pictures])
    return replace(
        talk.prompt,
        input_ids=ids,
        position_ids=builder.positions(ids, pictures.image_grid_thw),
        **vars(pictures),
    )


def _number(talk: Talk, turn: int) -> int:
    """The row that a later turn counts as, for its seed: one that is in no data set."""
    return -1 - ((talk.prompt.row_id << 24) | (talk.index << 12) | turn)


def _content(result: Any) -> str | list[dict[str, Any]]:
    """A message's content: a text, or parts with a picture among them."""
    parts = [{"type": "image", "image": result}] if isinstance(result, Image.Image) else result
    kinds = [part.get("type") if isinstance(part, dict) else None for part in parts] if isinstance(parts, list) else []
    if not kinds or set(kinds) - {"image", "text"}:
        return str(result)
    return parts if "image" in kinds else "".join(str(part["text"]) for part in parts)


def _cut(completion: Completion, most: int) -> Completion:
    if len(completion.token_ids) <= most:
        return completion
    return replace(
        completion,
        token_ids=completion.token_ids[:most],
        logprobs=completion.logprobs[:most],
        sampling_logprobs=completion.sampling_logprobs[:most],
        finish_reason="length",
    )
