"""The generic decoder: other families' own layers over the paged cache, against transformers."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from device_only import DeviceOnly, PlainIndexing
from family_parity import draw, logprobs_of, make_engine, sampler_error
from fastgrpo_kernels import SampleParams
from peft import LoraConfig, get_peft_model
from tiny_families import FAMILIES, family, text_model, text_prompts
from torch._subclasses.fake_tensor import FakeTensorMode

from fastgrpo.sampler.choice import unsupported
from fastgrpo.sampler.generic_decoder import GenericDecoder, generic_shape
from fastgrpo.sampler.runner import Limits, Runner
from fastgrpo.types import Completion, Prompt

GENERIC = [name for name in FAMILIES if name not in ("Qwen2", "Qwen2-VL", "Qwen2.5-VL")]


def assert_logprobs(model: Any, prompt: Prompt, completion: Completion, temperature: float) -> None:
    exact = logprobs_of(model, prompt, completion.token_ids, temperature)
    torch.testing.assert_close(completion.logprobs, exact, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", GENERIC)
def test_tokens_and_logprobs_are_those_of_transformers(name: str) -> None:
    model, prompts = family(name)
    assert isinstance(make_engine(model).decoder, GenericDecoder)
    assert sampler_error(model, prompts) < 1e-4


def test_a_policy_in_training_stays_so() -> None:
    model, prompts = family("Llama")
    model.gradient_checkpointing_enable()
    model.train()
    found = draw(make_engine(model), prompts, 3, temperature=0.8)
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
    model, _ = family(name)
    shape = generic_shape(model)
    if hasattr(model.config.get_text_config(), "num_experts"):
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


@pytest.mark.parametrize("name", ["Qwen3-VL", "Gemma"])
def test_partitioned_weights_are_gathered_into_a_copy(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """ZeRO-3 as the sync sees it: parameters with `ds_id` are empty but inside GatheredParameters."""
    deepspeed = pytest.importorskip("deepspeed")
    model, prompts = family(name)
    whole_model = copy.deepcopy(model)
    engine = make_engine(model)
    whole: dict[int, torch.Tensor] = {}
    for i, parameter in enumerate(model.parameters()):
        parameter.ds_id, whole[i] = i, parameter.data
        parameter.data = parameter.data.new_empty(0)

    @contextmanager
    def gathered(parameters: list[torch.nn.Parameter]) -> Iterator[None]:
        for parameter in parameters:
            parameter.data = whole[parameter.ds_id]
        yield
        for parameter in parameters:
            parameter.data = parameter.data.new_empty(0)

    monkeypatch.setattr(deepspeed.zero, "GatheredParameters", gathered)
    engine.sync()
    for row, (completion,) in draw(engine, prompts, 1).items():
        assert_logprobs(whole_model, prompts[row], completion, 1.0)
    assert not any(parameter.numel() for parameter in model.parameters())


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
