"""The reference of the KL term: where it comes from, and how it is drawn after the policy."""

import copy
import json
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor
from transformers import TrainerCallback

from fastgrpo.config import GRPOConfig
from fastgrpo.data.loading import load_rows
from fastgrpo.rewards import per_group
from fastgrpo.training.trainer import GRPOTrainer
from fastgrpo.update.kl_reference import mix, place_reference

ALPHA = 0.3


def token_sum(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Differs from completion to completion, whatever the model says."""
    return [float(sum(ids) % 7) for ids in completion_ids]


class Watch(TrainerCallback):
    """Keeps the policy as it is after each step."""

    def __init__(self) -> None:
        self.after: dict[int, dict[str, Tensor]] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.after[state.global_step] = values(kwargs["model"])


def values(model: Any) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


@pytest.fixture
def build(tiny_model_dir: Path, sat_file: Path, tmp_path: Path) -> Any:
    def make(
        folder: str, *, callbacks: Any = None, peft_config: Any = None, reward_funcs: Any = token_sum, **settings: Any
    ) -> GRPOTrainer:
        config = GRPOConfig(
            **{
                "output_dir": str(tmp_path / folder), "use_cpu": True, "report_to": [], "save_strategy": "no",
                "num_generations": 4, "per_device_train_batch_size": 8, "max_completion_length": 6,
                "learning_rate": 0.01, "lr_scheduler_type": "constant", "disable_tqdm": True, "beta": 0.04,
                "ref_model_mixup_alpha": ALPHA,
            } | settings
        )  # fmt: skip
        parts: dict[str, Any] = {"callbacks": callbacks, "peft_config": peft_config}
        return GRPOTrainer(str(tiny_model_dir), reward_funcs, config, load_rows(str(sat_file)), **parts)

    return make


def test_the_reference_is_asked_once_a_rollout_while_groups_are_judged(build: Any) -> None:
    asked = threading.Event()
    passes: list[None] = []

    @per_group
    def waits_for_the_reference(completion_ids: list[list[int]], **_: Any) -> list[float]:
        assert asked.wait(timeout=60), "the reference waits for the rewards"
        return token_sum(completion_ids)

    trainer = build("run", reward_funcs=waits_for_the_reference, num_iterations=2, max_steps=2)
    trainer.reference_model.register_forward_pre_hook(lambda *_: passes.append(asked.set()))
    trainer.train()
    assert len(passes) == 1, "both steps train on the same rollout"
    assert kl_of(Path(trainer.args.output_dir))[1] > 0


def kl_of(folder: Path) -> list[float]:
    return [json.loads(line)["kl"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mix(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    reference, policy = (torch.nn.Linear(5, 3, dtype=dtype) for _ in range(2))
    expected = [
        (0.3 * p.double() + 0.7 * r.double()).to(dtype)
        for r, p in zip(reference.parameters(), policy.parameters(), strict=True)
    ]
    before = copy.deepcopy(policy.state_dict())
    mix(reference, policy, 0.3)
    for found, wanted in zip(reference.parameters(), expected, strict=True):
        torch.testing.assert_close(found, wanted)
        assert found.dtype == dtype
    assert all(torch.equal(value, before[name]) for name, value in policy.state_dict().items())


@pytest.mark.parametrize("engine", ["fast", "plain"])
def test_the_reference_is_drawn_after_the_policy_every_so_many_steps(build: Any, engine: str) -> None:
    watch = Watch()
    trainer = build(
        "run", callbacks=[watch], engine=engine, sync_ref_model=True, ref_model_sync_steps=2, max_steps=5
    )  # fmt: skip
    reference = values(trainer.reference_model)
    trainer.train()
    for step in (2, 4):
        reference = {name: ALPHA * watch.after[step][name] + (1 - ALPHA) * old for name, old in reference.items()}
    for name, value in values(trainer.reference_model).items():
        torch.testing.assert_close(value, reference[name], msg=name)
    assert not any(value.requires_grad for value in trainer.reference_model.parameters())


def test_it_stays_where_it_is_unless_asked(build: Any) -> None:
    trainer = build("run", max_steps=2, save_strategy="steps", save_steps=1)
    before = values(trainer.reference_model)
    trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in values(trainer.reference_model).items())
    assert not (Path(trainer.args.output_dir) / "checkpoint-2" / "reference").exists()


def test_a_resumed_run_has_the_same_reference(build: Any, tmp_path: Path) -> None:
    settings = {"sync_ref_model": True, "ref_model_sync_steps": 2, "save_strategy": "steps", "save_steps": 3}
    whole = build("whole", max_steps=5, **settings)
    whole.train()
    build("stopped", max_steps=3, **settings).train()
    shutil.copytree(tmp_path / "stopped", tmp_path / "forgetful")
    resumed = build("stopped", max_steps=5, **settings)
    resumed.train(resume_from_checkpoint=True)
    expected = values(whole.reference_model)
    assert all(torch.equal(value, expected[name]) for name, value in values(resumed.reference_model).items())
    assert kl_of(tmp_path / "stopped") == kl_of(tmp_path / "whole")

    shutil.rmtree(tmp_path / "forgetful" / "checkpoint-3" / "reference")
    (tmp_path / "forgetful" / "checkpoint-3" / "manifest.json").unlink()  # which would call it missing
    build("forgetful", max_steps=5, **settings).train(resume_from_checkpoint=True)
    assert kl_of(tmp_path / "forgetful")[3:] != kl_of(tmp_path / "whole")[3:], "the reference is part of the state"


@pytest.mark.parametrize("engine", ["fast", "plain"])
def test_it_may_stay_on_the_host(build: Any, tmp_path: Path, engine: str) -> None:
    for on_cpu in (False, True):
        build(f"{on_cpu}", engine=engine, max_steps=2, ref_model_on_cpu=on_cpu).train()
    assert kl_of(tmp_path / "True") == kl_of(tmp_path / "False")
    assert kl_of(tmp_path / "True")[-1] > 0


def test_on_the_host_it_is_not_handed_to_accelerate() -> None:
    reference = torch.nn.Linear(2, 2, device="meta").to_empty(device="cpu")
    accelerator: Any = None  # would be asked to place it
    config = GRPOConfig(use_cpu=True, beta=0.04, ref_model_on_cpu=True, report_to=[])
    assert place_reference(reference, config, accelerator) is reference  # type: ignore[arg-type]


def test_on_the_host_there_must_be_a_copy(build: Any) -> None:
    with pytest.raises(ValueError, match="ref_model_on_cpu=True needs a copy"):
        build("peft", ref_model_on_cpu=True, peft_config=LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"ref_model_on_cpu=True, but with beta=0\.0"):
        build("beta", ref_model_on_cpu=True, beta=0.0)


def test_what_cannot_work_is_refused(build: Any) -> None:
    with pytest.raises(ValueError, match="sync_ref_model=True needs a copy to update"):
        build("run", sync_ref_model=True, peft_config=LoraConfig(target_modules=["q_proj"]))
    for setting, value in (("ref_model_mixup_alpha", 1.5), ("ref_model_sync_steps", 0)):
        with pytest.raises(ValueError, match=f"{setting}={value} is not valid"):
            build("run", **{setting: value})


def test_a_frozen_reference_of_half_precision_says_what_the_policy_says(build: Any, tmp_path: Path) -> None:
    trainer = build("half", bf16=True, max_steps=1)
    dtypes = {name: value.dtype for name, value in trainer.reference_model.named_parameters()}
    assert {dtypes[name] for name in dtypes if "proj" in name and name.endswith("weight")} == {torch.bfloat16}
    assert {dtypes[name] for name in dtypes if "layernorm" in name or "embed_tokens" in name} == {torch.float32}
    trainer.train()
    assert kl_of(tmp_path / "half")[0] < 1e-12  # not a rounding of half precision apart, which squares to 1e-6


def test_a_reference_that_moves_stays_in_float32(build: Any) -> None:
    trainer = build("moving", bf16=True, sync_ref_model=True)
    assert {value.dtype for value in trainer.reference_model.parameters()} == {torch.float32}
