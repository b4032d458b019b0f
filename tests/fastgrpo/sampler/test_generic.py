"""The generic decoder: other families' own layers over the paged cache, against transformers."""

import copy
from typing import Any

import pytest
import torch
from device_only import DeviceOnly, PlainIndexing
from fastgrpo_kernels import SampleParams
from peft import LoraConfig, get_peft_model
from tiny_families import TEXT_FAMILIES, text_model, text_prompts
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import GenerationConfig

from fastgrpo.sampler.choice import unsupported
from fastgrpo.sampler.engine import SamplerEngine, SamplerOptions
from fastgrpo.sampler.generic_decoder import GenericDecoder, generic_shape
from fastgrpo.sampler.runner import Limits, Runner
from fastgrpo.types import Completion, Prompt, SamplingParams

GENERIC = [name for name in TEXT_FAMILIES if name != "Qwen2"]


class NoText:
    """A tokenizer that has no words."""

    eos_token_id = None

    def batch_decode(self, ids: Any, **_: Any) -> list[str]:
        return [""] * len(ids)


def make_engine(model: Any, dtype: torch.dtype | None = None, **options: Any) -> SamplerEngine:
    engine = SamplerEngine(model, NoText(), options=SamplerOptions(page_size=4, **options), dtype=dtype)
    assert isinstance(engine.decoder, GenericDecoder)
    engine.sync()
    return engine


def draw(engine: SamplerEngine, prompts: list[Prompt], count: int, **params: Any) -> dict[int, tuple[Completion, ...]]:
    rollouts = engine.generate(prompts, count, SamplingParams(**({"max_new_tokens": 12} | params)), 0)
    return {rollout.prompt.row_id: rollout.completions for rollout in rollouts}


@torch.no_grad()
def assert_logprobs(model: Any, prompt: Prompt, completion: Completion, temperature: float, atol: float = 1e-4) -> None:
    ids = torch.cat([prompt.input_ids, completion.token_ids])[None]
    logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt.input_ids) - 1 : -1] / temperature
    plain = logits.float().log_softmax(-1).gather(1, completion.token_ids[:, None]).squeeze(1)
    torch.testing.assert_close(completion.logprobs, plain, atol=atol, rtol=0)


@pytest.mark.parametrize("name", GENERIC)
def test_tokens_and_logprobs_are_those_of_transformers(name: str) -> None:
    model = text_model(name)
    prompts = text_prompts(1, 9, 22)
    engine = make_engine(model, max_rows=5, prefill_tokens=12)
    for prompt, (completion,) in zip(prompts, draw(engine, prompts, 1, temperature=0.0).values(), strict=True):
        config = GenerationConfig(do_sample=False, max_new_tokens=12, pad_token_id=0)
        theirs = model.generate(
            input_ids=prompt.input_ids[None],
            attention_mask=torch.ones_like(prompt.input_ids)[None],
            generation_config=config,
        )
        assert completion.token_ids.tolist() == theirs[0, len(prompt.input_ids) :].tolist()
    model.train()  # as a trainer leaves it
    found = draw(engine, prompts, 3, temperature=0.8)
    assert model.training
    for prompt in prompts:
        assert len({tuple(c.token_ids.tolist()) for c in found[prompt.row_id]}) == 3
        for completion in found[prompt.row_id]:
            assert_logprobs(model.eval(), prompt, completion, 0.8)


def test_completions_do_not_depend_on_the_batch() -> None:
    model = text_model("Llama")
    prompts = text_prompts(5, 9, 14)
    together = draw(make_engine(model), prompts, 4)
    alone = draw(make_engine(model, max_rows=2, steps_per_check=3), prompts[1:2], 4)
    for ours, theirs in zip(alone[1], together[1], strict=True):
        assert ours.token_ids.tolist() == theirs.token_ids.tolist()


def move_to_fake_cuda(model: Any) -> None:
    """bfloat16 weights without data."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            empty = torch.empty(parameter.shape, dtype=torch.bfloat16, device="cuda")
            setattr(module, name, torch.nn.Parameter(empty, requires_grad=False))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype, device="cuda"))


@pytest.mark.parametrize("name", GENERIC)
def test_the_step_stays_on_a_cuda_device(name: str) -> None:
    model = text_model(name)
    shape = generic_shape(model)
    if name == "Qwen3-MoE":
        model.set_experts_implementation("batched_mm")  # the default, grouped products, asks the GPU what it is
    with FakeTensorMode(allow_non_fake_inputs=True):
        move_to_fake_cuda(model)
        decoder = GenericDecoder(model, shape, torch.bfloat16, "cuda")
        limits = Limits(rows=8, groups=3, prefix_pages=4, suffix_pages=3, max_new_tokens=33, pages=64)
        runner = Runner(decoder, limits, 16, SampleParams(), eos_ids=[0, 7], suppressed=[3], cuda_graphs=False)
        with decoder.running(), PlainIndexing(), DeviceOnly() as mode:
            runner.step(8)
        assert mode.calls > 20


def test_whole_weights_are_read_in_place() -> None:
    model = text_model("Llama")
    engine = make_engine(model)
    assert engine.decoder.model is model
    prompts = text_prompts(9)
    before = draw(engine, prompts, 1)[0][0]
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(-1)
    engine.sync()
    after = draw(engine, prompts, 1)[0][0]
    assert before.token_ids.tolist() != after.token_ids.tolist()
    assert_logprobs(model, prompts[0], after, 1.0)


def test_other_dtypes_get_a_copy_that_follows_the_policy() -> None:
    model = text_model("Qwen3-MoE").bfloat16()
    engine = make_engine(model, torch.float32)
    assert engine.decoder.model is not model
    prompts = text_prompts(9)
    draw(engine, prompts, 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    engine.sync()
    assert_logprobs(copy.deepcopy(model).float(), prompts[0], draw(engine, prompts, 1)[0][0], 1.0)


TARGETS = ["q_proj", "o_proj", "down_proj"]


@pytest.mark.parametrize(
    "changes",
    [{}, {"modules_to_save": ["lm_head"]}, {"target_modules": [*TARGETS, "embed_tokens"]}, {"use_dora": True}],
)
@pytest.mark.parametrize("copied", [False, True])
def test_adapters(changes: dict[str, Any], copied: bool) -> None:
    settings = {"r": 4, "lora_alpha": 12, "target_modules": TARGETS, "init_lora_weights": False, **changes}
    model = get_peft_model(text_model("Llama"), LoraConfig(**settings)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    prompts = text_prompts(9)
    if copied and "use_dora" in changes:
        with pytest.raises(ValueError, match=r"not plain LoRA, so no copy .* can be made: use PlainEngine"):
            make_engine(model, torch.float64)
        return
    engine = make_engine(model, torch.float64 if copied else None)
    assert_logprobs(model, prompts[0], draw(engine, prompts, 1)[0][0], 1.0)


def test_what_it_cannot_run_it_says() -> None:
    model = text_model("Llama")
    model.config.rope_parameters |= {"rope_type": "dynamic", "factor": 2.0}
    assert "of type dynamic" in str(unsupported(model))
