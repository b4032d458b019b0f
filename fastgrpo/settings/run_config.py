"""`RunConfig`: transformers' training arguments, plus what every run of ours has whatever it trains by."""

import copy
import json
import os
from dataclasses import dataclass, field, fields
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from typing import Any, Literal, Self

import torch
from fastgrpo_profiling.memory_estimate import TOKEN_BUDGET
from huggingface_hub.utils import validate_repo_id
from torch.utils.checkpoint import checkpoint
from transformers import TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.utils import logging

from fastgrpo.safe_text.redaction import redacted
from fastgrpo.settings.batch_plan import BatchPlan
from fastgrpo.settings.given import given
from fastgrpo.settings.limits import Limits, check_limits, option

logger = logging.get_logger(__name__)

MOST_GUESSES = 31
ATTN_BACKENDS: tuple[str, ...] = ("auto", "varlen", "cpu", "math", "flash_attn")

INHERITED = {
    **dict.fromkeys(
        ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"),
        Limits(at_least=1),
    ),
    **dict.fromkeys(("num_train_epochs", "eval_steps", "save_steps"), Limits(above=0)),
    **dict.fromkeys(
        ("weight_decay", "max_grad_norm", "warmup_steps", "dataloader_num_workers"),
        Limits(at_least=0),
    ),
    **dict.fromkeys(("seed", "data_seed"), Limits(at_least=0, at_most=2**32 - 1)),  # numpy's
    **dict.fromkeys(
        ("adam_beta1", "adam_beta2", "label_smoothing_factor"),
        Limits(at_least=0, at_most=1),
    ),
    **dict.fromkeys(("adam_epsilon", "neftune_noise_alpha"), Limits(above=0)),
    **dict.fromkeys(
        (
            "ddp_timeout",
            "dataloader_prefetch_factor",
            "save_total_limit",
            "ddp_bucket_cap_mb",
            "torch_empty_cache_steps",
        ),
        Limits(at_least=1),
    ),
    "eval_delay": Limits(at_least=0),
    "max_steps": Limits(at_least=-1),
}
"""What transformers does not check of its own settings."""


FILES_OF_JSON = ("deepspeed", "accelerator_config", "fsdp_config")
"""Settings that may name a file instead of holding an object."""


