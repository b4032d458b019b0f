import importlib.util
import math
from pathlib import Path
from typing import Any

import pytest

from fastgrpo.config import GRPOConfig
from fastgrpo.settings import run_config as config_module
from fastgrpo.settings.run_config import lacking_for_liger


@pytest.fixture
def make(tmp_path: Path) -> Any:
    def build(**settings: Any) -> GRPOConfig:
        return GRPOConfig(**{"output_dir": str(tmp_path), "use_cpu": True, "report_to": "none", **settings})

    return build


def without_packages(monkeypatch: pytest.MonkeyPatch, *missing: str) -> None:
    def find(name: str) -> Any:
        return None if name in missing else importlib.util.find_spec(name)

    monkeypatch.setattr(config_module, "find_spec", find)


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith("fastgrpo")]


@pytest.mark.parametrize(
    ("settings", "micro_batch", "prompts", "slices", "updates"),
    [
        # 16 completions a step, 8 a group
        ({"per_device_train_batch_size": 16}, 16, 2, 1, 1),
        ({"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}, 4, 2, 1, 1),
        # the published run on one device: 2 prompts × 8
        (
            {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "batch_unit": "prompts"},
            8, 2, 1, 1,
        ),
        # one rollout feeds two optimizer steps, then is used again
        (
            {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "steps_per_generation": 4},
            8, 4, 2, 2,
        ),
        (
            {
                "per_device_train_batch_size": 8,
                "gradient_accumulation_steps": 2,
                "steps_per_generation": 4,
                "num_iterations": 3,
            },
            8, 4, 2, 6,
        ),
        ({"per_device_train_batch_size": 8, "generation_batch_size": 32}, 8, 4, 4, 4),
        (
            {"per_device_train_batch_size": 3, "batch_unit": "prompts", "num_generations": 4, "num_iterations": 2},
            12, 3, 1, 2,
        ),
        (
            {
                "per_device_train_batch_size": 1,
                "batch_unit": "prompts",
                "num_generations": 4,
                "generation_batch_size": 16,
                "gradient_accumulation_steps": 2,
            },
            4, 4, 2, 2,
        ),
    ],
)  # fmt: skip
def test_batch_arithmetic(
    make: Any, settings: dict[str, Any], micro_batch: int, prompts: int, slices: int, updates: int
) -> None:
    config = make(**settings)
    assert config.batch_plan.completions_per_micro_batch == micro_batch
    assert config.batch_plan.prompts_per_rollout == prompts
    assert config.batch_plan.slices_per_rollout == slices
    assert config.batch_plan.updates_per_rollout == updates
    # a rollout is used up exactly: completions drawn = completions trained on in one pass
    drawn = prompts * config.num_generations
    assert drawn == slices * config.gradient_accumulation_steps * micro_batch


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_generations": 1}, "num_generations=1 is not valid: use 2 or more"),
        ({"num_generations": 5}, r"num_generations=5 does not divide.*--batch_unit prompts"),
        ({"per_device_train_batch_size": 4, "generation_batch_size": 4}, "num_generations=8 does not divide"),
        ({"per_device_train_batch_size": 8, "generation_batch_size": 4}, "a multiple of the 8 completions"),
        ({"per_device_train_batch_size": -8}, "per_device_train_batch_size=-8 is not valid: use 1 or more"),
        ({"generation_batch_size": -8}, "generation_batch_size=-8 is not valid: use 1 or more"),
        ({"generation_batch_size": 0}, "generation_batch_size=0 is not valid"),
        ({"steps_per_generation": -2}, "steps_per_generation=-2 is not valid: use 1 or more"),
        ({"steps_per_generation": 0}, "steps_per_generation=0 is not valid"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps=0 is not valid"),
        ({"per_device_eval_batch_size": -1}, "per_device_eval_batch_size=-1 is not valid"),
        ({"num_train_epochs": -1.0}, "num_train_epochs=-1.0 is not valid: use a number above 0"),
        ({"save_steps": -1}, "save_steps=-1 is not valid"),
        ({"seed": -1}, "seed=-1 is not valid"),
        ({"speculate": "some"}, "speculate='some' is not valid: use auto, off or 1 to 31"),
        ({"learning_rate": float("nan")}, "learning_rate=nan is not valid"),
        ({"min_p": 1.5}, "min_p=1.5 is not valid: use a number from 0 to 1"),
        ({"min_p": -0.1}, "min_p=-0.1 is not valid"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0 is not valid: use a number above 0"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty=inf is not valid"),
        ({"importance_sampling_level": "word"}, "importance_sampling_level='word' is not valid: use token or sequence"),
        ({"delta": 0.0}, "delta=0.0 is not valid"),
        ({"epsilon_high": -0.1}, "epsilon_high=-0.1 is not valid"),
        ({"num_generations_eval": 0}, "num_generations_eval=0 is not valid"),
        ({"per_device_train_batch_size": 3, "steps_per_generation": 2}, "num_generations=8 does not divide"),
        ({"loss_type": "ppo"}, "loss_type='ppo'.*grpo, bnpo, dr_grpo, dapo"),
        ({"scale_rewards": "std"}, "scale_rewards='std'"),
        ({"batch_unit": "rows"}, "batch_unit='rows'"),
        ({"prompt_mode": "chat"}, "prompt_mode='chat'"),
        ({"temperature": 0.0}, r"temperature=0\.0"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_k": -1}, "top_k=-1"),
        ({"max_completion_length": 0}, "max_completion_length=0"),
        ({"num_iterations": 0}, "num_iterations=0"),
        ({"beta": -0.1}, "beta=-0.1"),
        ({"epsilon": -0.1}, "epsilon=-0.1"),
        ({"router_aux_loss_coef": -0.1}, "router_aux_loss_coef=-0.1"),
        ({"fsdp": "full_shard"}, "fsdp='full_shard': the sampler cannot read weights that FSDP shards: use deepspeed"),
        ({"entropy_coef_min": 2.0}, "entropy_coef_min=2.0 is not valid: use a number from 0 to entropy_coef_max=1.0"),
        ({"top_entropy_quantile": 1.5}, "top_entropy_quantile=1.5 is not valid"),
        ({"off_policy_mask_threshold": 0.0}, "off_policy_mask_threshold=0.0 is not valid"),
        ({"multi_objective_aggregation": "sum"}, "multi_objective_aggregation='sum' is not valid"),
        ({"generation_kwargs": {"typical_p": 0.5}}, "the sampler has no typical_p: use temperature"),
        ({"generation_kwargs": {"do_sample": False}}, "the sampler has no do_sample=False: use temperature"),
        ({"log_completions_hub_repo": "me/logs", "log_completions": False}, "log_completions is off"),
        ({"vllm_importance_sampling_mode": "word"}, "vllm_importance_sampling_mode='word' is not valid"),
        ({"vllm_importance_sampling_clip_min": 3.0}, "clip_min=3.0 is not valid: use a number below"),
        (
            {"vllm_importance_sampling_mode": "token_truncate", "vllm_importance_sampling_clip_max": None},
            "has nothing to truncate to",
        ),
        ({"loss_type": "vespo", "use_vllm": True}, "'sequence_mask' does not go with loss_type='vespo'"),
        ({"torch_compile": True}, "torch_compile=True: no two packed micro-batches have one shape"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size=True"),
        ({"model_init_kwargs": "abc"}, "model_init_kwargs='abc'.*JSON object"),
        ({"chat_template_kwargs": "[1]"}, "chat_template_kwargs=.*JSON object"),
    ],
)
def test_settings_that_cannot_work(make: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**settings)


def test_defaults_are_those_of_trl(make: Any) -> None:
    config = make()
    assert (config.num_generations, config.max_completion_length, config.loss_type) == (8, 512, "dapo")
    assert (config.beta, config.epsilon, config.epsilon_high, config.delta) == (0.0, 0.2, None, None)
    assert (config.temperature, config.top_p, config.top_k, config.min_p) == (1.0, 1.0, 0, None)
    assert (config.learning_rate, config.num_iterations, config.scale_rewards) == (1e-6, 1, "group")
    assert config.remove_unused_columns is False


@pytest.mark.parametrize(("given", "kept"), [(True, "group"), (False, "none"), ("True", "group"), ("batch", "batch")])
def test_scale_rewards_takes_booleans(make: Any, given: Any, kept: str) -> None:
    assert make(scale_rewards=given).scale_rewards == kept


def test_bf16_is_off_by_default_on_a_cpu(make: Any) -> None:
    assert make().bf16 is False
    assert make(bf16=True).bf16 is True


def test_model_init_kwargs_are_read_from_json(make: Any) -> None:
    assert make(model_init_kwargs='{"torch_dtype": "bfloat16"}').model_init_kwargs == {"torch_dtype": "bfloat16"}


def test_missing_wandb_gives_one_warning_and_tensorboard(
    make: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    without_packages(monkeypatch, "wandb")
    config = make(report_to="wandb")
    assert config.report_to == ["tensorboard"]
    assert len(warnings_of(caplog)) == 1
    assert "wandb not installed" in caplog.text


def test_missing_reporters_leave_the_others(
    make: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    without_packages(monkeypatch, "wandb", "mlflow", "tensorboard")
    assert make(report_to=["wandb", "mlflow"]).report_to == []
    assert [message.count("not installed") for message in warnings_of(caplog)] == [1]


@pytest.mark.parametrize(
    ("missing", "cuda", "use_cpu", "lacking"),
    [
        (["liger_kernel"], True, False, "liger-kernel is not installed"),
        ([], False, False, "its kernels need a CUDA device"),
        ([], True, True, "its kernels need a CUDA device"),
        ([], True, False, None),
    ],
)
def test_liger_needs_its_package_and_a_cuda_device(
    monkeypatch: pytest.MonkeyPatch, missing: list[str], cuda: bool, use_cpu: bool, lacking: str | None
) -> None:
    without_packages(monkeypatch, *missing)
    if not missing:  # found, whether or not this machine has it
        monkeypatch.setattr(config_module, "find_spec", lambda name: object())
    monkeypatch.setattr("torch.cuda.is_available", lambda: cuda)
    assert lacking_for_liger(use_cpu) == lacking


def test_liger_on_a_cpu_gives_one_warning(make: Any, caplog: pytest.LogCaptureFixture) -> None:
    assert make(use_liger_kernel=True).use_liger_kernel is False
    assert [message.startswith("use_liger_kernel") for message in warnings_of(caplog)] == [True]


def test_trl_settings_that_work_differently_are_told_in_one_warning(
    make: Any, caplog: pytest.LogCaptureFixture
) -> None:
    config = make(vllm_gpu_memory_utilization=0.5, vllm_mode="server", pad_to_multiple_of=8, label_names=["x"])
    [warning] = warnings_of(caplog)
    assert "vllm_mode, vllm_gpu_memory_utilization: There is no vLLM engine to set up;" in warning
    assert "pad_to_multiple_of: Nothing is padded" in warning
    assert "label_names" in warning
    assert config.pad_to_multiple_of == 8


def test_a_refused_setting_may_be_stated_off(make: Any, caplog: pytest.LogCaptureFixture) -> None:
    make(auto_find_batch_size=False, vllm_structured_outputs_regex=None)
    assert warnings_of(caplog) == []


@pytest.mark.parametrize(
    ("accumulation", "drawn", "iterations", "slices", "of_step", "on_policy"),
    [
        (4, 4, 1, 1, 1, True),
        (2, 3, 1, 3, 2, False),
        (4, 1, 1, 1, 4, True),
        (4, 1, 2, 1, 4, True),
        (4, 3, 4, 3, 4, False),
        (4, 6, 1, 3, 2, False),
    ],
)
def test_rollouts_and_steps_need_not_fit_each_other(
    make: Any,
    accumulation: int, drawn: int, iterations: int, slices: int, of_step: int, on_policy: bool,
) -> None:  # fmt: skip
    settings = {"gradient_accumulation_steps": accumulation, "steps_per_generation": drawn}
    plan = make(per_device_train_batch_size=8, num_iterations=iterations, **settings).batch_plan
    assert (plan.slices_per_rollout, plan.slices_per_step) == (slices, of_step)
    assert (plan.updates_per_rollout, plan.is_on_policy) == (drawn * iterations / accumulation, on_policy)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"importance_sampling_level": "sequence"}, "which sums over tokens"),  # dapo is the default
        ({"importance_sampling_level": "sequence", "loss_type": "bnpo"}, "which sums over tokens"),
        ({"importance_sampling_level": "sequence", "loss_type": "grpo"}, ""),
        ({"importance_sampling_level": "sequence", "loss_type": "luspo"}, ""),
        ({"loss_type": "luspo"}, "published with importance_sampling_level=sequence"),
        ({"importance_sampling_level": "sequence", "loss_type": "vespo"}, "weighs whole sequences itself"),
        ({"loss_type": "vespo"}, ""),
    ],
)
def test_levels_that_are_seldom_meant_are_told(
    make: Any, caplog: pytest.LogCaptureFixture, settings: dict[str, Any], told: str
) -> None:
    make(**settings)
    assert [told in warning for warning in warnings_of(caplog)] == ([True] if told else [])


def test_corrections_of_a_sampler_that_is_not_corrected(make: Any, caplog: pytest.LogCaptureFixture) -> None:
    make(use_vllm=True, vllm_importance_sampling_mode="token_mask")
    assert warnings_of(caplog) == []
    make(vllm_importance_sampling_mode="token_mask")
    assert warnings_of(caplog) == ["vllm_importance_sampling_mode: no effect without use_vllm, as in TRL."]


def test_the_older_name_of_the_upper_bound(make: Any) -> None:
    assert make(use_vllm=True, vllm_importance_sampling_cap=2.0).vllm_importance_sampling_clip_max == 2.0


@pytest.mark.parametrize("value", ["3", "6:3", "0:2", "a:b", ":"])
def test_profile_steps_is_a_range_counted_from_1(value, tmp_path):
    with pytest.raises(ValueError, match="FIRST:LAST"):
        GRPOConfig(output_dir=str(tmp_path), report_to="none", profile_steps=value)


def test_without_a_gpu_a_run_is_on_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    config = GRPOConfig(output_dir=str(tmp_path), report_to="none", bf16=True)
    assert (config.use_cpu, config.bf16, config.device.type) == (True, True, "cpu")


def test_the_plain_engine_is_still_found_under_its_old_name(make: Any, caplog: pytest.LogCaptureFixture) -> None:
    assert make(engine="reference").engine == "plain"
    assert warnings_of(caplog) == ["engine=reference is called plain now; plain is used."]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, value) for name in ("learning_rate", "weight_decay", "max_grad_norm", "num_train_epochs", "beta")
          for value in (math.nan, math.inf, -1.0)),
        *((name, math.nan) for name in ("temperature", "top_p", "adam_beta1", "entropy_coef", "vespo_k_pos")),
        ("reward_weights", [1.0, math.nan]), ("reward_weights", [math.inf]), ("save_steps", 0),
        ("num_generations_eval", 0), ("adam_beta2", 1.5), ("adam_epsilon", 0.0), ("ddp_timeout", 0), ("eval_delay", -1),
        ("label_smoothing_factor", 2.0), ("neftune_noise_alpha", -1.0), ("neftune_noise_alpha", math.inf),
        ("reward_timeout", 0.0), ("reward_timeout", math.inf), ("on_nonfinite", "ignore"),
        ("lr_scheduler_kwargs", {"min_lr": math.nan}), ("learning_rate", "fast"), ("learning_rate", [1e-6]),
    ],
)  # fmt: skip
def test_numbers_that_cannot_be_are_refused_in_one_place(name: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"^{name}=.* is not valid: use "):
        GRPOConfig(output_dir=str(tmp_path), use_cpu=True, report_to=[], **{name: value})
