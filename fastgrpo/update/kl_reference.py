"""The reference model of the KL term: a copy of the policy, frozen or (`sync_ref_model`) following it (TR-DPO)."""

import copy
import re
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState

from fastgrpo.config import GRPOConfig
from fastgrpo.model.families import unwrap
from fastgrpo.model.load import cast_matrices, cast_parameters, load_weights
from fastgrpo.model.zero import gathered

FOLDER = "reference"
"""Folder in a checkpoint, written if the reference is updated."""


def copy_reference(model: Any, config: GRPOConfig) -> PreTrainedModel | None:
    """A copy of the initial policy; None with beta 0, or if the policy with its adapters off equals it.

    A copy of a model with trained adapters shares its frozen weights, but not under DeepSpeed, which may partition
    them.

    Raises:
        ValueError: `sync_ref_model` or `ref_model_on_cpu` with adapters, whose reference has no weights of its own.
    """
    has_adapters = hasattr(model, "disable_adapter")
    if config.sync_ref_model and has_adapters:
        raise ValueError(
            "sync_ref_model=True needs a copy to update, but with adapters the reference shares the policy's weights. "
            "Leave it off, or train without peft_config."
        )
    if config.ref_model_on_cpu and has_adapters:
        raise ValueError(
            "ref_model_on_cpu=True needs a copy to keep there, but with adapters the reference shares the policy's "
            "weights. Leave it off, or train without peft_config."
        )
    if config.beta == 0 or (has_adapters and _adapters_change_nothing(model)):
        return None
    frozen = [p for p in model.parameters() if not p.requires_grad]
    shared = {id(p): p for p in frozen} if has_adapters and config.deepspeed_plugin is None else {}
    return copy.deepcopy(model, shared).eval().requires_grad_(False)


def _adapters_change_nothing(model: Any) -> bool:
    """Whether a peft model still equals its base: every LoRA's B is zero, other trained parameters are unchanged."""
    parameters = dict(model.named_parameters(remove_duplicate=False))  # tied ones under each of their names
    for name, parameter in parameters.items():
        if "lora_B" in name or "lora_embedding_B" in name:
            if parameter.any():
                return False
        elif "modules_to_save" in name:
            if not torch.equal(parameter, parameters[re.sub(r"modules_to_save\.[^.]+", "original_module", name)]):
                return False
        elif parameter.requires_grad and "lora_" not in name:
            return False
    return True


def place_reference(reference: PreTrainedModel, config: GRPOConfig, accelerator: Accelerator) -> PreTrainedModel:
    """Gives the reference the policy's device, autocast and (DeepSpeed) dtype, so that log-probs are comparable.

    Under autocast its matrices are cast once, to the dtype autocast would use: the same log-probs in half the memory. A
    reference that is updated stays in float32, since it is mixed there. With `ref_model_on_cpu` it stays on the host,
    in its own dtype.
    """
    if config.ref_model_on_cpu:
        return reference.to("cpu")
    if config.bf16 or config.fp16:
        half = torch.bfloat16 if config.bf16 else torch.float16
        if accelerator.state.deepspeed_plugin is not None:
            cast_parameters(reference, half)
        elif not config.sync_ref_model and not hasattr(reference, "disable_adapter"):
            # With adapters, the reference shares the policy's weights.
            cast_matrices(reference, half)
    placed: PreTrainedModel = accelerator.prepare_model(reference, evaluation_mode=True)
    return placed


@torch.no_grad()
def mix(reference: nn.Module, policy: nn.Module, alpha: float) -> None:
    """reference ← alpha · policy + (1 − alpha) · reference, one parameter at a time.

    Mixed in float32. Under ZeRO-3 all ranks must call it together.
    """
    for old, new in zip(reference.parameters(), policy.parameters(), strict=True):
        if not new.requires_grad:  # equal already; not writing keeps cached vision features valid
            continue
        with gathered([new]):
            old.copy_(torch.lerp(old.float(), new.to(old.device, torch.float32), alpha))


class ReferenceSync(TrainerCallback):
    """Mixes the policy into the reference every `ref_model_sync_steps` optimizer steps (arXiv 2404.09656, eq. 5)."""

    def __init__(self, reference: PreTrainedModel, config: GRPOConfig) -> None:
        self.reference = reference
        self.config = config

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step % self.config.ref_model_sync_steps == 0:
            mix(unwrap(self.reference), unwrap(kwargs["model"]), self.config.ref_model_mixup_alpha)


def save_reference(reference: PreTrainedModel, checkpoint: Path) -> None:
    """Saves a reference that is updated, so that a resumed run is the same run."""
    unwrap(reference).save_pretrained(checkpoint / FOLDER)


def load_reference(reference: PreTrainedModel, checkpoint: Path) -> None:
    """Loads what `save_reference` wrote, if anything: a frozen reference is not saved."""
    if (checkpoint / FOLDER).is_dir():
        load_weights(unwrap(reference), checkpoint / FOLDER)
