"""A sampler that is synced equals one built afresh from the same policy."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastgrpo.demo.base_model import load_tokenizer, tiny_model
from fastgrpo.model.families import base_model
from fastgrpo.model.vision import image_features, vision_tower
from fastgrpo.sampler.choice import unsupported
from fastgrpo.sampler.engine import SamplerEngine
from fastgrpo.sampler.generic_decoder import GenericDecoder
from fastgrpo.sampler.packed_decoder import DecoderShape, PackedDecoder
from fastgrpo.sampler.weight_sync import sync_weights
from fastgrpo.types import Prompt, SamplingParams

deepspeed = pytest.importorskip("deepspeed")

GREEDY = SamplingParams(12, temperature=0.0)


@pytest.fixture
def model() -> Any:
    model = tiny_model(seed=4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4) if parameter.ndim == 2 else parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def make_prompt(model: Any, length: int = 9) -> Prompt:
    ids = torch.randint(10, 200, (length,), generator=torch.Generator().manual_seed(0))
    return Prompt(0, ids, torch.arange(length).expand(3, -1), None, None, "")


def weights_of(decoder: PackedDecoder) -> dict[str, Tensor]:
    named = {"embed": decoder.embed, "norm": decoder.final_norm, "head": decoder.head_weight}
    for i, layer in enumerate(decoder.layers):
        named |= {f"{i}.{name}": weight for name, weight in vars(layer).items()}
    return named


def fresh_weights(model: Any, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    decoder = PackedDecoder(DecoderShape.of(model), dtype, "cpu")
    for weight in weights_of(decoder).values():
        weight.fill_(torch.nan)
    sync_weights(decoder, model)
    return weights_of(decoder)


def assert_fresh(decoder: PackedDecoder, model: Any) -> None:
    for name, weight in fresh_weights(model).items():
        assert weight.isfinite().all(), name
        assert torch.equal(weights_of(decoder)[name], weight), name


class Copies(TorchDispatchMode):
    """Counts the operators that copy."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "copy" in str(func):
            self.calls[str(func.overloadpacket)] += 1
        return func(*args, **(kwargs or {}))


def test_whole_weights_are_copied_together(model: Any) -> None:
    decoder = PackedDecoder(DecoderShape.of(model), torch.bfloat16, "cpu")
    with Copies() as mode:
        sync_weights(decoder, model)
    assert mode.calls == {"aten._foreach_copy_": 1, "aten.copy_": 1}  # the rotary frequencies


