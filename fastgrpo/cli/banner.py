"""What a run is about to do, in a few lines, before its first step."""

import os
from collections.abc import Iterable

import torch
from fastgrpo_kernels.backend import pick_backend
from torch import nn

from fastgrpo.cli.chat_models import chat_warning
from fastgrpo.cli.run_arguments import RunArguments
from fastgrpo.model.attention import pick_attention
from fastgrpo.model.families import text_model
from fastgrpo.sampler.engine import SamplerEngine
from fastgrpo.training.live_figures import compute_dtype
from fastgrpo.training.run_trainer import RunTrainer
from fastgrpo.training.trainer import GRPOTrainer
from fastgrpo.update.packed_passes import PackedPasses


def banner(trainer: RunTrainer, script: RunArguments) -> list[str]:
    """Lines on the model, the device, what a step takes and how it is computed, how questions are asked; warnings."""
    facts = {
        "model": f"{script.model_name_or_path}: {_parameters(trainer.model)}",
        "device": _device(trainer),
        **(_rollout(trainer) if isinstance(trainer, GRPOTrainer) else _examples(trainer)),
        "update": _update(trainer),
        "prompts": _prompts(trainer),
    }
    return [*(f"{name:<8} {fact}" for name, fact in facts.items()), *_warnings(trainer, script)]


def _parameters(model: nn.Module) -> str:
    # Under ZeRO-3 a parameter's own size is that of its part here.
    sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in model.parameters()]
    total, trained = sum(size for size, _ in sizes), sum(size for size, trains in sizes if trains)
    share = "all trained" if trained == total else f"{_count(trained)} of them trained"
    return f"{_count(total)} parameters, {share}"


def _count(number: int) -> str:
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= unit:
            return f"{number / unit:.3g} {name}"
    return str(number)


def _device(trainer: RunTrainer) -> str:
    device, ranks = trainer.accelerator.device, trainer.accelerator.num_processes
    dtype = str(compute_dtype(trainer.model, trainer.config)).removeprefix("torch.")
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        name, memory = torch.cuda.get_device_name(device), f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
    else:
        threads = torch.get_num_threads()
        reason = "" if torch.accelerator.is_available() else " (no GPU found)"
        name = f"CPU{reason}, {threads} thread{'s' * (threads > 1)}"
        memory = f"{os.sysconf('SC_AVPHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.1f} GiB free"
    return f"{f'{ranks} ranks, each on ' if ranks > 1 else ''}{name}, {dtype}, {memory}"


def _kernels(trainer: RunTrainer) -> str:
    picked = pick_backend(torch.empty(0, device=trainer.accelerator.device))
    return "Triton kernels" if picked == "triton" else "torch kernels"


def _rollout(trainer: GRPOTrainer) -> dict[str, str]:
    config = trainer.config
    prompts = config.batch_plan.prompts_per_rollout * trainer.accelerator.num_processes
    drawn = f"{prompts} prompts × {config.num_generations} completions of at most {config.max_completion_length} tokens"
    is_ours = isinstance(trainer.engine, SamplerEngine)
    how = f"paged sampler, {_kernels(trainer)}" if is_ours else "transformers' generate (slow)"
    return {"rollout": f"{drawn}, {how}"}


def _examples(trainer: RunTrainer) -> dict[str, str]:
    rows = trainer.config.batch_plan.prompts_per_rollout * trainer.accelerator.num_processes
    counted = "prompt and answer" if trainer.config.train_on_prompt else "answer"
    return {"step": f"{rows} rows, loss on the {counted}"}


def _update(trainer: RunTrainer) -> str:
    if not isinstance(trainer.updater, PackedPasses):
        return "padded batches in plain transformers (slow)"
    config = text_model(trainer.model).config
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    query = torch.empty(
        1, 1, head_size, device=trainer.accelerator.device, dtype=compute_dtype(trainer.model, trainer.config)
    )
    return f"packed, {pick_attention(query, trainer.updater.attn_backend).name} attention, {_kernels(trainer)}"


def _prompts(trainer: RunTrainer) -> str:
    if _asks_for_itself(trainer):
        return "as the rows' `prompt` column has them"
    if trainer.config.prompt_mode == "instruct":
        return "instruct mode: the model's chat template"
    return f"base mode: plain text without roles, template {trainer.config.prompt_template}"


def _warnings(trainer: RunTrainer, script: RunArguments) -> Iterable[str]:
    warning = chat_warning(script.model_name_or_path, trainer.config.prompt_mode)
    if warning and not _asks_for_itself(trainer):
        yield warning
    if trainer.config.bf16 and trainer.accelerator.device.type == "cpu":
        yield (
            "warning: bf16=True on a CPU, which is slow on most: pass --bf16 false to compute in the model's own dtype"
        )


def _asks_for_itself(trainer: RunTrainer) -> bool:
    return trainer.rows.schema == "chat"
