"""Three training steps on fixed completions against those of TRL (`bench/record_trl_steps.py` recorded them)."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from fastgrpo import GRPOConfig, GRPOTrainer
from fastgrpo.scoring.advantages import Advantages
from fastgrpo.types import Completion, Prompt, Rollout, SamplingParams, TrainingGroup

with safe_open(Path(__file__).parent / "recordings" / "trl_steps.safetensors", framework="pt") as file:
    RECORDING = json.loads(file.metadata()["recording"])
    TENSORS = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not iterable itself
CASES = RECORDING["cases"]
GROUP, EOS = RECORDING["common"]["num_generations"], RECORDING["model"]["eos_token_id"]
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


def label(index: int) -> str:
    return f"{index}-" + "-".join(f"{name}={value}" for name, value in CASES[index]["options"].items())


class FixedEngine:
    """`Engine` that draws what is recorded."""

    def __init__(self) -> None:
        self.drawn = 0

    def sync(self) -> None:
        pass

    def generate(
        self, prompts: Sequence[Prompt], num_generations: int, params: SamplingParams, step: int
    ) -> Iterator[Rollout]:
        ids, logprobs = RECORDING["completions"][self.drawn], RECORDING["sampling_logprobs"][self.drawn]
        self.drawn += 1
        for p, prompt in enumerate(prompts):
            chosen = range(p * num_generations, (p + 1) * num_generations)
            yield Rollout(prompt, tuple(completion_of(prompt, i - chosen[0], ids[i], logprobs[i]) for i in chosen))


def completion_of(prompt: Prompt, index: int, ids: list[int], logprobs: list[float]) -> Completion:
    reason = "stop" if ids[-1] == EOS else "length"
    drawn = torch.tensor(logprobs)
    return Completion(prompt.row_id, index, torch.tensor(ids), "", reason, drawn, drawn)


class WatchedTrainer(GRPOTrainer):
    """Keeps what it makes of the completions."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seen_advantages: list[Tensor] = []
        self.seen_logprobs: list[Tensor] = []
        self.engine = FixedEngine()

    def advantages(self, rollouts: Any) -> Advantages:
        found = super().advantages(rollouts)
        self.seen_advantages.append(found.advantages)
        return found

    def update(self, groups: list[TrainingGroup]) -> Tensor:
        found = [piece for group in self.updater.logprobs(groups) for piece in group]
        masks = [mask for group in groups for mask in group.masks]
        self.seen_logprobs.append(torch.cat([piece[mask] for piece, mask in zip(found, masks, strict=True)]))
        return super().update(groups)


def sums_of(completion_ids: list[list[int]], **_: Any) -> list[float | None]:
    return [None if len(ids) == 3 else sum(ids) % 7 / 3 for ids in completion_ids]


def lengths_of(completion_ids: list[list[int]], **_: Any) -> list[float | None]:
    return [None if len(ids) % 3 == 0 else len(ids) / 5 for ids in completion_ids]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    model = Qwen2ForCausalLM(Qwen2Config(**RECORDING["model"]))
    vector_to_parameters(TENSORS["first_weights"], model.parameters())
    model.save_pretrained(folder)
    for name, text in RECORDING["files"].items():
        (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize("engine", ["fast", pytest.param("plain", marks=pytest.mark.slow)])
@pytest.mark.parametrize("index", range(len(CASES)), ids=label)
def test_trl_takes_the_same_steps(index: int, engine: str, model_folder: Path, tmp_path: Path) -> None:
    options = {**RECORDING["common"], **CASES[index]["options"]}
    trainer = WatchedTrainer(
        model=str(model_folder),
        reward_funcs=[sums_of, lengths_of],
        args=GRPOConfig(output_dir=str(tmp_path), engine=engine, **options),
        train_dataset=[{"prompt": prompt} for prompt in RECORDING["prompts"]],
        processing_class=PreTrainedTokenizerFast.from_pretrained(model_folder),
    )
    trainer.train()
    close(torch.cat(trainer.seen_advantages), TENSORS[f"{index}.advantages"], "advantages")
    close(trainer.seen_logprobs[0], TENSORS[f"{index}.logprobs"], "log-probs")
    close(parameters_to_vector(trainer.model.parameters()).detach(), TENSORS[f"{index}.weights"], "weights")
    ours = [line for line in trainer.state.log_history if "grad_norm" in line]
    for step, (line, expected) in enumerate(zip(ours, CASES[index]["lines"], strict=True)):
        for name in sorted(comparable(expected, options, engine)):
            assert line[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-4), f"step {step + 1}: {name}"


def comparable(expected: dict[str, float], options: dict[str, Any], engine: str) -> set[str]:
    """TRL's metrics but for those that mean something else here, or have no value."""
    names = {name for name, value in expected.items() if value is not None}
    of_tokens = {
        name for name in names if name.startswith(("entropy", "kl", "clip", "cispo_clip", "vespo", "sampling"))
    }
    if options.get("gradient_accumulation_steps", 1) > 1:
        names -= {*of_tokens, "policy_loss"}  # TRL's are means over micro-batches
    if engine == "fast" and not options.get("beta") and not options.get("entropy_coef"):
        names -= of_tokens  # over the tokens trained on: completions without an advantage are left out
    return names


def close(ours: Tensor, theirs: Tensor, what: str) -> None:
    torch.testing.assert_close(ours, theirs, **TOLERANCE, msg=lambda message: f"{what}: {message}")


def test_the_recording_covers_what_can_differ() -> None:
    """Ratios off 1, clipping, masks and bounds that bite: otherwise agreement says nothing."""
    lines = [(case["options"], line) for case in CASES for line in case["lines"]]
    assert {case["options"].get("loss_type", "dapo") for case in CASES} >= {"grpo", "bnpo", "vespo", "luspo", "sapo"}
    assert sum(line.get("clip_ratio/region_mean", 0) > 0 for _, line in lines) >= 5
    assert sum(line.get("kl", 0) > 1e-3 for _, line in lines) >= 10
    assert any(abs(line.get("vespo/phi_seq_mean", 1) - 1) > 0.05 for _, line in lines)
    assert any(line.get("sampling/importance_sampling_ratio/min", 1) == 0 for _, line in lines), "masked out"
    assert len({line["entropy_coef"] for _, line in lines if "entropy_coef" in line}) > 3
    weights = {json.dumps(case["options"], sort_keys=True): TENSORS[f"{i}.weights"] for i, case in enumerate(CASES)}

    def weights_of(**options: Any) -> Tensor:
        return weights[json.dumps(options, sort_keys=True)]

    base = weights_of(cast_lm_head_to_fp32=True)  # of a model that is float32 anyway
    assert not torch.equal(weights_of(top_entropy_quantile=0.4), base)
    twice = weights_of(loss_type="dapo", num_iterations=2)
    assert not torch.equal(weights_of(off_policy_mask_threshold=0.01, num_iterations=2), twice)