@dataclass
class RunConfig(TrainingArguments):
    """Settings that GRPO and supervised fine-tuning share; subclasses bring `batch_plan`.

    Raises:
        ValueError: a field has a value that cannot work; the message names the field, the value and the fix.
    """

    remove_unused_columns: bool = option(False, "Rows are read whole, so no column is removed.")
    bf16: bool | None = field(
        default=None,
        # The parser lets a flag stand without a value only where the default is no None.
        metadata={
            "help": "Mixed precision in bf16; by default on where a CUDA device supports it.",
            "nargs": "?",
            "const": True,
        },
    )
    gradient_checkpointing: str = field(
        default="auto",
        metadata={
            "help": "Compute layers again in the backward pass instead of keeping their activations; auto: where a "
            "step would not fit the GPU otherwise, by an estimate that is logged.",
            "nargs": "?",
            "const": "true",
        },
    )
    dataloader_num_workers: int | None = option(
        None, "Processes that prepare prompts and pictures ahead; by default 2 on a GPU, none elsewhere."
    )
    resume_from_checkpoint: str | None = option(
        None, "A checkpoint folder, or `last`: the newest of output_dir, from the start where there is none."
    )

    resume_changed: bool = option(False, "Resume though data, seed, batches or rewards changed.")
    on_nonfinite: Literal["stop", "skip"] = option(
        "stop", "What to do at a loss or gradients that are not finite.", choices=("stop", "skip")
    )

    # The model and its prompts
    model_init_kwargs: dict[str, Any] | str | None = option(None, "Keyword arguments of `from_pretrained` (JSON).")
    trust_remote_code: bool = option(False, "Allow the model's repository to run its own code here.")
    disable_dropout: bool = option(False, "Set every dropout of the policy to 0.")
    prompt_mode: Literal["base", "instruct"] = option(
        "base",
        "`base`: plain text without roles, for a model never instruction-tuned; `instruct`: chat template.",
        choices=("base", "instruct"),
    )
    chat_template_kwargs: dict[str, Any] | str | None = option(None, "Extra variables of the chat template (JSON).")
    shuffle_dataset: bool = option(True, "Draw the prompts in a seeded random order, anew each epoch.")

    # The machine: none of this changes what is trained, beyond floating-point order
    engine: str = option(
        "fast",
        "`fast`: paged sampler and packed update; `plain`: HF generate and padded batches.",
        choices=("fast", "plain"),
    )
    token_budget: int = option(
        TOKEN_BUDGET, "Input tokens of a packed micro-batch; a group's prompt counts once.", at_least=1
    )
    attn_backend: str = option(
        "auto", "Attention of the packed update: " + ", ".join(ATTN_BACKENDS) + ".", choices=ATTN_BACKENDS
    )
    logprob_bytes: int | None = option(
        None,
        "Scratch of the LM head's log-probs; with room for tokens × vocabulary × 2 nothing is computed twice. Half of "
        "what a GPU has free if unset, 1 GiB on CPU.",
        at_least=1,
    )
    vision_cache_bytes: int = option(
        1 << 30,
        "Features of pictures to keep, where the vision tower is frozen: none goes through it twice; 0 is off.",
        at_least=0,
    )
    sampler_max_rows: int = option(256, "Completions that run at a time.", at_least=1)
    sampler_max_cache_tokens: int | None = option(
        None, "Size of the KV cache; what a rollout needs if unset, on a GPU within its free memory.", at_least=1
    )
    speculate: str = option(
        "auto",
        "Most tokens guessed for a completion in a decode step, from what the run drew before, and checked: what "
        "is drawn does not depend on it. `off` and, until more than the demo was measured, `auto`: none.",
    )

    # Logging
    logging_steps: float = option(10, "Optimizer steps between log lines; metrics.jsonl holds every step.", at_least=0)
    profile_steps: str | None = option(
        None, "FIRST:LAST, both included: write a Perfetto trace of these optimizer steps to output_dir/trace.json."
    )

    def __post_init__(self) -> None:
        self.deepspeed: Any = self.deepspeed or None  # "" takes back what a file says
        if self.engine == "reference":
            logger.warning("engine=reference is called plain now; plain is used.")
            self.engine = "plain"
        self._check_objects()
        check_limits(self, INHERITED)  # before transformers counts with them
        # Without a GPU transformers trains on the CPU anyway, but refuses bf16 unless that was asked for.
        self.use_cpu: bool = self.use_cpu or not torch.accelerator.is_available()
        if self.bf16 is None:
            launcher = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")  # `accelerate launch --mixed_precision`
            self.fp16: bool = self.fp16 or launcher == "fp16"
            on_cuda = torch.cuda.is_available() and not self.use_cpu
            self.bf16 = not self.fp16 and (launcher == "bf16" or (on_cuda and torch.cuda.is_bf16_supported()))
        if self.dataloader_num_workers is None:
            self.dataloader_num_workers = 0 if self.use_cpu or not torch.cuda.is_available() else 2
        self._resolve_checkpointing()
        super().__post_init__()
        # A reward function that changes the working directory would split the run over two folders.
        self.output_dir: str = str(Path(self.output_dir).absolute())
        self._validate()
        self._drop_missing_reporters()
        if self.use_liger_kernel and (lacking := lacking_for_liger(self.use_cpu)):
            logger.warning(f"use_liger_kernel: {lacking}; the model's own layers are used instead.")
            self.use_liger_kernel: bool = False

    # transformers reads these fields from JSON when they come from the command line.
    _VALID_DICT_FIELDS = (*TrainingArguments._VALID_DICT_FIELDS, "model_init_kwargs", "chat_template_kwargs")

    def to_dict(self) -> dict[str, Any]:
        """The settings as they are written down, by whatever writes them: without tokens and keys."""
        return redacted(super().to_dict())

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled: transformers does so beside a model and before an upload."""
        return redacted(vars(self))

    def __copy__(self) -> Self:  # otherwise by way of `__getstate__`
        made = type(self).__new__(type(self))
        made.__dict__.update(vars(self))
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        made = type(self).__new__(type(self))
        made.__dict__.update(copy.deepcopy(vars(self), memo))
        return made

    @property
    def batch_plan(self) -> BatchPlan:
        """How rows become micro-batches and optimizer steps."""
        raise NotImplementedError

    @property
    def needs_reference(self) -> bool:
        """Whether a frozen model's log-probs enter the loss."""
        return False

    @property
    def needs_entropies(self) -> bool:
        """Whether an update needs every token's entropy before its gradients."""
        return False

    @property
    def longest(self) -> tuple[int | None, int]:
        """Most tokens of a prompt (None: not bounded) and of its completion."""
        raise NotImplementedError

    @property
    def guesses(self) -> int:
        """`speculate` as a number.

        Raises:
            ValueError: it is neither a number nor a word that it may be.
        """
        text = str(self.speculate).lower()
        if text in ("auto", "off", "false"):  # YAML reads `off` as False
            return 0
        if not text.isdecimal() or int(text) > MOST_GUESSES:
            raise ValueError(f"speculate={self.speculate!r} is not valid: use auto, off or 1 to {MOST_GUESSES}.")
        return int(text)

    @property
    def model_kwargs(self) -> dict[str, Any]:
        """`model_init_kwargs` as parsed."""
        return parsed("model_init_kwargs", self.model_init_kwargs)

    @property
    def template_kwargs(self) -> dict[str, Any]:
        """`chat_template_kwargs` as parsed."""
        return parsed("chat_template_kwargs", self.chat_template_kwargs)

    @property
    def profiled_steps(self) -> tuple[int, int] | None:
        """`profile_steps` as numbers."""
        if self.profile_steps is None:
            return None
        first, _, last = self.profile_steps.partition(":")
        valid = first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)
        if not valid:
            raise ValueError(
                f"profile_steps={self.profile_steps!r} is not valid: use FIRST:LAST, such as 3:6, counted from 1."
            )
        return int(first), int(last)

    def _resolve_checkpointing(self) -> None:
        """transformers takes True or False; what `auto` means is decided when the model is known."""
        newer_name = getattr(self, "activation_checkpointing", None)
        choice = str(self.gradient_checkpointing if newer_name is None else newer_name).lower()
        answers = {"auto": None, "none": False}
        answers |= dict.fromkeys(("true", "1", "yes", "on"), True) | dict.fromkeys(("false", "0", "no", "off"), False)
        if choice not in answers:
            raise ValueError(f"gradient_checkpointing={choice!r} is not valid: use true, false or auto.")
        self.decides_checkpointing = answers[choice] is None
        self.gradient_checkpointing = answers[choice]  # type: ignore[assignment]

    def _drop_missing_reporters(self) -> None:
        modules = {"wandb": "wandb", "tensorboard": "tensorboard", "mlflow": "mlflow", "trackio": "trackio"}
        reporters = [self.report_to] if isinstance(self.report_to, str) else list(self.report_to or [])
        known = ("all", "none", *INTEGRATION_TO_CALLBACK)
        if unknown := next((name for name in reporters if name not in known), None):
            raise ValueError(f"report_to={unknown!r} is not valid: use {', '.join(known)}.")
        missing = [name for name in reporters if name in modules and find_spec(modules[name]) is None]
        if missing:
            logger.warning(
                f"report_to: {', '.join(missing)} not installed; metrics go to metrics.jsonl and TensorBoard instead."
            )
            kept = [name for name in reporters if name not in missing]
            has_tensorboard = find_spec("tensorboard") is not None and "tensorboard" not in kept
            self.report_to: list[str] = [*kept, *(["tensorboard"] if has_tensorboard else [])]

    def _check_objects(self) -> None:
        """What transformers would say of a slip in JSON names neither the setting nor the file."""
        for name in self._VALID_DICT_FIELDS:
            value = getattr(self, name)
            is_file = isinstance(value, str) and name in FILES_OF_JSON and not value.startswith("{")
            if is_file and value and not Path(value).is_file():
                raise ValueError(f"{name}={value!r}: there is no such file. Name one, or use a JSON object.")
            if isinstance(value, str) and value:
                try:
                    value = json.loads(Path(value).read_text() if is_file else value)
                except ValueError as error:
                    raise ValueError(f"{name}={value!r} is not JSON: {error}. Use a JSON object.") from error
                if not isinstance(value, dict):
                    raise ValueError(f"{name}={getattr(self, name)!r} is a {type(value).__name__}: use a JSON object.")
            if name == "accelerator_config" and isinstance(value, dict):
                known = ", ".join(one.name for one in fields(AcceleratorConfig))
                with given(f"{name}={value}", f"Use {known}."):
                    AcceleratorConfig(**value)
            if name.endswith("checkpointing_kwargs") and isinstance(value, dict):
                options = list(signature(checkpoint).parameters)[1:]
                if unknown := next((one for one in value if one not in options), None):
                    raise ValueError(
                        f"{name}: {unknown} is not an option of torch's checkpoint: use {', '.join(options)}."
                    )
            if name == "deepspeed" and isinstance(value, dict):
                zero = value.get("zero_optimization")
                if not isinstance(zero, dict) or zero.get("stage", 0) not in (0, 1, 2, 3):
                    raise ValueError(
                        f"deepspeed: zero_optimization={zero} is not valid: use an object with a stage of 0 to 3."
                    )

    def _validate(self) -> None:
        check_limits(self, INHERITED)
        if self.max_steps == 0:
            raise ValueError("max_steps=0 is not valid: use 1 or more, or -1 to go by num_train_epochs.")
        if self.optim_args and not all("=" in part for part in self.optim_args.split(",")):
            raise ValueError(
                f"optim_args={self.optim_args!r} is not valid: use name=value, several set apart by commas."
            )
        _ = self.batch_plan  # raises where sizes do not divide
        _ = (
            self.profiled_steps,
            self.model_kwargs,
            self.template_kwargs,
            self.guesses,
        )  # they raise when they cannot be read
        for name in ("hub_model_id", "log_completions_hub_repo"):
            if repository := getattr(self, name, None):
                with given(f"{name}={repository!r}", "Use NAME or OWNER/NAME."):
                    validate_repo_id(repository)
        if self.on_nonfinite == "skip" and self.deepspeed:
            raise ValueError("on_nonfinite='skip': DeepSpeed steps by itself, so no step can be left out: use stop.")
        if self.torch_compile and self.engine == "fast":
            raise ValueError(
                "torch_compile=True: no two packed micro-batches have one shape, so each would be compiled anew. Leave "
                "it off, or set engine to plain."
            )
        if self.auto_find_batch_size:
            raise ValueError("auto_find_batch_size=True would split groups; set per_device_train_batch_size instead.")


def lacking_for_liger(use_cpu: bool) -> str | None:
    """What Liger's kernels lack here; None where they run."""
    if find_spec("liger_kernel") is None:
        return "liger-kernel is not installed"
    return "its kernels need a CUDA device" if use_cpu or not torch.cuda.is_available() else None


def parsed(name: str, value: dict[str, Any] | str | None) -> dict[str, Any]:
    """A setting of keyword arguments, whether given as an object or left out."""
    if value is None or isinstance(value, dict):
        return value or {}
    raise ValueError(f"{name}={value!r} is not valid: use a JSON object such as '{{\"a\": 1}}'.")
