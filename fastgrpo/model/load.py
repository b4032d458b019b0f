"""Loads a checkpoint in hub format: the policy, its tokenizer and its image processor."""

import copy
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.integrations import deepspeed as hf_deepspeed

# Straight from its module: the top-level name is a stub in transformers 5.12 where torchvision is missing.
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.utils import is_flash_attn_2_available

from fastgrpo.model.adapters import adapter_base, processing_source
from fastgrpo.model.families import Family, family_of
from fastgrpo.model.freezing import freeze
from fastgrpo.model.picture_styles import Tiles
from fastgrpo.safe_text.redaction import redacted
from fastgrpo.settings.given import given

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Processing:
    """Turns text and pictures into a model's inputs."""

    tokenizer: Any
    """A `PreTrainedTokenizerBase`."""
    image_processor: Any | None
    """The one that comes with the model; None for a text-only model."""
    family: Family
    """How the model takes pictures."""

    def __getattr__(self, name: str) -> Any:
        """What only a tokenizer has, such as `decode`: scripts ask a trainer's processing class for it."""
        if name.startswith("__") or name == "tokenizer":  # while it is unpickled
            raise AttributeError(name)
        return getattr(self.tokenizer, name)

    def save_pretrained(self, folder: str) -> None:
        """Writes both in hub format beside a model's weights."""
        self.tokenizer.save_pretrained(folder)
        if self.image_processor is not None:
            self.image_processor.save_pretrained(folder)


def load_processing(
    name_or_path: str,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> Processing:
    """Loads tokenizer and image processor, each on its own.

    The joint processor class is not used: it needs torchvision, for videos. Pictures are resized by PIL on every
    machine, so prompts do not depend on whether torchvision is installed.

    Args:
        name_or_path: a folder or hub id.
        min_pixels: least area of a picture after resizing, height × width in pixels; None keeps the
            checkpoint's own bound.
        max_pixels: largest such area.
        trust_remote_code: run code that comes with the checkpoint.
        revision: branch, tag or commit of a hub model.

    Raises:
        ValueError: no such checkpoint, no tokenizer in it or not the model's (`checked_processing`), or bounds that are
            not positive, cross or mean nothing to the model's family.
    """
    bounds = {"min_pixels": min_pixels, "max_pixels": max_pixels}
    pixels = {name: value for name, value in bounds.items() if value is not None}
    for name, value in pixels.items():
        if value < 1:
            raise ValueError(f"{name}={value} must be positive: it is an area in pixels")
    config = load_config(name_or_path, trust_remote_code, revision)
    if pixels and isinstance((family := family_of(config)).style, Tiles):
        name = next(iter(pixels))
        raise ValueError(f"{name}={pixels[name]}, but {family.name} cuts pictures into tiles of one size: leave it out")
    name_or_path = processing_source(name_or_path)
    options = {"trust_remote_code": trust_remote_code, "revision": revision or "main"}
    with given(f"model_name_or_path={name_or_path!r} has no usable tokenizer", "Save the model's own beside it."):
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, **options)
    source, image_processor = f"model_name_or_path={name_or_path!r}", None
    _require_vocabulary(tokenizer, source)
    if takes_images(config):
        tokenizer.chat_template = _processors_template(name_or_path) or tokenizer.chat_template
        image_processor = _load_image_processor(name_or_path, family_of(config), {**options, **pixels})
    return checked_processing(tokenizer, image_processor, config, source)


def _load_image_processor(name_or_path: str, family: Family, options: dict[str, Any]) -> Any:
    try:
        with given(f"model_name_or_path={name_or_path!r} has no usable image processor (preprocessor_config.json)"):
            image_processor = AutoImageProcessor.from_pretrained(name_or_path, backend="pil", **options)
    except ValueError:
        if family.image_token is None:  # trains on text alone
            return None
        raise
    if family.image_token is not None and not isinstance(family.style, Tiles):
        smallest, largest = image_processor.size["shortest_edge"], image_processor.size["longest_edge"]
        if smallest > largest:
            raise ValueError(f"min_pixels={smallest} exceeds max_pixels={largest}: set both")
    return image_processor


def _processors_template(name_or_path: str) -> Any | None:
    """The chat template of a checkpoint's processor, which takes precedence over the tokenizer's; or None."""
    try:
        return ProcessorMixin.get_processor_dict(name_or_path)[0].get("chat_template")
    except OSError:
        return None


