"""The sides of a rollout: `SamplerEngine`; HF `generate` and `generate_batch` as a GRPO trainer calls them."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import ContinuousBatchingConfig, GenerationConfig
from workloads import FIRST_WORD, IMAGE, MODELS, VIDEO, NoTexts, Workload, build_prompts

from fastgrpo.plain.engine import vision_inputs
from fastgrpo.sampler.engine import SamplerEngine, SamplerOptions
from fastgrpo.types import Completion, SamplingParams


def build_engine(model: Any, dtype: torch.dtype | None = None, **options: Any) -> SamplerEngine:
    """In sync with the model."""
    engine = SamplerEngine(model, NoTexts(), options=SamplerOptions(max_rows=1024, **options), dtype=dtype)
    engine.sync()
    return engine


def our_rollout(
    engine: SamplerEngine, workload: Workload, tokens: int, temperature: float = 1.0
) -> dict[int, tuple[Completion, ...]]:
    """Completions by row id."""
    params = SamplingParams(tokens, temperature=temperature)
    groups = engine.generate(build_prompts(workload), workload.group, params, step=0)
    return {prompt.row_id: completions for prompt, completions in groups}


@torch.no_grad()
def hf_rollout(model: Any, workload: Workload, tokens: int, temperature: float = 1.0) -> Tensor:
    """[rows, tokens], of a left-padded batch that holds every prompt G times, pictures included."""
    prompts = [p for p in build_prompts(workload) for _ in range(workload.group)]
    ids = pad_sequence([p.input_ids for p in prompts], batch_first=True, padding_value=0, padding_side="left")
    lengths = torch.tensor([len(p.input_ids) for p in prompts])
    mask = (torch.arange(ids.shape[1]) >= ids.shape[1] - lengths[:, None]).long()
    ids, mask = ids.to(model.device), mask.to(model.device)
    draws = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0} if temperature else {"do_sample": False}
    config = GenerationConfig(
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        suppress_tokens=[IMAGE, VIDEO],
        pad_token_id=0,
        use_cache=True,
        **draws,
    )
    sequences = model.generate(
        input_ids=ids, attention_mask=mask, **vision_inputs(model, prompts, ids), generation_config=config
    )
    return sequences[:, ids.shape[1] :].cpu()


def batching_rollout(model: Any, workload: Workload, tokens: int) -> None:
    """transformers' continuous batching. It takes no pictures: a word stands for each token of one."""
    words = MODELS[workload.model].vocabulary - FIRST_WORD
    prompts = [
        (FIRST_WORD + p.input_ids % words).tolist() for p in build_prompts(workload) for _ in range(workload.group)
    ]
    config = GenerationConfig(
        max_new_tokens=tokens, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, pad_token_id=0, eos_token_id=-1
    )
    # Left to itself it takes nine tenths of the memory.
    pages = sum(-(-(len(prompt) + tokens) // 16) for prompt in prompts)
    sizes = ContinuousBatchingConfig(page_size=16, num_blocks=pages, max_batch_tokens=8192)
    found = model.generate_batch(prompts, config, sizes, progress_bar=False)
    assert all(len(output.generated_tokens) == tokens for output in found.values())
