"""What the flags of a run name beside its settings: model, adapters, data, rewards, scores."""

from collections.abc import Iterable
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, Literal

from transformers.utils import logging

from fastgrpo.cli.options import require_no_splits
from fastgrpo.settings.limits import check_limits, option

logger = logging.get_logger(__name__)

MAPPED = {
    "torch_dtype": "dtype",
    "dataset_streaming": "rows are read from disk as they are needed",
    "ignore_bias_buffers": "has no effect",
    "max_seq_length": "max_length: rows of more tokens are skipped",
    "packing": "rows are always packed, without padding; batches count rows",
    "eval_packing": "likewise",
    "packing_strategy": "first fit",
    "padding_free": "it always is",
    "pad_token": "nothing is padded",
    "pad_to_multiple_of": "nothing is padded",
    "truncation_mode": "rows are skipped, never cut",
    "eos_token": "answers end as the chat template, or else the tokenizer, ends them",
    "completion_only_loss": "the opposite of train_on_prompt",
    "assistant_only_loss": "the opposite of train_on_prompt",
    "dataset_text_field": "columns are known by their names",
    "dataset_kwargs": "has no effect",
    "dataset_num_proc": "dataloader_num_workers prepare rows",
    "dataset_batch_size": "dataloader_num_workers prepare rows",
}
"""Flags of TRL's programs that are taken → what happens."""


TAKEN = "A TRL flag that is mapped, which a warning says."


def _mapped(default: Any = None, at_least: float | None = None) -> Any:
    return option(default, TAKEN, at_least=at_least)


def _mapped_switch() -> Any:
    """Of true and false; unset is a third value, so argparse must be told that the flag may stand alone."""
    return field(default=None, metadata={"help": TAKEN, "nargs": "?", "const": True})


@dataclass
class RunArguments:
    """Model, data and evaluation of a run, whatever it trains by."""

    model_name_or_path: str = field(metadata={"help": "Hub id or folder of the model to train, or of adapters."})
    dataset_name: str = field(metadata={"help": "Hub id, file (parquet, json, csv) or folder of the training rows."})
    model_revision: str = option("main", "Branch, tag or commit of a model on the hub.")
    dataset_config: str | None = option(None, "The data set's configuration on the hub.")
    dataset_train_split: str = option("train", "Its split to train on.")
    dataset_test_split: str = option("test", "Its split for eval_strategy, without eval_dataset_name.")
    max_samples: int | None = option(None, "Train on the first rows only.", at_least=1)
    single_image_only: bool = option(False, "Leave out rows with several pictures.")
    picture_folders: list[str] | None = option(None, "Other folders its pictures may lie in.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "float32", "Of the parameters and the optimizer; --bf16 sets what is computed in."
    )
    attn_implementation: str | None = option(None, "sdpa, flash_attention_2, eager.")
    min_pixels: int | None = option(None, "Least area of a picture, height × width.", at_least=1)
    max_pixels: int | None = option(None, "Largest area of a picture, height × width.", at_least=1)
    freeze_vision: bool = option(False, "Freeze the vision tower; its merger trains.")
    freeze_llm: bool = option(False, "Freeze the language model; the merger trains.")
    use_peft: bool = option(False, "Train LoRA adapters instead of the model's own weights.")
    lora_r: int = option(16, "The adapters' rank.", at_least=1)
    lora_alpha: int = option(32, "Their products are scaled by lora_alpha / lora_r.", at_least=1)
    lora_dropout: float = option(0.05, "Share of an adapter's inputs dropped in the update.", at_least=0, at_most=1)
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["q_proj", "v_proj"],
        metadata={"help": "Layers that get an adapter, by the ends of their names; or all-linear."},
    )
    lora_target_parameters: list[str] | None = option(None, "Parameters that get an adapter, where no layer has them.")
    lora_modules_to_save: list[str] | None = option(
        None, "Modules to train whole and save beside the adapters, such as merger."
    )
    lora_task_type: str = option("CAUSAL_LM", "What the adapters say of the task.", choices=("CAUSAL_LM",))
    use_rslora: bool = option(False, "Scale by lora_alpha / √lora_r instead.")
    use_dora: bool = option(False, "Train magnitudes apart from directions (DoRA); rollouts are slower.")
    load_in_8bit: bool = option(False, "Load the base with weights of 8 bits (bitsandbytes, on a GPU).")
    load_in_4bit: bool = option(False, "Load it with weights of 4 bits.")
    bnb_4bit_quant_type: str = option("nf4", "The kind of 4 bits.", choices=("fp4", "nf4"))
    use_bnb_nested_quant: bool = option(False, "Quantize the scales of 4 bits too.")
    bnb_4bit_quant_storage: str | None = option(None, "The dtype that 4-bit weights are stored in.")
    eval_dataset_name: str | None = option(
        None, "Held-out rows (CV-Bench or SAT schema) to score before and after training."
    )
    eval_split: str = option("test", "Their split on the hub.")
    eval_max_samples: int | None = option(None, "Score the first rows only.", at_least=1)
    eval_max_new_tokens: int = option(1024, "Most tokens in a scored response.", at_least=1)
    eval_pass_at_k: int = option(0, "Also sample k responses a question before training.", at_least=0)
    eval_shuffles: int = option(1, "Times to ask all questions about shuffled pictures after training.", at_least=0)

    torch_dtype: str | None = _mapped()
    dataset_streaming: bool = _mapped(False)
    ignore_bias_buffers: bool = _mapped(False)

    def __post_init__(self) -> None:
        check_limits(self, {})
        self.map_flags()
        if self.use_peft and (self.freeze_vision or self.freeze_llm):
            raise ValueError("use_peft=True freezes the whole model already: leave freeze_vision and freeze_llm off.")
        if not self.use_peft and (given := changed(self, adapter_flags(self))):
            raise ValueError(f"{', '.join(given)}: set without use_peft, so no adapters would be trained: add it.")
        require_no_splits(self.dataset_name, changed(self, ("dataset_config", "dataset_train_split")))
        require_no_splits(self.eval_dataset_name or "", changed(self, ("eval_split",)))

    def map_flags(self) -> None:
        """Warns of the flags that are taken for something else, in one line, and takes them."""
        given = changed(self, [name for name in MAPPED if hasattr(self, name)])
        if self.torch_dtype is not None:
            given.remove("torch_dtype")  # the older name, nothing more
            if self.torch_dtype not in ("auto", "float32", "bfloat16", "float16"):
                raise ValueError(
                    f"torch_dtype={self.torch_dtype!r} is not valid: use auto, float32, bfloat16, float16."
                )
            self.dtype = self.torch_dtype  # type: ignore[assignment]
        if given:
            told = "; ".join(f"{name}={getattr(self, name)} ({MAPPED[name]})" for name in given)
            logger.warning(f"Flags taken over: {told}.")