def train_a_step(model: Any) -> None:
    """Everything that is trained changes."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1.0)
    for parameter in trained:
        parameter.grad = torch.randn_like(parameter) * 0.1
    optimizer.step()


def greedy(engine: SamplerEngine, prompt: Prompt) -> list[int]:
    return next(iter(engine.generate([prompt], 1, GREEDY, 0)))[1][0].token_ids.tolist()


def synced(model: Any) -> SamplerEngine:
    engine = SamplerEngine(model, load_tokenizer())
    engine.sync()
    return engine


def test_a_sampler_without_weights_says_so(model: Any) -> None:
    with pytest.raises(RuntimeError, match=r"no weights yet; call sync\(\) first"):
        greedy(SamplerEngine(model, load_tokenizer()), make_prompt(model))


def test_generate_draws_from_the_weights_of_the_last_sync(model: Any) -> None:
    engine = synced(model)
    prompt = make_prompt(model)
    before, addresses = greedy(engine, prompt), {n: w.data_ptr() for n, w in weights_of(engine.decoder).items()}
    train_a_step(model)
    assert greedy(engine, prompt) == before  # of its own
    engine.sync()
    assert greedy(engine, prompt) == greedy(synced(model), prompt) != before
    assert_fresh(engine.decoder, model)
    assert {n: w.data_ptr() for n, w in weights_of(engine.decoder).items()} == addresses


def test_weights_are_packed_in_order_and_converted(model: Any) -> None:
    weights = fresh_weights(model, torch.bfloat16)
    attention, mlp = model.model.language_model.layers[1].self_attn, model.model.language_model.layers[1].mlp
    projections = [attention.q_proj, attention.k_proj, attention.v_proj]
    assert torch.equal(weights["1.qkv"], torch.cat([m.weight for m in projections]).bfloat16())
    assert torch.equal(weights["1.qkv_bias"], torch.cat([m.bias for m in projections]).bfloat16())
    assert torch.equal(weights["1.gate_up"], torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]).bfloat16())
    assert weights["head"] is weights["embed"]


TARGETS = ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]


@pytest.mark.parametrize(
    "changes",
    [{}, {"use_rslora": True}, {"target_modules": [*TARGETS, "embed_tokens"]}, {"modules_to_save": ["lm_head"]}],
)
def test_lora_is_merged_without_touching_the_policy(model: Any, changes: dict[str, Any]) -> None:
    settings = {"r": 4, "lora_alpha": 12, "target_modules": TARGETS, "init_lora_weights": False, **changes}
    model = get_peft_model(model, LoraConfig(**settings)).eval()
    assert unsupported(model) is None
    engine = SamplerEngine(model, load_tokenizer())
    engine.sync()
    train_a_step(model)
    engine.sync()
    assert_fresh(engine.decoder, model)
    untouched = {name: value.clone() for name, value in model.state_dict().items()}
    prompt = make_prompt(model)
    _, (completion,) = next(iter(engine.generate([prompt], 1, GREEDY, 0)))
    for name, value in model.state_dict().items():
        assert torch.equal(value, untouched[name]), name
    ids = torch.cat([prompt.input_ids, completion.token_ids])[None]
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, len(prompt.input_ids) - 1 : -1]
    plain = logits.log_softmax(-1).gather(1, completion.token_ids[:, None]).squeeze(1)
    torch.testing.assert_close(completion.logprobs, plain, atol=1e-4, rtol=0)
    with model.disable_adapter():
        engine.sync()
        base = fresh_weights(base_model(model))
    assert torch.equal(weights_of(engine.decoder)["0.qkv"], base["0.qkv"])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"use_dora": True}, "not plain LoRA"), ({"lora_bias": True, "target_modules": ["q_proj"]}, "not plain LoRA")],
)
def test_adapters_that_cannot_be_merged_run_unmerged(model: Any, changes: dict[str, Any], reason: str) -> None:
    adapted = get_peft_model(model, LoraConfig(**{"r": 2, "target_modules": TARGETS, **changes}))
    engine = SamplerEngine(adapted, load_tokenizer())
    assert isinstance(engine.decoder, GenericDecoder)
    with pytest.raises(
        ValueError, match=f"{reason}, so no copy of them in torch.bfloat16 can be made: use PlainEngine"
    ):
        SamplerEngine(adapted, load_tokenizer(), dtype=torch.bfloat16)


@pytest.mark.parametrize("adapted", [False, True])
def test_partitioned_parameters_are_gathered_module_by_module(
    model: Any, adapted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ZeRO-3 as the sync sees it: parameters with `ds_id` are empty but inside GatheredParameters."""
    if adapted:
        model = get_peft_model(model, LoraConfig(r=2, target_modules=[*TARGETS, "qkv"], init_lora_weights=False))
    expected = fresh_weights(model)
    draw = torch.Generator().manual_seed(0)
    picture = replace(
        make_prompt(model),
        pixel_values=torch.randn(16, 3 * 2 * 14 * 14, generator=draw),
        image_grid_thw=torch.tensor([[1, 4, 4]]),
    )
    with torch.no_grad():
        seen = image_features(vision_tower(model), [picture])[0]
    engine = SamplerEngine(model, load_tokenizer())  # before they are partitioned, as a trainer does
    whole: dict[int, Tensor] = {}
    for i, parameter in enumerate(model.parameters()):
        parameter.ds_id, whole[i] = i, parameter.data
        parameter.data = parameter.data.new_empty(0)
    held: list[int] = []

    @contextmanager
    def gathered(parameters: list[nn.Parameter]) -> Iterator[None]:
        assert not held, "more than one module is whole at a time"
        for parameter in parameters:
            parameter.data = whole[parameter.ds_id]
            held.append(parameter.ds_id)
        yield
        for parameter in parameters:
            parameter.data = parameter.data.new_empty(0)
        held.clear()

    monkeypatch.setattr(deepspeed.zero, "GatheredParameters", gathered)
    engine.sync()
    for name, weight in expected.items():
        assert torch.equal(weights_of(engine.decoder)[name], weight), name
    with torch.no_grad():
        torch.testing.assert_close(image_features(engine.prefill.tower, [picture])[0], seen)
    assert not any(parameter.numel() for parameter in model.parameters())
