"""What becomes of every setting of TRL 1.16's `GRPOConfig`: honoured, mapped to something else, or refused.

`fastgrpo doctor --trl` prints it, docs/from_trl.md shows it, `GRPOConfig` warns and refuses by it.
"""

from dataclasses import dataclass
from typing import Any, Literal

OTHER_DEFAULTS = {
    "gradient_checkpointing": "auto: on where a step would not fit the GPU otherwise; TRL: on.",
    "log_completions": "on; TRL: off.",
    "dataloader_num_workers": "2 on a GPU, none elsewhere; TRL: none.",
}
"""Settings whose default is not TRL's, and what it is."""

OF_TRL = """
model_init_kwargs trust_remote_code disable_dropout num_generations num_generations_eval max_completion_length
shuffle_dataset generation_batch_size temperature top_p top_k min_p chat_template_kwargs repetition_penalty beta
num_iterations epsilon delta epsilon_high sapo_temperature_neg sapo_temperature_pos vespo_k_pos vespo_lambda_pos
vespo_k_neg vespo_lambda_neg importance_sampling_level reward_weights multi_objective_aggregation scale_rewards
loss_type mask_truncated_completions sync_ref_model ref_model_mixup_alpha ref_model_sync_steps use_bias_correction_kl
max_tool_calling_iterations log_multimodal num_completions_to_print log_unique_prompts log_completions_hub_repo
steps_per_generation
"""
OF_TRANSFORMERS = """
output_dir per_device_train_batch_size num_train_epochs max_steps learning_rate lr_scheduler_type lr_scheduler_kwargs
warmup_steps optim optim_args weight_decay adam_beta1 adam_beta2 adam_epsilon optim_target_modules
gradient_accumulation_steps max_grad_norm bf16 fp16 tf32 activation_checkpointing activation_checkpointing_kwargs
gradient_checkpointing_kwargs liger_kernel_config use_cache neftune_noise_alpha torch_empty_cache_steps
logging_strategy logging_steps logging_first_step log_on_each_node logging_nan_inf_filter log_level log_level_replica
disable_tqdm run_name project trackio_space_id trackio_bucket_id trackio_static_space_id eval_strategy eval_steps
eval_delay eval_on_start save_only_model save_strategy save_steps save_on_each_node save_total_limit
enable_jit_checkpoint push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision
load_best_model_at_end metric_for_best_model greater_is_better ignore_data_skip
restore_callback_states_from_checkpoint full_determinism seed data_seed use_cpu accelerator_config
dataloader_persistent_workers dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order
ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout deepspeed
debug skip_memory_metrics do_train do_eval do_predict resume_from_checkpoint local_rank
"""
HONOURED: dict[str, str] = {
    **dict.fromkeys((OF_TRL + OF_TRANSFORMERS).split(), ""),
    **OTHER_DEFAULTS,
    "generation_kwargs": "temperature, top_p, top_k, min_p, repetition_penalty, max_new_tokens; beams have no effect, "
    "the rest is refused.",
    "cast_lm_head_to_fp32": "In the update and the reference; the sampler keeps its own precision.",
    "top_entropy_quantile": "At the price of a forward pass.",
    "router_aux_loss_coef": "Over the tokens of a micro-batch of the update, where a prompt stands once for its group.",
    "entropy_coef": "",
    "use_adaptive_entropy": "",
    "entropy_coef_min": "",
    "entropy_coef_max": "",
    "entropy_coef_delta": "",
    "entropy_target": "",
    "off_policy_mask_threshold": "",
    "use_vllm": "The sampler stays fastgrpo's; the loss is corrected as TRL does with vLLM.",
    "vllm_importance_sampling_correction": "With use_vllm, by the sampler's own exact log-probs.",
    "vllm_importance_sampling_mode": "With use_vllm.",
    "vllm_importance_sampling_clip_max": "With use_vllm.",
    "vllm_importance_sampling_clip_min": "With use_vllm.",
    "vllm_importance_sampling_cap": "Sets vllm_importance_sampling_clip_max.",
    "per_device_eval_batch_size": "Counts prompts, not completions.",
    "torch_compile": "With engine=plain; refused otherwise, since no two packed micro-batches have one shape.",
    "torch_compile_backend": "With engine=plain.",
    "torch_compile_mode": "With engine=plain.",
    "use_liger_kernel": "Where liger-kernel and a CUDA device are there.",
    "report_to": "A reporter that is not installed is left out.",
}
"""Setting → what is to know of it, if anything."""