@dataclass
class ScriptArguments(RunArguments):
    """Those, and the rewards of GRPO."""

    reward_funcs: list[str] = field(
        default_factory=lambda: ["accuracy", "format"],
        metadata={"help": "Reward functions: accuracy, format, length, or module:function of a file of yours."},
    )
    reward_model_name_or_path: str | None = option(
        None, "Hub id or folder of a reward model; beside it, only the reward_funcs that are named count."
    )

    @property
    def rewards(self) -> list[str]:
        """The reward model and the reward functions, by name."""
        if self.reward_model_name_or_path is None:
            return self.reward_funcs
        return [self.reward_model_name_or_path, *(self.reward_funcs if changed(self, ["reward_funcs"]) else [])]


@dataclass
class SFTArguments(RunArguments):
    """Those, and flags of TRL's SFT that are taken over."""

    max_seq_length: int | None = _mapped(at_least=1)
    packing: bool | None = _mapped_switch()
    eval_packing: bool | None = _mapped_switch()
    packing_strategy: str | None = _mapped()
    padding_free: bool | None = _mapped_switch()
    pad_token: str | None = _mapped()
    pad_to_multiple_of: str | None = _mapped()
    truncation_mode: str | None = _mapped()
    eos_token: str | None = _mapped()
    completion_only_loss: bool | None = _mapped_switch()
    assistant_only_loss: bool | None = _mapped_switch()
    dataset_text_field: str | None = _mapped()
    dataset_kwargs: str | None = _mapped()
    dataset_num_proc: int | None = _mapped()
    dataset_batch_size: int | None = _mapped()


def adapter_flags(script: RunArguments) -> list[str]:
    """The flags that describe new adapters."""
    return [one.name for one in fields(script) if one.name.startswith("lora_")] + ["use_rslora", "use_dora"]


def changed(settings: Any, names: Iterable[str]) -> list[str]:
    """The names among `names` whose value is not the field's default."""
    known = {field.name: field for field in fields(settings)}
    return [name for name in names if getattr(settings, name) != _default(known[name])]


def _default(field: Field[Any]) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()
