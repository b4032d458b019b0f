"""How far sampler and update are from transformers' own forward pass, one sequence at a time, without padding."""

import copy
from typing import Any

import torch
from fastgrpo_kernels import LossParams
from torch import Tensor
from transformers import GenerationConfig

from fastgrpo.model.families import placeholder_ids
from fastgrpo.plain.engine import vision_inputs
from fastgrpo.plain.updater import PlainUpdater
from fastgrpo.sampler.engine import SamplerEngine, SamplerOptions
from fastgrpo.types import Completion, Prompt, SamplingParams, TrainingGroup, Updater
from fastgrpo.update.updater import PackedUpdater


class NoText:
    """A tokenizer that has no words."""

    eos_token_id = None

    def batch_decode(self, ids: Any, **_: Any) -> list[str]:
        return [""] * len(ids)


def make_engine(model: Any, dtype: torch.dtype | None = None, **options: Any) -> SamplerEngine:
    """A synced sampler of small pages."""
    engine = SamplerEngine(model, NoText(), options=SamplerOptions(page_size=4, **options), dtype=dtype)
    engine.sync()
    return engine


def draw(engine: SamplerEngine, prompts: list[Prompt], count: int, **params: Any) -> dict[int, tuple[Completion, ...]]:
    """Completions of 12 tokens by row."""
    rollouts = engine.generate(prompts, count, SamplingParams(**({"max_new_tokens": 12} | params)), 0)
    return {rollout.prompt.row_id: rollout.completions for rollout in rollouts}


def greedy(model: Any, prompt: Prompt) -> list[int]:
    """12 tokens by HF generate, placeholders suppressed."""
    ids = prompt.input_ids[None]
    config = GenerationConfig(
        do_sample=False, max_new_tokens=12, pad_token_id=0, suppress_tokens=placeholder_ids(model) or None
    )
    inputs = vision_inputs(model, [prompt], ids)
    found = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config, **inputs)
    return found[0, ids.shape[1] :].tolist()


@torch.no_grad()
def logprobs_of(model: Any, prompt: Prompt, token_ids: Tensor, temperature: float = 1.0) -> Tensor:
    """[C] of one whole forward pass."""
    ids = torch.cat([prompt.input_ids, token_ids])[None]
    logits = model(input_ids=ids, use_cache=False, **vision_inputs(model, [prompt], ids)).logits[0]
    logits = logits[len(prompt.input_ids) - 1 : -1].float() / temperature
    return logits.log_softmax(-1).gather(1, token_ids[:, None]).squeeze(1)


def sampler_error(model: Any, prompts: list[Prompt]) -> float:
    """Largest difference of log-probs at temperature 0.8; inf if greedy tokens differ from HF generate's."""
    engine = make_engine(model, max_rows=5, prefill_tokens=30)
    for row, (completion,) in draw(engine, prompts, 1, temperature=0.0).items():
        if completion.token_ids.tolist() != greedy(model, prompts[row]):
            return torch.inf
    error = 0.0
    for row, completions in draw(engine, prompts, 3, temperature=0.8).items():
        for completion in completions:
            exact = logprobs_of(model, prompts[row], completion.token_ids, 0.8)
            error = max(error, (completion.logprobs - exact).abs().max().item())
    return error


def training_groups(prompts: list[Prompt]) -> list[TrainingGroup]:
    """Groups of three random completions with random advantages."""
    random = torch.Generator().manual_seed(1)
    groups = []
    for prompt in prompts:
        tokens = [torch.randint(3, 80, (n,), generator=random) for n in (9, 1, 5)]
        completions = tuple(
            Completion(prompt.row_id, i, ids, "", "length", torch.zeros(len(ids)), torch.zeros(len(ids)))
            for i, ids in enumerate(tokens)
        )
        weights = tuple(torch.rand(len(ids), generator=random) for ids in tokens)
        masks = tuple(torch.ones(len(ids), dtype=torch.bool) for ids in tokens)
        groups.append(TrainingGroup(prompt, completions, torch.randn(3, generator=random), weights, masks))
    return groups


def update_errors(model: Any, prompts: list[Prompt]) -> tuple[float, float]:
    """Largest difference of log-probs; largest of a parameter's gradient, relative to its norm or to 1 % of the largest
    norm."""
    groups = training_groups(prompts)
    packed = PackedUpdater(model, LossParams(), token_budget=10**6)
    plain = PlainUpdater(model, LossParams(), micro_batch_size=1)
    pairs = zip(packed.logprobs(groups), plain.logprobs(groups), strict=True)
    error = max((a - b).abs().max().item() for ours, theirs in pairs for a, b in zip(ours, theirs, strict=True))
    ours, theirs = gradients(model, packed, groups), gradients(model, plain, groups)
    return error, _relative(ours, theirs)


def gradients(model: Any, updater: Updater, groups: list[TrainingGroup]) -> dict[str, Tensor]:
    """Of every trained parameter, by name; the model's own are cleared."""
    model.zero_grad(set_to_none=True)
    updater.accumulate(groups)
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def steps_error(model: Any, prompts: list[Prompt]) -> float:
    """Largest difference of what two steps of clipped SGD, rows with pictures and without in each, add to a parameter:
    relative, as in `update_errors`; inf if the steps move what is frozen. The model stays as it is."""
    groups, before, moved = training_groups(prompts), dict(model.named_parameters()), []
    for make in (
        lambda policy: PackedUpdater(policy, LossParams(), token_budget=60),
        lambda policy: PlainUpdater(policy, LossParams(), micro_batch_size=1),
    ):
        policy = copy.deepcopy(model)
        updater: Updater = make(policy)
        parameters = dict(policy.named_parameters())
        trained = {name: p for name, p in parameters.items() if p.requires_grad}
        optimizer = torch.optim.SGD(trained.values(), lr=0.5)
        sums = {name: torch.zeros_like(p) for name, p in trained.items()}
        for _ in range(2):
            updater.accumulate(groups)
            torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
            for name, p in trained.items():
                sums[name] += 0 if p.grad is None else p.grad
            optimizer.step()
            optimizer.zero_grad()
        moved.append(sums)
        if any(not torch.equal(p, before[name]) for name, p in parameters.items() if name not in trained):
            return torch.inf
    return _relative(*moved)


def _relative(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Largest difference of a tensor, relative to its norm or to 1 % of the largest norm."""
    floor = 0.01 * max(tensor.norm().item() for tensor in theirs.values())
    return max((ours[name] - theirs[name]).norm().item() / max(theirs[name].norm().item(), floor) for name in theirs)