OF_VLLM = """
vllm_mode vllm_model_impl vllm_enable_sleep_mode vllm_server_base_url vllm_server_host vllm_server_port
vllm_server_timeout vllm_group_port vllm_gpu_memory_utilization vllm_max_model_length vllm_tensor_parallel_size
"""
NO_ENGINE = "There is no vLLM engine to set up."
NO_LABELS = "There are no labels; no effect, as in TRL."
NO_PREDICTIONS = "Evaluation scores completions; there are no predictions to gather."
BATCHES_ITSELF = "The sampler batches continuously by itself."
OWN_ORDER = "shuffle_dataset says the order of rows."
MAPPED: dict[str, str] = {
    "remove_unused_columns": "No column is removed; reward functions see them all.",
    "ds3_gather_for_generation": "The sampler always has whole weights of its own, gathered one parameter at a time.",
    "pad_to_multiple_of": "Nothing is padded.",
    "cache_implementation": "The sampler's paged cache is used.",
    **dict.fromkeys(OF_VLLM.split(), NO_ENGINE),
    "use_transformers_continuous_batching": BATCHES_ITSELF,
    "transformers_continuous_batching_config": BATCHES_ITSELF,
    "use_transformers_paged": BATCHES_ITSELF,
    "average_tokens_across_devices": "Losses are always averaged over the tokens of all devices.",
    "label_smoothing_factor": NO_LABELS,
    "label_names": NO_LABELS,
    "prediction_loss_only": NO_PREDICTIONS,
    "eval_do_concat_batches": NO_PREDICTIONS,
    "eval_use_gather_object": NO_PREDICTIONS,
    "eval_accumulation_steps": NO_PREDICTIONS,
    "include_for_metrics": NO_PREDICTIONS,
    "batch_eval_metrics": NO_PREDICTIONS,
    "bf16_full_eval": "Evaluation draws in the training's precision.",
    "fp16_full_eval": "Evaluation draws in the training's precision.",
    "include_num_input_tokens_seen": "num_tokens is always logged.",
    "dataloader_drop_last": "A rollout is always whole; rows left over wait for the next epoch.",
    "dataloader_pin_memory": "What an update copies to the GPU is always pinned.",
    "train_sampling_strategy": OWN_ORDER,
    "length_column_name": OWN_ORDER,
}
"""Setting → what happens instead, told in one warning where it is set."""

REFUSED: dict[str, str] = {
    "vllm_structured_outputs_regex": "completions are not held to a pattern: leave it unset, and reward the format",
    "auto_find_batch_size": "it would split groups: set per_device_train_batch_size instead",
    "parallelism_config": "ranks share rows and, under DeepSpeed, weights, but no sequence: leave it unset",
    "fsdp": "the sampler cannot read weights that FSDP shards: use deepspeed",
    "fsdp_config": "the sampler cannot read weights that FSDP shards: use deepspeed",
}
"""Setting → why any value but TRL's default is an error."""
STATED_OFF: dict[str, tuple[Any, ...]] = {
    "include_num_input_tokens_seen": (False,),
}
"""Values beside the default that ask for nothing else."""

Status = Literal["honoured", "mapped", "refused"]


@dataclass(frozen=True)
class TRLSetting:
    """One row of the table."""

    name: str
    status: Status
    note: str


def trl_settings() -> list[TRLSetting]:
    """Every setting: those that differ first, then the honoured ones, each by name."""
    tables: list[tuple[Status, dict[str, str]]] = [("refused", REFUSED), ("mapped", MAPPED), ("honoured", HONOURED)]
    return [TRLSetting(name, status, notes[name]) for status, notes in tables for name in sorted(notes)]


def markdown_table() -> str:
    """The table of docs/from_trl.md: a row for each note, and a list of the settings without one."""
    rows: dict[tuple[Status, str], list[str]] = {}
    for one in trl_settings():
        rows.setdefault((one.status, one.note), []).append(f"`{one.name}`")
    plain = rows.pop(("honoured", ""))
    lines = [f"| {', '.join(names)} | {status} | {note} |" for (status, note), names in rows.items()]
    return "\n".join(
        [
            "| setting | here | what is to know |",
            "|---|---|---|",
            *lines,
            "",
            f"Honoured as they are: {', '.join(plain)}.",
        ]
    )
