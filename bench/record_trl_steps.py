"""Records three training steps of TRL on fixed completions, setting by setting: tests/fastgrpo/test_trl_steps.py.

    make install-bench
    .venv-bench/bin/python bench/record_trl_steps.py

TRL's trainer runs unchanged but for where completions come from, and the shuffle of a rollout's rows, which is left
out. The model's first weights, its tokenizer and the completions are in the file, so it needs nothing else.
"""

import fastgrpo.profile.sides.trl_on_cpu  # noqa: F401  isort: skip

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
import trl
from datasets import Dataset
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from transformers.utils import logging
from trl.trainer import grpo_trainer

OUT = Path(__file__).parents[1] / "tests" / "fastgrpo" / "recordings" / "trl_steps.safetensors"
STEPS, GROUP, PROMPTS, LONGEST = 3, 4, 2, 6
"""Optimizer steps, completions of a prompt, prompts of a rollout, most tokens of a completion."""
VOCABULARY, EOS = 32, 1
MODEL = {
    "vocab_size": VOCABULARY, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64, "initializer_range": 0.7,
    "pad_token_id": 0, "eos_token_id": EOS, "tie_word_embeddings": False,
}  # fmt: skip
COMMON = {
    "use_cpu": True, "bf16": False, "optim": "sgd", "learning_rate": 0.3, "lr_scheduler_type": "constant",
    "max_steps": STEPS, "num_generations": GROUP, "per_device_train_batch_size": GROUP * PROMPTS,
    "max_completion_length": LONGEST, "temperature": 0.9, "shuffle_dataset": False, "logging_steps": 1,
    "report_to": "none", "save_strategy": "no", "gradient_checkpointing": False, "disable_tqdm": True,
    "reward_weights": [1.0, 0.5], "log_completions": False,
}  # fmt: skip
TWICE = {"num_iterations": 2}
VLLM = {"use_vllm": True, "vllm_importance_sampling_clip_max": 1.3, "vllm_importance_sampling_clip_min": 0.8}
LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")
OF_TIME = ("step_time", "epoch")
CASES: list[dict[str, Any]] = [
    *({"loss_type": loss_type, **TWICE} for loss_type in LOSS_TYPES),
    *({"loss_type": loss_type, "beta": 0.04} for loss_type in LOSS_TYPES),
    {"loss_type": "grpo", "beta": 0.04, "use_bias_correction_kl": False, **TWICE},
    {"loss_type": "grpo", "importance_sampling_level": "sequence", "beta": 0.04, "epsilon": 3e-3, **TWICE},
    {"loss_type": "luspo", "importance_sampling_level": "sequence", **TWICE},
    {"epsilon": 0.01, "epsilon_high": 0.02, "delta": 1.05, **TWICE},
    {"loss_type": "cispo", "epsilon_high": 1.01, **TWICE},
    {"loss_type": "sapo", "sapo_temperature_pos": 2.0, "sapo_temperature_neg": 0.7, **TWICE},
    {"loss_type": "vespo", "vespo_k_pos": 1.0, "vespo_lambda_neg": 0.5, **TWICE},
    {"scale_rewards": "batch"},
    {"scale_rewards": "none"},
    {"multi_objective_aggregation": "normalize_then_sum"},
    {"mask_truncated_completions": True},
    {"mask_truncated_completions": True, "loss_type": "grpo", "beta": 0.04},
    {"entropy_coef": 0.1},
    {"entropy_coef": 0.1, "loss_type": "luspo", "beta": 0.04},
    {"entropy_coef": 0.1, "use_adaptive_entropy": True, "entropy_target": 2.0, "entropy_coef_delta": 0.03},
    {"entropy_coef": 0.1, "use_adaptive_entropy": True, "entropy_target": 0.5, "entropy_coef_delta": 0.03},
    {"top_entropy_quantile": 0.4},
    {"top_entropy_quantile": 0.4, "entropy_coef": 0.1, "use_adaptive_entropy": True, "entropy_target": 4.0},
    {"off_policy_mask_threshold": 0.01, **TWICE},
    {"off_policy_mask_threshold": 0.05, **VLLM},
    *({"vllm_importance_sampling_mode": f"{level}_{cut}", **VLLM} for level in ("token", "sequence")
      for cut in ("mask", "truncate")),
    {"vllm_importance_sampling_mode": "token_truncate", "loss_type": "vespo", **VLLM, **TWICE},
    {"use_vllm": True, "vllm_importance_sampling_correction": False},
    {"per_device_train_batch_size": GROUP, "gradient_accumulation_steps": 2, "entropy_coef": 0.1},
    {"per_device_train_batch_size": GROUP, "gradient_accumulation_steps": 2, "loss_type": "bnpo", "beta": 0.04},
    {"per_device_train_batch_size": 2, "steps_per_generation": 4},
    {"cast_lm_head_to_fp32": True},
    {"per_device_train_batch_size": GROUP, "gradient_accumulation_steps": 2, "top_entropy_quantile": 0.4,
     "entropy_coef": 0.1},
    # generations and optimizer steps that do not fit each other: amid a step, several in a step
    {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "steps_per_generation": 4, "epsilon": 0.01},
    {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "steps_per_generation": 4,
     "loss_type": "bnpo", "beta": 0.04, "entropy_coef": 0.1},
    {"gradient_accumulation_steps": 2, "steps_per_generation": 1, "scale_rewards": "batch", "max_steps": 2,
     "entropy_coef": 0.1},
    {"gradient_accumulation_steps": 3, "steps_per_generation": 1, "loss_type": "grpo", "beta": 0.04, "max_steps": 1},
]  # fmt: skip