def checked_processing(tokenizer: Any, image_processor: Any, config: PretrainedConfig, source: str) -> Processing:
    """Checks that tokenizer and image processor fit the model; drops the image processor of a text model.

    Args:
        config: the model's.
        source: where they come from, for messages.

    Raises:
        ValueError: an empty vocabulary, an image processor of another kind than the model's family needs, or another
            placeholder than the model's.
    """
    _require_vocabulary(tokenizer, source)
    family = family_of(config)
    if not takes_images(config):
        image_processor = None
    elif image_processor is not None and family.image_token is not None:
        if not isinstance(family.style, Tiles) and not hasattr(image_processor, "merge_size"):
            raise ValueError(
                f"{source} has a {type(image_processor).__name__}, which cuts no patch grids: {family.name} needs the "
                "image processor that comes with it"
            )
        token = tokenizer.get_vocab().get(family.image_token)
        if token != config.image_token_id:
            raise ValueError(
                f"{source} has a tokenizer in which {family.image_token} is {token}, but the model takes "
                f"{config.image_token_id} for a picture: use the model's own"
            )
    return Processing(tokenizer, image_processor, family)


def _require_vocabulary(tokenizer: Any, source: str) -> None:
    if not tokenizer("a", add_special_tokens=False)["input_ids"]:
        # transformers returns this silently for a folder without tokenizer files.
        raise ValueError(f"{source} has no usable tokenizer: its vocabulary is empty")


def processing_from(given: Any, config: PretrainedConfig) -> Processing:
    """Tokenizer and image processor from a user's `processing_class`: a processor or a tokenizer.

    Raises:
        ValueError: neither, or not this model's (`checked_processing`).
    """
    source = f"processing_class={type(given).__name__}"
    tokenizer = getattr(given, "tokenizer", given)
    if not hasattr(tokenizer, "get_vocab"):
        raise ValueError(f"{source} has no tokenizer: pass the model's processor or tokenizer")
    template = getattr(given, "chat_template", None)
    if template and template != tokenizer.chat_template:
        tokenizer = copy.copy(tokenizer)  # the user's keeps its own
        tokenizer.chat_template = template
    return checked_processing(tokenizer, getattr(given, "image_processor", None), config, source)


def load_policy(
    name_or_path: str,
    *,
    dtype: torch.dtype | str | None = None,
    attn_implementation: str | None = None,
    freeze_vision: bool = False,
    freeze_llm: bool = False,
    trust_remote_code: bool = False,
    model_init_kwargs: dict[str, Any] | None = None,
) -> PreTrainedModel:
    """Loads the model to train, from safetensors files only.

    Args:
        name_or_path: a folder or hub id; where it holds adapters, their base is loaded and they train further.
        dtype: of the parameters; None is float32, since the optimizer's master weights stay in float32 and
            autocast gives the compute dtype.
        attn_implementation: attention backend; None leaves the choice to transformers. `flash_attention_2`
            gives way to `sdpa`, with one warning, where flash-attn or a CUDA device is missing.
        freeze_vision: freeze the vision tower, but not the merger that maps its patches into the language
            model.
        freeze_llm: freeze the language model, its embeddings and its head; the vision tower and its merger
            train.
        trust_remote_code: run code that comes with the checkpoint.
        model_init_kwargs: further arguments of `from_pretrained`.

    Raises:
        ValueError: no such checkpoint, no safetensors weights in it, an argument given twice, an unknown
            dtype, or nothing left to freeze or to train.
    """
    arguments = dict(model_init_kwargs or {})
    if "use_safetensors" in arguments:
        raise ValueError("model_init_kwargs sets use_safetensors: take it out, other files are never read")
    trust_remote_code = arguments.pop("trust_remote_code", None) or trust_remote_code
    if "torch_dtype" in arguments:  # the name before transformers 5
        arguments.setdefault("dtype", arguments.pop("torch_dtype"))
    dtype = _merge("dtype", dtype, arguments, torch.float32)
    attn_implementation = _merge("attn_implementation", attn_implementation, arguments, None)
    base = adapter_base(name_or_path)
    if base is not None and (freeze_vision or freeze_llm):
        flag = "freeze_vision" if freeze_vision else "freeze_llm"
        raise ValueError(f"{flag}=True, but {name_or_path} holds adapters, whose base is frozen already: leave it off")
    config = load_config(name_or_path, trust_remote_code, arguments.get("revision"))
    auto_class = AutoModelForImageTextToText if takes_images(config) else AutoModelForCausalLM
    dtype = _resolve_dtype(dtype)
    blamed = f", or model_init_kwargs={redacted(arguments)} do not fit" if arguments else ""
    with (
        whole_weights(),
        given(
            f"model_name_or_path={base or name_or_path!r} has no usable safetensors weights{blamed}",
            "Other weight files are not read; convert them with `save_pretrained`.",
        ),
    ):
        model, report = auto_class.from_pretrained(
            base or name_or_path,
            dtype=dtype,
            attn_implementation=_available_attention(attn_implementation),
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
            **arguments,
        )
    if missing := sorted(report["missing_keys"]):
        raise ValueError(
            f"model_name_or_path={base or name_or_path!r} lacks {len(missing)} of the model's weights, such as "
            f"{missing[0]}: they would be random. Save them all with `save_pretrained`."
        )
    logger.info("attention backend: %s", model.config._attn_implementation)
    freeze(model, freeze_vision, freeze_llm)
    return model if base is None else _with_adapters(model, name_or_path)


