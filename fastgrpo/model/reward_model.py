"""Reward models: a sequence classifier's first logit on prompt and completion, called like any reward function."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from fastgrpo.model.load import whole_weights
from fastgrpo.settings.given import given

logger = logging.getLogger(__name__)

BATCH = 32
"""Completions that go through a reward model at a time, of similar length."""


class RewardModel:
    """A reward function around a sequence classifier. A prompt is read by the classifier's own chat template.

    Args:
        model: maps `input_ids` and `attention_mask` to `logits` [B, labels]; it is frozen here.
        tokenizer: its own; one without a padding token pads with the end token.
        template_kwargs: further variables of the chat template.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: Any, template_kwargs: Mapping[str, Any] | None = None
    ) -> None:
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        # A classifier reads its score from the last token that is no padding, which it tells by this.
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.template_kwargs = dict(template_kwargs or {})
        self.__name__ = model_name(model)

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **_: Any) -> list[float]:
        """A score per completion."""
        pairs = zip(prompts, completions, strict=True)
        texts = [self._text(prompt, completion) for prompt, completion in pairs]
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        scores = [0.0] * len(texts)
        for start in range(0, len(order), BATCH):
            chosen = order[start : start + BATCH]
            for i, score in zip(chosen, self._scores([texts[i] for i in chosen]), strict=True):
                scores[i] = score
        return scores

    def to(self, device: torch.device) -> None:
        """Moves the classifier, unless it was placed where it was loaded (quantized, or by a device map)."""
        if not hasattr(self.model, "hf_device_map") and not getattr(self.model, "quantization_method", None):
            self.model.to(device)

    @torch.inference_mode()
    def _scores(self, texts: list[str]) -> list[float]:
        inputs = self.tokenizer(
            text=texts, return_tensors="pt", padding=True, padding_side="right", add_special_tokens=False
        )
        logits = self.model(**inputs.to(next(self.model.parameters()).device)).logits  # [B, labels]
        scores: list[float] = logits[:, 0].float().tolist()
        return scores

    def _text(self, prompt: Any, completion: Any) -> str:
        if isinstance(prompt, str):
            return prompt + completion
        text: str = self.tokenizer.apply_chat_template([*prompt, *completion], tokenize=False, **self.template_kwargs)
        return text


def load_reward_model(
    name_or_path: str, arguments: Mapping[str, Any], trust_remote_code: bool = False
) -> tuple[PreTrainedModel, str | None]:
    """A sequence classifier with one label, from a folder or hub id, and the revision that `arguments` ask for.

    Args:
        arguments: of `from_pretrained`.

    Raises:
        ValueError: there is none.
    """
    with (
        whole_weights(),
        given(
            f"reward_funcs: {name_or_path!r} (reward_model_name_or_path) cannot be loaded as a reward model",
            "Name another.",
        ),
    ):
        model = AutoModelForSequenceClassification.from_pretrained(
            name_or_path, num_labels=1, **{"trust_remote_code": trust_remote_code, **arguments}
        )
    return model, arguments.get("revision")


def load_reward_tokenizer(model: Any, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The tokenizer beside a classifier's weights.

    Raises:
        ValueError: there is none.
    """
    path = model.config._name_or_path
    with given(f"reward_processing_classes: the reward model {path!r} has no tokenizer beside it", "Pass it."):
        return AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)


def model_name(model: Any) -> str:
    """The last part of the folder or hub id that a model was loaded from, else its class."""
    path = str(getattr(model.config, "_name_or_path", ""))
    return path.rstrip("/").rpartition("/")[2] or type(model).__name__
