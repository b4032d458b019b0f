"""`GRPOConfig`: transformers' training arguments plus those of GRPO, under the names TRL 1.16 gives them."""

import os
from dataclasses import dataclass, field, fields
from importlib.util import find_spec
from typing import Any, Literal

import torch
from transformers import TrainingArguments
from transformers.utils import logging

logger = logging.get_logger(__name__)

LOSS_TYPES: tuple[str, ...] = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo")
ATTN_BACKENDS: tuple[str, ...] = ("auto", "varlen", "cpu", "math", "flash_attn")


NOT_YET = "A TRL setting that is not supported yet."
IGNORED = "Accepted so that TRL scripts run; has no effect."


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


def _not_yet(default: Any) -> Any:
    """A TRL field whose non-default values are refused: ignoring them would train something else."""
    return _option(default, NOT_YET)


def _ignored(default: Any) -> Any:
    """A TRL field that is accepted so that scripts keep working, and has no meaning here."""
    return _option(default, IGNORED)


@dataclass
class GRPOConfig(TrainingArguments):
    """Settings of a GRPO run. Counts, lengths and batch sizes are in completions and tokens unless said otherwise.

    Raises:
        ValueError: a field has a value that cannot work; the message names the field, the value and the fix.
    """

    learning_rate: float = _option(1e-6, "Peak learning rate.")
    remove_unused_columns: bool = _option(False, "Reward functions see every column, so none is removed.")
    bf16: bool | None = field(
        default=None,
        # The parser lets a flag stand without a value only where the default is no None.
        metadata={
            "help": "Mixed precision in bf16; by default on where a CUDA device supports it.",
            "nargs": "?",
            "const": True,
        },
    )
    resume_from_checkpoint: str | None = _option(
        None, "A checkpoint folder, or `last`: the newest of output_dir, from the start where there is none."
    )

    # The model and its prompts
    model_init_kwargs: dict[str, Any] | str | None = _option(None, "Keyword arguments of `from_pretrained` (JSON).")
    trust_remote_code: bool = _option(False, "Allow the model's repository to run its own code here.")
    disable_dropout: bool = _option(False, "Set every dropout of the policy to 0.")
    prompt_mode: Literal["base", "instruct"] = _option(
        "base", "`base`: plain text without roles, for a model never instruction-tuned; `instruct`: chat template."
    )
    prompt_template: Literal["paper", "answer"] = _option(
        "paper", "Wording of the base prompt: the paper's, or one that also names the <answer> tag."
    )
    chat_template_kwargs: dict[str, Any] | str | None = _option(None, "Extra variables of the chat template (JSON).")
    max_prompt_length: int | None = _option(
        None, "Rows whose prompt has more tokens are skipped and counted; never truncated."
    )

    # Rollouts
    num_generations: int = _option(8, "Completions per prompt (the group size G), at least 2.")
    num_generations_eval: int | None = _option(None, "Completions per prompt in evaluation; num_generations if unset.")
    max_completion_length: int = _option(512, "Most tokens in a completion.")
    batch_unit: Literal["completions", "prompts"] = _option(
        "completions", "What per_device_train_batch_size counts: completions (TRL) or prompts (VisualThinker)."
    )
    generation_batch_size: int | None = _option(None, "Completions drawn at once over all ranks.")
    steps_per_generation: int | None = _option(
        None, "Micro-batches per rollout; gradient_accumulation_steps if unset, else a multiple of it."
    )
    num_iterations: int = _option(1, "Times each rollout is trained on.")
    shuffle_dataset: bool = _option(True, "Draw the prompts in a seeded random order, anew each epoch.")
    temperature: float = _option(1.0, "Sampling temperature.")
    top_p: float = _option(1.0, "Nucleus sampling; 1 is off.")
    top_k: int = _option(0, "Sample from the k likeliest tokens; 0 is off.")
    min_p: float | None = _option(None, "Drop tokens less likely than min_p times the likeliest; None is off.")
    repetition_penalty: float = _option(1.0, "Above 1 discourages tokens already in the text.")

    # The machine: none of this changes what is trained, beyond floating-point order
    engine: str = _option("fast", "`fast`: paged sampler and packed update; `plain`: HF generate and padded batches.")
    token_budget: int = _option(16_384, "Input tokens of a packed micro-batch; a group's prompt counts once.")
    attn_backend: str = _option("auto", "Attention of the packed update: " + ", ".join(ATTN_BACKENDS) + ".")
    logprob_bytes: int = _option(
        1 << 30, "Scratch of the LM head's log-probs; with room for tokens × vocabulary × 2 nothing is computed twice."
    )
    vision_cache_bytes: int = _option(
        1 << 30, "Features of pictures to keep, where the vision tower is frozen: none goes through it twice; 0 is off."
    )
    sampler_max_rows: int = _option(256, "Completions that run at a time.")
    sampler_max_cache_tokens: int | None = _option(
        None, "Size of the KV cache; what a rollout needs if unset, on a GPU within its free memory."
    )

    # Objective
    loss_type: str = _option("dapo", "How token losses are aggregated: " + ", ".join(LOSS_TYPES) + ".")
    beta: float = _option(0.0, "Weight of the KL term; at 0 no reference model is kept.")
    sync_ref_model: bool = _option(False, "Draw the reference model after the policy (TR-DPO).")
    ref_model_on_cpu: bool = _option(
        False, "Keep the reference model's weights on the host and run it there: frees its GPU memory, and is slow."
    )
    ref_model_mixup_alpha: float = _option(0.6, "Share of the policy in the reference at each such update.")
    ref_model_sync_steps: int = _option(512, "Optimizer steps between them.")
    epsilon: float = _option(0.2, "Lower clipping range of the probability ratio.")
    epsilon_high: float | None = _option(None, "Upper clipping range; epsilon if unset.")
    delta: float | None = _option(None, "Upper bound of the unclipped ratio (two-sided clipping).")
    importance_sampling_level: Literal["token", "sequence"] = _option("token", "Ratio per token, or sequence (GSPO).")
    use_bias_correction_kl: bool = _option(True, "Multiply the KL estimate by the probability ratio.")
    sapo_temperature_neg: float = _option(1.05, "SAPO's temperature for negative advantages.")
    sapo_temperature_pos: float = _option(1.0, "SAPO's temperature for positive advantages.")
    mask_truncated_completions: bool = _option(False, "Leave completions cut at max_completion_length out of the loss.")
    reward_weights: list[float] | None = _option(None, "One weight per reward function; all 1 if unset.")
    scale_rewards: str = _option("group", "Divide advantages by the deviation of rewards in the group, batch, or none.")

    # Logging
    logging_steps: float = _option(10, "Optimizer steps between log lines; metrics.jsonl holds every step.")
    log_completions: bool = _option(True, "Write every completion to output_dir/completions (parquet).")
    log_multimodal: bool = _option(True, "Keep a thumbnail of each prompt's pictures in that log.")
    num_completions_to_print: int | None = _option(None, "Completions to print at each log; none if unset.")

    profile_steps: str | None = _option(
        None, "FIRST:LAST, both included: write a Perfetto trace of these optimizer steps to output_dir/trace.json."
    )

    # TRL's settings that are not supported yet: refused unless left at their defaults
    multi_objective_aggregation: str = _not_yet("sum_then_normalize")
    top_entropy_quantile: float = _not_yet(1.0)
    off_policy_mask_threshold: float | None = _not_yet(None)
    entropy_coef: float = _not_yet(0.0)
    use_adaptive_entropy: bool = _not_yet(False)
    cast_lm_head_to_fp32: bool = _not_yet(False)
    generation_kwargs: str | None = _not_yet(None)

    # TRL's other engines and knobs
    use_vllm: bool = _ignored(False)
    vllm_mode: str = _ignored("colocate")
    vllm_model_impl: str = _ignored("vllm")
    vllm_enable_sleep_mode: bool = _ignored(False)
    vllm_structured_outputs_regex: str | None = _ignored(None)
    vllm_server_base_url: str | None = _ignored(None)
    vllm_server_host: str = _ignored("0.0.0.0")
    vllm_server_port: int = _ignored(8000)
    vllm_server_timeout: float = _ignored(240.0)
    vllm_group_port: int = _ignored(51216)
    vllm_gpu_memory_utilization: float = _ignored(0.3)
    vllm_max_model_length: int | None = _ignored(None)
    vllm_tensor_parallel_size: int = _ignored(1)
    vllm_importance_sampling_correction: bool = _ignored(True)
    vllm_importance_sampling_mode: str = _ignored("sequence_mask")
    vllm_importance_sampling_clip_max: float | None = _ignored(3.0)
    vllm_importance_sampling_clip_min: float | None = _ignored(None)
    use_transformers_continuous_batching: bool = _ignored(False)
    use_transformers_paged: bool = _ignored(False)
    cache_implementation: str | None = _ignored(None)
    ds3_gather_for_generation: bool = _ignored(True)
    pad_to_multiple_of: str | None = _ignored(None)

    def __post_init__(self) -> None:
        # Without a GPU transformers trains on the CPU anyway, but refuses bf16 unless that was asked for.
        self.use_cpu: bool = self.use_cpu or not torch.accelerator.is_available()
        if self.bf16 is None:
            launcher = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")  # `accelerate launch --mixed_precision`
            self.fp16: bool = self.fp16 or launcher == "fp16"
            on_cuda = torch.cuda.is_available() and not self.use_cpu
            self.bf16 = not self.fp16 and (launcher == "bf16" or (on_cuda and torch.cuda.is_bf16_supported()))
        super().__post_init__()
        if self.engine == "reference":
            logger.warning("engine=reference is called plain now; plain is used.")
            self.engine = "plain"
        self.scale_rewards = {"True": "group", "False": "none"}.get(str(self.scale_rewards), self.scale_rewards)
        if self.load_best_model_at_end and getattr(self, "metric_for_best_model", None) in (None, "loss"):
            self.metric_for_best_model: str = "reward"
            self.greater_is_better: bool = True
        self._drop_missing_reporters()
        self._drop_liger()
        self._warn_ignored()
        self._validate()

    # transformers reads these fields from JSON when they come from the command line.
    _VALID_DICT_FIELDS = (*TrainingArguments._VALID_DICT_FIELDS, "model_init_kwargs", "chat_template_kwargs")

    @property
    def model_kwargs(self) -> dict[str, Any]:
        """`model_init_kwargs` as parsed."""
        return _parsed("model_init_kwargs", self.model_init_kwargs)

    @property
    def template_kwargs(self) -> dict[str, Any]:
        """`chat_template_kwargs` as parsed."""
        return _parsed("chat_template_kwargs", self.chat_template_kwargs)

    @property
    def profiled_steps(self) -> tuple[int, int] | None:
        """`profile_steps` as numbers."""
        if self.profile_steps is None:
            return None
        first, _, last = self.profile_steps.partition(":")
        valid = first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)
        _check("profile_steps", self.profile_steps, valid, "FIRST:LAST, such as 3:6, counted from 1")
        return int(first), int(last)

    @property
    def completions_per_micro_batch(self) -> int:
        """Completions in one forward pass of one rank."""
        per_prompt = self.num_generations if self.batch_unit == "prompts" else 1
        return self.per_device_train_batch_size * per_prompt

    @property
    def micro_batches_per_rollout(self) -> int:
        """Micro-batches of one rank that one rollout feeds, before repeating it `num_iterations` times."""
        if self.steps_per_generation is not None:
            return self.steps_per_generation
        if self.generation_batch_size is not None:
            return self.generation_batch_size // (self.completions_per_micro_batch * self.world_size)
        return self.gradient_accumulation_steps

    @property
    def prompts_per_rollout(self) -> int:
        """Prompts that one rank answers in one rollout."""
        return self.completions_per_micro_batch * self.micro_batches_per_rollout // self.num_generations

    @property
    def slices_per_rollout(self) -> int:
        """Optimizer steps that one pass over a rollout takes."""
        return self.micro_batches_per_rollout // self.gradient_accumulation_steps

    @property
    def updates_per_rollout(self) -> int:
        """Optimizer steps between two rollouts."""
        return self.slices_per_rollout * self.num_iterations

    def _drop_missing_reporters(self) -> None:
        modules = {"wandb": "wandb", "tensorboard": "tensorboard", "mlflow": "mlflow", "trackio": "trackio"}
        reporters = [self.report_to] if isinstance(self.report_to, str) else list(self.report_to or [])
        missing = [name for name in reporters if name in modules and find_spec(modules[name]) is None]
        if missing:
            logger.warning(
                f"report_to: {', '.join(missing)} not installed; metrics go to metrics.jsonl and TensorBoard instead."
            )
            kept = [name for name in reporters if name not in missing]
            has_tensorboard = find_spec("tensorboard") is not None and "tensorboard" not in kept
            self.report_to: list[str] = [*kept, *(["tensorboard"] if has_tensorboard else [])]

    def _drop_liger(self) -> None:
        if not self.use_liger_kernel:
            return
        if find_spec("liger_kernel") is None:
            lacking = "liger-kernel is not installed"
        elif self.use_cpu or not torch.cuda.is_available():
            lacking = "its kernels need a CUDA device"
        else:
            return
        logger.warning(f"use_liger_kernel: {lacking}; the model's own layers are used instead.")
        self.use_liger_kernel: bool = False

    def _warn_ignored(self) -> None:
        named = [
            f.name for f in fields(self) if f.metadata.get("help") == IGNORED and getattr(self, f.name) != f.default
        ]
        if named:
            logger.warning(f"Ignored, the sampler is fastgrpo's own: {', '.join(named)}.")

    def _validate(self) -> None:
        group = self.num_generations
        per_rollout = self.completions_per_micro_batch * self.micro_batches_per_rollout
        if group < 2:
            raise ValueError(
                f"num_generations={group}: a group needs at least 2 completions, since advantages compare them. "
                "Set num_generations to 2 or more."
            )
        per_micro_batch = self.completions_per_micro_batch * self.world_size
        if self.generation_batch_size is not None and (
            self.steps_per_generation is not None or self.generation_batch_size % per_micro_batch
        ):
            raise ValueError(
                f"generation_batch_size={self.generation_batch_size}: make it a multiple of the {per_micro_batch} "
                "completions of a micro-batch over all ranks, and leave steps_per_generation unset."
            )
        if self.load_best_model_at_end and self.updates_per_rollout > 1:
            raise ValueError(
                "load_best_model_at_end=True needs a checkpoint at every evaluation, but saves wait for the end of a "
                f"rollout, which feeds {self.updates_per_rollout} steps. Leave it off, or train once on each rollout."
            )
        if per_rollout % group or per_rollout == 0:
            raise ValueError(
                f"per_device_train_batch_size={self.per_device_train_batch_size} × {self.micro_batches_per_rollout} "
                f"accumulated is {per_rollout} completions a rank, which num_generations={group} does not divide. Make "
                "it a multiple, or pass --batch_unit prompts to count prompts instead of completions."
            )
        if self.micro_batches_per_rollout % self.gradient_accumulation_steps:
            raise ValueError(
                f"steps_per_generation={self.micro_batches_per_rollout} is not a multiple of "
                f"gradient_accumulation_steps={self.gradient_accumulation_steps}. Make it one."
            )
        if self.prompts_per_rollout % self.slices_per_rollout:
            raise ValueError(
                f"{self.prompts_per_rollout} prompts a rollout cannot be shared evenly by {self.slices_per_rollout} "
                "optimizer steps. Make per_device_train_batch_size × gradient_accumulation_steps a multiple of "
                "num_generations, or pass --batch_unit prompts."
            )
        _check("loss_type", self.loss_type, self.loss_type in LOSS_TYPES, f"one of {', '.join(LOSS_TYPES)}")
        _check(
            "scale_rewards",
            self.scale_rewards,
            self.scale_rewards in ("group", "batch", "none"),
            "group, batch or none",
        )
        _check("batch_unit", self.batch_unit, self.batch_unit in ("completions", "prompts"), "completions or prompts")
        _check("prompt_mode", self.prompt_mode, self.prompt_mode in ("base", "instruct"), "base or instruct")
        _check("prompt_template", self.prompt_template, self.prompt_template in ("paper", "answer"), "paper or answer")
        _check("engine", self.engine, self.engine in ("fast", "plain"), "fast or plain")
        _check("attn_backend", self.attn_backend, self.attn_backend in ATTN_BACKENDS, " or ".join(ATTN_BACKENDS))
        for name in ("token_budget", "logprob_bytes", "sampler_max_rows", "sampler_max_cache_tokens"):
            value = getattr(self, name)
            _check(name, value, value is None or value > 0, "1 or more")
        _check("vision_cache_bytes", self.vision_cache_bytes, self.vision_cache_bytes >= 0, "0 (off) or more")
        _check("temperature", self.temperature, self.temperature > 0, "a number above 0")
        _check("top_p", self.top_p, 0 < self.top_p <= 1, "a number above 0 and at most 1")
        _check("top_k", self.top_k, self.top_k >= 0, "0 (off) or a positive number")
        _check("max_completion_length", self.max_completion_length, self.max_completion_length > 0, "1 or more")
        _check("num_iterations", self.num_iterations, self.num_iterations > 0, "1 or more")
        _check("beta", self.beta, self.beta >= 0, "0 or more")
        if self.sync_ref_model and self.beta == 0:
            raise ValueError("sync_ref_model=True, but with beta=0.0 there is no reference: set beta above 0.")
        if self.ref_model_on_cpu and self.beta == 0:
            raise ValueError("ref_model_on_cpu=True, but with beta=0.0 there is no reference: set beta above 0.")
        _check(
            "ref_model_mixup_alpha",
            self.ref_model_mixup_alpha,
            0 < self.ref_model_mixup_alpha <= 1,
            "a number above 0 and at most 1",
        )
        _check("ref_model_sync_steps", self.ref_model_sync_steps, self.ref_model_sync_steps > 0, "1 or more")
        _check("epsilon", self.epsilon, self.epsilon >= 0, "0 or more")
        _ = self.profiled_steps  # raises when it cannot be read
        for name in ("model_init_kwargs", "chat_template_kwargs"):
            value = getattr(self, name)
            _check(name, value, value is None or isinstance(value, dict), 'a JSON object such as {"a": 1}')
        for f in fields(self):
            if f.metadata.get("help") == NOT_YET and getattr(self, f.name) != f.default:
                raise ValueError(f"{f.name}={getattr(self, f.name)!r} is not supported yet: leave it at {f.default!r}.")
        if self.torch_compile and self.engine == "fast":
            raise ValueError(
                "torch_compile=True: no two packed micro-batches have one shape, so each would be compiled anew. Leave "
                "it off, or set engine to plain."
            )
        if self.auto_find_batch_size:
            raise ValueError("auto_find_batch_size=True would split groups; set per_device_train_batch_size instead.")


def _parsed(name: str, value: dict[str, Any] | str | None) -> dict[str, Any]:
    if isinstance(value, str):
        raise ValueError(f"{name}={value!r} is not a JSON object: pass one such as '{{\"key\": 1}}'.")
    return value or {}


def _check(name: str, value: Any, valid: bool, wanted: str) -> None:
    if not valid:
        raise ValueError(f"{name}={value!r} is not valid: use {wanted}.")