def sums_of(completion_ids: list[list[int]], **_: Any) -> list[float | None]:
    """A reward that abstains at three tokens."""
    return [None if len(ids) == 3 else sum(ids) % 7 / 3 for ids in completion_ids]


def lengths_of(completion_ids: list[list[int]], **_: Any) -> list[float | None]:
    """A reward that abstains at three tokens, and at six."""
    return [None if len(ids) % 3 == 0 else len(ids) / 5 for ids in completion_ids]


def draw_completions() -> list[list[list[int]]]:
    """Per rollout, its completions: most end, some are cut at the limit, one has three tokens."""
    draw = torch.Generator().manual_seed(0)
    rollouts = []
    for _ in range(STEPS):
        others = torch.tensor([1, 2, 4, 5, LONGEST])[torch.randint(5, (GROUP * PROMPTS - 2,), generator=draw)]
        lengths = [3, LONGEST, *others.tolist()]
        ids = [torch.randint(2, VOCABULARY, (length,), generator=draw).tolist() for length in lengths]
        rollouts.append([one if len(one) == LONGEST else [*one[:-1], EOS] for one in ids])
    return rollouts


def build_tokenizer() -> PreTrainedTokenizerFast:
    words = {"<pad>": 0, "<eos>": EOS, **{f"w{i}": i for i in range(2, VOCABULARY)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w2"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


class FixedCompletions(trl.GRPOTrainer):
    """TRL's trainer on given completions; keeps what it makes of them."""

    rollouts: list[list[list[int]]]
    sampling_logprobs: list[list[list[float]]]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.advantages: list[Tensor] = []
        self.logprobs: list[Tensor] = []
        self.drawn = 0

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        self.drawn += 1
        return self.rollouts[self.drawn - 1], self.sampling_logprobs[self.drawn - 1] if self.use_vllm else None

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        output = super()._generate_and_score_completions(inputs)
        self.advantages.append(output["advantages"])
        return output

    def _compute_loss(self, model: Any, inputs: Any) -> Tensor:
        self.mask = inputs["completion_mask"].bool()
        return super()._compute_loss(model, inputs)

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        output = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        if torch.is_grad_enabled():
            self.logprobs.append(output[0].detach()[self.mask])
        return output


def draw_sampling_logprobs(model: Any, prompts: list[list[int]], rollouts: list[list[list[int]]]) -> list[Any]:
    """Log-probs near the model's own, as a sampler of another precision would give."""
    draw = torch.Generator().manual_seed(1)
    found = []
    for r, rollout in enumerate(rollouts):
        of_rollout = []
        for c, completion in enumerate(rollout):
            prompt = prompts[PROMPTS * r + c // GROUP]
            with torch.no_grad():
                logits = model(torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1]
            scores = torch.log_softmax(logits / COMMON["temperature"], dim=-1)
            own = scores.gather(1, torch.tensor(completion)[:, None]).squeeze(1)
            of_rollout.append((own + 0.15 * torch.randn(len(own), generator=draw)).tolist())
        found.append(of_rollout)
    return found


def flat_weights(model: Any) -> Tensor:
    """All of them, in the order of `parameters()`."""
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def record(case: dict[str, Any], folder: Path, tokenizer: Any, data: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    """Tensors of a run, and its log lines."""
    options = {**COMMON, **case}
    args = trl.GRPOConfig(output_dir=str(folder / "run"), **{**options, "use_vllm": False})
    trainer = FixedCompletions(
        model=str(folder),
        reward_funcs=[sums_of, lengths_of],
        args=args,
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in data["prompts"]]),
        processing_class=tokenizer,
    )
    trainer.use_vllm = options.get("use_vllm", False)  # its corrections, without its engine
    trainer.rollouts, trainer.sampling_logprobs = data["completions"], data["sampling_logprobs"]
    trainer.train()
    steps = [line for line in trainer.state.log_history if "grad_norm" in line]
    lines = [{name: value for name, value in line.items() if name not in OF_TIME} for line in steps]
    tensors = {
        "advantages": torch.cat(trainer.advantages),
        "logprobs": torch.cat(trainer.logprobs[: trainer.args.gradient_accumulation_steps]),
        "weights": flat_weights(trainer.model),
    }
    return tensors, lines


def main() -> None:
    """Records every case and writes the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT)
    out = parser.parse_args().out
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    grpo_trainer.shuffle_sequence_dict = lambda batch: batch
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**MODEL)).eval()
    prompts = [" ".join(f"w{(5 * i + 3 * j) % 30 + 2}" for j in range(2 + i)) for i in range(STEPS * PROMPTS)]
    completions = draw_completions()
    data = {
        "prompts": prompts,
        "completions": completions,
        "sampling_logprobs": draw_sampling_logprobs(model, tokenizer(prompts)["input_ids"], completions),
    }
    tensors = {"first_weights": flat_weights(model)}
    cases = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        for number, case in enumerate(CASES):
            found, lines = record(case, folder, tokenizer, data)
            tensors |= {f"{number}.{key}": value.contiguous() for key, value in found.items()}
            cases.append({"options": case, "lines": lines})
        saved = {file: (folder / file).read_text() for file in ("tokenizer.json", "tokenizer_config.json")}
    # One entry: the order in which the format writes several is not fixed.
    description = {"trl": trl.__version__, "model": MODEL, "common": COMMON, "files": saved, **data, "cases": cases}
    save_file(tensors, out, metadata={"recording": json.dumps(description)})
    print(f"{len(cases)} cases of TRL {trl.__version__}: {out}, {out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