def load_merged(name_or_path: str, *, dtype: torch.dtype | str = "auto", trust_remote_code: bool = False) -> Any:
    """Loads a model for use: adapters, if that is what the folder holds, become part of their base's weights.

    Raises:
        ValueError: as `load_policy`.
    """
    model = load_policy(name_or_path, dtype=dtype, trust_remote_code=trust_remote_code)
    merged: Any = model.merge_and_unload() if isinstance(model, PeftModel) else model
    return merged.requires_grad_(False).eval()


def _with_adapters(model: PreTrainedModel, name_or_path: str) -> PeftModel:
    with (
        given(f"model_name_or_path={name_or_path!r}: its adapters do not fit", "Train and save them anew."),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("error", message="Found missing adapter keys")  # they would be random
        return PeftModel.from_pretrained(model, name_or_path, is_trainable=True)


def load_weights(model: PreTrainedModel, checkpoint: Path) -> None:
    """Copies a checkpoint's weights into `model`, all of them; the model must lie whole on this rank.

    A vision-language model's parameters have other names in hub format than in memory. `from_pretrained` maps them;
    transformers' Trainer does not, and skips every name that it does not find.

    Raises:
        ValueError: the checkpoint lacks some of the model's parameters.
    """
    with whole_weights():
        # float32 holds every other dtype's values.
        saved, report = type(model).from_pretrained(checkpoint, dtype=torch.float32, output_loading_info=True)
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"{checkpoint} lacks {len(missing)} of the model's parameters, such as {missing[0]}.")
    model.load_state_dict(saved.state_dict())


def cast_parameters(model: nn.Module, dtype: torch.dtype) -> None:
    """Casts parameters; buffers, such as rotary frequencies, keep their dtype."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def cast_matrices(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Casts only the parameters of linear and convolution layers, which autocast would cast at every use.

    A head that shares its weight with the embedding keeps it: embeddings are not cast by autocast.
    """
    embedding = model.get_input_embeddings().weight
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)) and module.weight is not embedding:
            cast_parameters(module, dtype)


@contextmanager
def whole_weights() -> Iterator[None]:
    """Within this context, transformers loads whole weights under ZeRO-3; `deepspeed.initialize` partitions them later.

    The frozen reference is copied from whole weights, and every rank's sampler needs whole ones.
    """
    reference = hf_deepspeed._hf_deepspeed_config_weak_ref
    settings = None if reference is None else reference()
    hf_deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if settings is not None:
            hf_deepspeed.set_hf_deepspeed_config(settings)


def load_config(name_or_path: str, trust_remote_code: bool = False, revision: str | None = None) -> PretrainedConfig:
    """A checkpoint's config, from a folder or hub id; for adapters, their base's.

    Raises:
        ValueError: no such checkpoint.
    """
    adapters, name_or_path = name_or_path, adapter_base(name_or_path) or name_or_path
    problem = "is neither a folder nor a model reachable on the hub"
    if Path(name_or_path).is_dir():
        problem = "is a folder without a usable config.json"
    if adapters != name_or_path:
        problem += f" (the adapters in {adapters} belong to it: see their adapter_config.json)"
    revision = (revision or "main") if name_or_path == adapters else "main"
    with given(f"model_name_or_path={name_or_path!r} {problem}", "Name a model's folder, or its id on the hub."):
        return AutoConfig.from_pretrained(name_or_path, trust_remote_code=trust_remote_code, revision=revision)


def takes_images(config: PretrainedConfig) -> bool:
    """Whether it is the config of a model that transformers knows to take pictures."""
    return type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING


def _merge(name: str, value: Any, arguments: dict[str, Any], default: Any) -> Any:
    """Takes a setting from its own argument or out of `model_init_kwargs`."""
    if name not in arguments:
        return default if value is None else value
    if value is not None and value != arguments[name]:
        raise ValueError(f"{name}={value!r}, but model_init_kwargs has {arguments[name]!r}: set it once")
    return arguments.pop(name)


def _resolve_dtype(dtype: torch.dtype | str) -> torch.dtype | str:
    resolved = getattr(torch, dtype, None) if isinstance(dtype, str) and dtype != "auto" else dtype
    if resolved != "auto" and not (isinstance(resolved, torch.dtype) and resolved.is_floating_point):
        raise ValueError(f"dtype={dtype!r} is unknown: use float32, bfloat16, float16 or auto")
    return resolved


def _available_attention(attn_implementation: str | None) -> str | None:
    if attn_implementation != "flash_attention_2":
        return attn_implementation
    if not torch.cuda.is_available():
        reason = "there is no CUDA device"
    elif not is_flash_attn_2_available():
        reason = "flash-attn is not installed"
    else:
        return attn_implementation
    logger.warning("attn_implementation=flash_attention_2 is not available (%s): using sdpa", reason)
    return "sdpa"
