"""Rollouts by a function of the user's (`rollout_func`), as TRL 1.16 calls it.

The function is called with a list of prompts, each as often as it is to be answered, and the trainer. It returns a dict
of lists, one entry per prompt of that list:

- `prompt_ids`: the prompt's tokens as the model read them, the same for all answers to one row.
- `completion_ids`: the tokens behind them. Where an environment wrote some, `env_mask` has 0 for its tokens and 1 for
  the model's; only these are trained on.
- `logprobs`: of each token of `completion_ids` when it was drawn; or of several candidates a token, with the candidates
  in `logprob_token_ids`.
- anything else is handed to the reward functions by its name.

Packing, update and metrics are those of every run. `draw_completions` draws from the policy within the function.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastgrpo.data.chat import convert_chat
from fastgrpo.data.prompts import PromptBuilder
from fastgrpo.model.families import end_ids
from fastgrpo.scoring.rewards import shown_prompt
from fastgrpo.training.setup import sampling_params
from fastgrpo.types import Completion, Engine, FinishReason, Prompt, Rollout, SamplingParams

RolloutFunction = Callable[[list[Any], Any], Mapping[str, Any]]

REQUIRED = ("prompt_ids", "completion_ids", "logprobs")


class CustomRollout:
    """`Engine` over a user's function.

    Args:
        trainer: handed to the function.
        sampler: the engine that would draw otherwise, kept in step with the policy for `draw_completions`.
    """

    def __init__(
        self,
        function: RolloutFunction,
        trainer: Any,
        sampler: Engine,
        builder: PromptBuilder,
    ) -> None:
        self.function = function
        self.trainer = trainer
        self.sampler = sampler
        self.builder = builder
        self.end_ids = frozenset(end_ids(trainer.model, builder.tokenizer))

    def generate(
        self, prompts: Sequence[Prompt], num_generations: int, params: SamplingParams, step: int
    ) -> Iterator[Rollout]:
        """See `Engine.generate`. How completions are drawn is the function's business, not that of `params`.

        Raises:
            ValueError: the function returned something else than described above.
        """
        if not prompts:
            return
        repeated = [prompt for prompt in prompts for _ in range(num_generations)]
        output = dict(self.function([shown_prompt(prompt) for prompt in repeated], self.trainer))
        _require_lists(output, len(repeated))
        candidates = output.pop("logprob_token_ids", None) or [None] * len(repeated)
        masks = output.pop("env_mask", None) or [None] * len(repeated)
        prompt_ids, completion_ids, logprobs = (output.pop(name) for name in REQUIRED)
        for g, prompt in enumerate(prompts):
            own = range(g * num_generations, (g + 1) * num_generations)
            read = [list(prompt_ids[i]) for i in own]
            if any(ids != read[0] for ids in read):
                raise ValueError(
                    f"rollout_func returned different prompt_ids for answers to row {prompt.row_id}: put what differs "
                    "into completion_ids, with 0 in env_mask."
                )
            yield Rollout(
                self._as_read(prompt, read[0]),
                tuple(
                    self._completion(
                        prompt,
                        index,
                        completion_ids[i],
                        _drawn_logprobs(logprobs[i], candidates[i], completion_ids[i]),
                        masks[i],
                        {name: _entry(values, i, len(repeated)) for name, values in output.items()},
                    )
                    for index, i in enumerate(own)
                ),
            )

    def sync(self) -> None:
        """See `Engine.sync`."""
        self.sampler.sync()

    def _as_read(self, prompt: Prompt, ids: list[int]) -> Prompt:
        """The prompt with the tokens that the function says the model read."""
        input_ids = torch.tensor(ids, dtype=torch.int64)
        if torch.equal(input_ids, prompt.input_ids):
            return prompt
        token, grids = self.builder.image_token_id, prompt.image_grid_thw
        places = 0 if token is None else int((input_ids == token).sum())
        wanted = sum(self.builder.places(grids))
        if places != wanted:
            raise ValueError(
                f"rollout_func returned prompt_ids with {places} image tokens for row {prompt.row_id}, whose pictures "
                f"take {wanted}: tokenize with the model's processor."
            )
        return replace(prompt, input_ids=input_ids, position_ids=self.builder.positions(input_ids, grids))

    def _completion(
        self, prompt: Prompt, index: int, ids: Sequence[int], logprobs: Tensor, mask: Any, columns: dict[str, Any]
    ) -> Completion:
        token_ids = torch.tensor(list(ids), dtype=torch.int64)
        if not len(token_ids):
            raise ValueError(f"rollout_func returned a completion without tokens for row {prompt.row_id}.")
        own = None if mask is None else torch.tensor(list(mask)).bool()
        if own is not None and len(own) != len(token_ids):
            raise ValueError(f"rollout_func returned an env_mask of {len(own)} for {len(token_ids)} completion_ids.")
        text: str = self.builder.tokenizer.decode(token_ids, skip_special_tokens=True)
        reason: FinishReason = "stop" if int(token_ids[-1]) in self.end_ids else "length"
        return Completion(prompt.row_id, index, token_ids, text, reason, logprobs, logprobs, own, columns)


def _require_lists(output: Mapping[str, Any], count: int) -> None:
    missing = [name for name in REQUIRED if output.get(name) is None]
    if missing:
        raise ValueError(f"rollout_func must return {', '.join(missing)} too: the log-probs are those of the draw.")
    for name in (*REQUIRED, "env_mask", "logprob_token_ids"):
        if output.get(name) is not None and len(output[name]) != count:
            raise ValueError(
                f"rollout_func returned {len(output[name])} {name} for {count} prompts: return one entry for each; a "
                "row's prompt comes as often as it is to be answered."
            )


def _drawn_logprobs(logprobs: Sequence[Any], candidates: Any, ids: Sequence[int]) -> Tensor:
    """[C] float32: of the tokens that were drawn."""
    if len(logprobs) != len(ids):
        raise ValueError(f"rollout_func returned {len(logprobs)} logprobs for {len(ids)} completion_ids.")
    if candidates is not None:
        logprobs = [row[list(tokens).index(i)] for row, tokens, i in zip(logprobs, candidates, ids, strict=True)]
    return torch.tensor([one[0] if isinstance(one, list | tuple) else one for one in logprobs], dtype=torch.float32)


def _entry(values: Any, index: int, count: int) -> Any:
    return values[index] if isinstance(values, list) and len(values) == count else values


def draw_completions(trainer: Any, prompts: Sequence[Any]) -> list[dict[str, Any]]:
    """One completion for each prompt, from the policy as it is now, by the trainer's own sampler.

    Args:
        prompts: conversations or finished texts.

    Returns:
        Per prompt: `prompt_ids`, `completion_ids`, `logprobs` (lists), `text`.
    """
    first = len(trainer.rows) if hasattr(trainer.rows, "__len__") else 0
    built = [trainer.builder.build(convert_chat({"prompt": prompt}, first + i)) for i, prompt in enumerate(prompts)]
    step = trainer.state.global_step
    drawn = trainer.engine.sampler.generate(built, 1, sampling_params(trainer.config), step=step)
    by_row = {rollout.prompt.row_id: rollout for rollout in drawn}
    return [
        {
            "prompt_ids": prompt.input_ids.tolist(),
            "completion_ids": by_row[prompt.row_id].completions[0].token_ids.tolist(),
            "logprobs": by_row[prompt.row_id].completions[0].sampling_logprobs.tolist(),
            "text": by_row[prompt.row_id].completions[0].text,
        }
        for prompt in built
    ]
