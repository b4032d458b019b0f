"""What scripts written for TRL read of a trainer, call on it and override, beside its constructor."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from fastgrpo.config import GRPOConfig
from fastgrpo.scoring.rewards import EarlyCalls, RewardFunction, call_functions, reward_arguments, score
from fastgrpo.training.completion_records import CompletionRecord
from fastgrpo.training.rewards import as_given
from fastgrpo.training.run_trainer import RunTrainer
from fastgrpo.training.tools import ToolBox
from fastgrpo.training.trl_functions import TRLFunctions
from fastgrpo.types import Prompt, Rollout
from fastgrpo.update.entropy import EntropyControl

LOSS = "choose the loss by loss_type, beta, epsilon and their like, or override `update(groups)`"
ROLLOUT = "override `generate(batch)`, or pass rollout_func"
SCORING = "override `generate`, `score`, `advantages` or `plan_updates`, the parts of a step"
NEVER_CALLED = {
    "compute_loss": LOSS,
    "_compute_loss": LOSS,
    "_get_per_token_logps_and_entropies": LOSS,
    "_prepare_inputs": SCORING,
    "_generate_and_score_completions": SCORING,
    "_generate": ROLLOUT,
    "_generate_single_turn": ROLLOUT,
    "_tokenize_prompts": "set chat_template_kwargs, or give finished texts as prompts",
    "_get_train_sampler": "set shuffle_dataset and data_seed, or override `get_train_dataloader`",
    "_get_eval_sampler": "override `evaluate`",
    "get_eval_dataloader": "override `evaluate`",
    "prediction_step": "override `evaluate`",
    "evaluation_loop": "override `evaluate`",
}
"""Methods of TRL's and transformers' trainers that have no part in a step here → what to do instead."""


def require_called_overrides(trainer_class: type) -> None:
    """Raises a ValueError if a subclass overrides a method that would never be called."""
    for cls in trainer_class.__mro__:
        if cls is TRLSurface:
            return
        if name := next((name for name in NEVER_CALLED if name in vars(cls)), None):
            raise ValueError(
                f"{cls.__name__}.{name} overrides a method that is never called here: {NEVER_CALLED[name]}."
            )


class TRLSurface(TRLFunctions, RunTrainer):
    """Attributes under TRL's names, and the one of TRL's own methods that a step here calls when it is overridden."""

    config: GRPOConfig
    reward_functions: list[RewardFunction]
    reference_model: Any
    toolbox: ToolBox
    entropy: EntropyControl
    updater: Any
    early: EarlyCalls | None = None
    """Of the rollout under way."""

    @property
    def aux_loss_enabled(self) -> bool:
        """Whether a mixture of experts' load-balancing loss is added."""
        return bool(self.updater.router_coefficient)

    @property
    def ref_model(self) -> Any:
        """The KL term's reference; None with beta 0, and where it is the policy with its adapters off."""
        return self.reference_model

    @property
    def reward_funcs(self) -> list[Any]:
        """Reward functions and reward models, loaded."""
        return as_given(self.reward_functions)

    @property
    def reward_func_names(self) -> list[str]:
        """The names they are logged under."""
        return list(self.reward_names)

    @property
    def reward_processing_classes(self) -> list[Any]:
        """The tokenizer of each reward model, None for a function."""
        return [getattr(function, "tokenizer", None) for function in self.reward_functions]

    @property
    def tools(self) -> list[Any]:
        """What the model may call, methods of environments included."""
        return self.toolbox.all

    @property
    def _env_tools(self) -> dict[Any, list[Any]]:
        """What may be called, by the environment's name."""
        return self.toolbox.of_environment

    @property
    def _environment_pool(self) -> dict[Any, list[Any]]:
        """Every environment made so far, by name."""
        return self.toolbox.pool

    @property
    def environments(self) -> list[Any]:
        """Of the last rollout's completions, in their order."""
        return self.toolbox.environments

    @property
    def num_generations(self) -> int:
        return self.config.num_generations

    @property
    def num_generations_eval(self) -> int:
        return self.config.num_generations_eval or self.config.num_generations

    @property
    def beta(self) -> float:
        return self.config.beta

    @property
    def entropy_coef(self) -> float:
        """Of the entropy bonus, as it is now."""
        return self.entropy.coefficient

    @property
    def max_completion_length(self) -> int:
        return self.config.max_completion_length

    @property
    def _metrics(self) -> dict[str, defaultdict[str, list[float]]]:
        """Values since the last log line, by `train` or `eval` and name; what is appended is averaged into the next."""
        return {"train": self.step_log.window, "eval": self.step_log.eval_window}

    @property
    def _logs(self) -> dict[str, Any]:
        """The last rollout's completions, of all ranks, in columns."""
        return columns_of(self.step_log.records)

    # Rewards

    @property
    def calls_functions(self) -> bool:
        """Whether no subclass overrides how reward functions are called."""
        return type(self)._calculate_rewards is TRLSurface._calculate_rewards

    def drawn(self, rollouts: Iterable[Rollout], prompts: Sequence[Prompt]) -> list[Rollout]:
        """All rollouts of `prompts`; `per_group` functions are called on each as it comes."""
        functions = self.reward_functions if self.calls_functions else []
        columns = dict.fromkeys(name for prompt in prompts for name in prompt.columns)
        self.early = EarlyCalls(functions, self._handed(), columns, self.config.reward_timeout)
        return [self.early.start(rollout) for rollout in rollouts]

    def rewards_of(self, rollouts: Sequence[Rollout]) -> Tensor:
        """[completions, F] float32 of this rank's completions; NaN where a function abstained."""
        early, self.early = self.early, None
        if self.calls_functions:
            return score(
                rollouts,
                self.reward_functions,
                **self._handed(),
                nan_rewards=self.config.nan_rewards,
                timeout=self.config.reward_timeout,
                early=early,
            )
        columns = reward_arguments(rollouts)
        prompts, completions, ids = (columns.pop(name) for name in ("prompts", "completions", "completion_ids"))
        columns.pop("prompt_texts")
        inputs = [
            {"prompt": prompt, **{name: column[i] for name, column in columns.items()}}
            for i, prompt in enumerate(prompts)
        ]
        rewards = torch.as_tensor(self._calculate_rewards(inputs, prompts, completions, ids))
        first = sum(gather_object([len(prompts)])[: self.accelerator.process_index])
        return rewards[first : first + len(prompts)].float().cpu()

    def _calculate_rewards(
        self, inputs: list[dict[str, Any]], prompts: list[Any], completions: list[Any], completion_ids_list: list[Any]
    ) -> Tensor:
        """[completions of all ranks, F] float32; called only where a subclass overrides it."""
        taken = ("prompt", "completion", "completion_ids")
        columns = {name: [row[name] for row in inputs] for name in (inputs[0] if inputs else ()) if name not in taken}
        arguments = {"prompts": prompts, "completions": completions, "completion_ids": completion_ids_list, **columns}
        size = self.num_generations if self.model.training else self.num_generations_eval
        places = [divmod(i, size) for i in range(len(prompts))]
        mine = call_functions(
            self.reward_functions,
            {**arguments, **self._handed()},
            places,
            self.config.nan_rewards,
            self.config.reward_timeout,
        )
        return torch.tensor(gather_object(mine.tolist())).view(-1, len(self.reward_functions))

    def _handed(self) -> dict[str, Any]:
        """What every reward function gets beside completions; in evaluation, no columns are logged."""
        if self.model.training:
            return {
                "trainer_state": self.state,
                "log_extra": self.step_log.log_extra,
                "log_metric": self.step_log.log_metric,
            }
        return {
            "trainer_state": self.state,
            "log_extra": lambda name, values: None,
            "log_metric": lambda name, value: self.step_log.eval_window[name].append(float(value)),
        }


def columns_of(records: Sequence[CompletionRecord]) -> dict[str, Any]:
    """Records in columns, under the names of TRL's log."""

    def by_name(values: Callable[[CompletionRecord], Any]) -> dict[str, list[Any]]:
        names = {name: None for record in records for name in values(record)}
        return {name: [values(record).get(name) for record in records] for name in names}

    return {
        "prompt": [record.prompt for record in records],
        "completion": [record.completion for record in records],
        "rewards": by_name(lambda record: record.rewards),
        "advantages": [record.advantage for record in records],
        "extra": by_name(lambda record: record.extra),
        "images": [record.thumbnail for record in records if record.thumbnail is not None],
    }
