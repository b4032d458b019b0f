"""The LM head's product in float32, in a model of half precision."""

import copy
from typing import Any

import pytest
import torch
from fastgrpo_kernels import LossParams
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from fastgrpo.model.float32_head import float32_logits, head_in_float32, require_plain_head
from fastgrpo.plain.updater import PlainUpdater
from fastgrpo.types import Completion, Prompt, TrainingGroup
from fastgrpo.update.updater import PackedUpdater


def build() -> Any:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, initializer_range=1.0, tie_word_embeddings=True,
    )  # fmt: skip
    return Qwen2ForCausalLM(config).to(torch.bfloat16)


def group() -> TrainingGroup:
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(64, (5,), generator=draw)
    tokens = torch.randint(64, (7,), generator=draw)
    completion = Completion(0, 0, tokens, "", "stop", torch.zeros(7), torch.zeros(7))
    prompt = Prompt(0, ids, torch.arange(5).expand(3, -1), None, None, "")
    one, mask = torch.ones(7), torch.ones(7, dtype=torch.bool)
    return TrainingGroup(prompt, (completion,), torch.ones(1), (one,), (mask,))


def updater_of(kind: str, model: Any, float32_head: bool) -> Any:
    if kind == "packed":
        return PackedUpdater(model, LossParams(), token_budget=100, float32_head=float32_head)
    return PlainUpdater(model, LossParams(), micro_batch_size=1, float32_head=float32_head)


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("kind", ["packed", "plain"])
def test_log_probs_are_exact_for_the_hidden_states_that_the_head_is_given(kind: str, autocast: bool) -> None:
    model = build().float() if autocast else build()
    seen: list[Tensor] = []
    model.lm_head.register_forward_pre_hook(lambda _, given: seen.append(given[0][0].detach()))

    def error(float32_head: bool) -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), torch.no_grad():
            [[found]] = updater_of(kind, model, float32_head).logprobs([group()])
            # Of 5 prompt and 7 completion tokens, those from the prompt's last on predict a completion token.
            hidden = seen[-1][-7:] if kind == "packed" else seen[-1][:7]
            scores = torch.log_softmax(hidden.double() @ model.lm_head.weight.double().T, dim=-1)
            expected = scores.gather(1, group().completions[0].token_ids[:, None]).squeeze(1)
        return (found - expected).abs().max().item()

    assert error(True) < 1e-5
    assert error(False) > 1e-3


def test_gradients_reach_head_and_layers() -> None:
    model = build()
    PackedUpdater(model, LossParams(), token_budget=100, float32_head=True).accumulate([group()])
    found = {name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None}
    reference = copy.deepcopy(model).float()
    reference.zero_grad()
    PlainUpdater(reference, LossParams(), micro_batch_size=1).accumulate([group()])
    for name, parameter in reference.named_parameters():
        assert parameter.grad is not None
        scale = parameter.grad.norm().item()
        assert (found[name] - parameter.grad).norm().item() <= 0.1 * scale + 1e-3, name


def test_a_bias_is_added_and_the_context_ends() -> None:
    head = torch.nn.Linear(3, 5).to(torch.bfloat16)
    x = torch.randn(2, 3)
    expected = x @ head.weight.float().T + head.bias.float()
    torch.testing.assert_close(float32_logits(head, x), expected)
    model = build()
    own = model.lm_head(torch.ones(1, 16, dtype=torch.bfloat16))
    with head_in_float32(model):
        assert model.lm_head(torch.ones(1, 16, dtype=torch.bfloat16)).dtype == torch.float32
    assert torch.equal(model.lm_head(torch.ones(1, 16, dtype=torch.bfloat16)), own)


def test_adapters_on_the_head_are_refused() -> None:
    adapted = get_peft_model(build(), LoraConfig(target_modules=["lm_head"], task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match=r"cast_lm_head_to_fp32=True: the LM head is a Linear"):
        require_plain_head(adapted)
    require_plain_head(build())
