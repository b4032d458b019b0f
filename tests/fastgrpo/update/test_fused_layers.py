"""The update's fused layers against transformers' own: the same results, and a third of the bytes and kernels."""

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from fastgrpo_profiling.traffic import Traffic
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import Cohere2Config, Cohere2ForCausalLM, Qwen2VLConfig, Qwen2VLForConditionalGeneration
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm

from fastgrpo.model.attention import named_backend
from fastgrpo.model.fused_modules import fused_modules
from fastgrpo.model.fused_text import fused_text
from fastgrpo.model.fused_vision import fused_vision, picture_segments
from fastgrpo.model.half_weights import half_weights
from fastgrpo.model.segments import Segments
from fastgrpo.update.packing import SharedPrefixLayout
from fastgrpo.update.shared_prefix import SharedPrefix, attend_rotated, shared_prefix_layers

NEEDS_INTERPRETER = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter")
PROMPT, COMPLETION, GROUP = 350, 700, 8
TOKENS, PATCHES = PROMPT + GROUP * COMPLETION, 4096

# Measured by the same count without fused layers: kilobytes for each token or patch, kernels of a layer.
TEXT_FORWARD, TEXT_BACKWARD = (375, 63), (761, 107)
VISION_FORWARD, VISION_BACKWARD = (266, 33), (479, 49)


def build(*, hidden: int = 32, intermediate: int = 48, vision: int = 16, heads: tuple[int, int] = (4, 2)) -> Any:
    """A Qwen2-VL of two text layers and a vision tower of two blocks."""
    section = hidden // heads[0] // 8
    text = {
        "vocab_size": 97,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": 2,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "mrope_section": [2 * section, section, section],
        },
    }
    tower = {"depth": 2, "embed_dim": vision, "num_heads": max(2, vision // 80), "mlp_ratio": 4, "hidden_size": hidden}
    torch.manual_seed(0)
    model = Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config={**tower, "patch_size": 4}))
    return model.train()


@contextlib.contextmanager
def fused(model: Any) -> Iterator[None]:
    with shared_prefix_layers(model), fused_text(model, attend=attend_rotated), fused_vision(model.model.visual):
        yield


@pytest.fixture
def triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Operators rather than plain torch, on CPU tensors."""
    monkeypatch.setenv("FASTGRPO_KERNELS", "triton")


def text_pass(model: Any, x: Tensor, layout: SharedPrefixLayout) -> Tensor:
    """Both layers and the last norm."""
    text = model.model.language_model
    angle = (
        torch.linspace(0, 9, x.shape[1] * text.layers[0].self_attn.head_dim // 2)
        .view(1, x.shape[1], -1)
        .repeat(1, 1, 2)
    )
    for layer in text.layers:
        x = layer(x, position_embeddings=(angle.cos(), angle.sin()), shared_prefix=SharedPrefix(layout))
    return text.norm(x)


def layout_of(prompt: int, lengths: list[int]) -> SharedPrefixLayout:
    """One group."""
    own, across = Segments.of(lengths, tiles=[len(lengths)]), Segments.of([sum(lengths)], [prompt])
    return SharedPrefixLayout(prompt, Segments.of([prompt]), own, across)


def pictures_pass(model: Any) -> Tensor:
    tower, grids = model.model.visual, torch.tensor([[1, 4, 6], [1, 4, 6], [1, 2, 4]])
    draw = torch.Generator().manual_seed(1)
    pixels = torch.randn(int(grids.prod(1).sum()), 3 * 2 * 4 * 4, generator=draw).requires_grad_()
    return tower(pixels, grid_thw=grids).pooler_output


def gradients(model: Any, run: Callable[[Any], Tensor], autocast: bool = False) -> dict[str, Tensor]:
    """The output, and every parameter's gradient, of a model in training mode."""
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = run(model).float()
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    return {"output": out.detach(), **{name: p.grad for name, p in model.named_parameters() if p.grad is not None}}


def text_run(model: Any) -> Tensor:
    x = torch.randn(1, 11, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    return text_pass(model, x, layout_of(5, [3, 1, 2]))


RUNS = {"text": text_run, "pictures": pictures_pass}


def errors(found: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    assert found.keys() == exact.keys()
    scale = max(g.norm().item() for name, g in exact.items() if name != "output")
    return {name: ((found[name] - g).norm() / max(g.norm().item(), 1e-3 * scale)).item() for name, g in exact.items()}


@NEEDS_INTERPRETER
@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
@pytest.mark.parametrize("reentrant", [None, False, True])
def test_kernels_give_the_same_in_float32(triton: None, run: Callable[[Any], Tensor], reentrant: bool | None) -> None:
    """Without gradient checkpointing, and with either kind."""
    model = build()
    with shared_prefix_layers(model):
        expected = gradients(model, run)
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    with fused(model):
        found = gradients(model, run)
    assert max(errors(found, expected).values()) < 1e-5


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_bfloat16_errs_about_as_the_layers_of_transformers(run: Callable[[Any], Tensor]) -> None:
    """A rounding more: the residual stream's."""
    model = build()
    with shared_prefix_layers(model):
        exact = gradients(model, run)
        theirs = errors(gradients(model, run, autocast=True), exact)
    with fused(model), half_weights(model, trained=True):
        found = gradients(model, run, autocast=True)
    assert all(gradient.dtype == torch.float32 for gradient in found.values())
    for name, error in errors(found, exact).items():
        assert error <= 1.5 * theirs[name] + 2**-8, name


def test_half_weights_add_up_what_autocast_adds_up() -> None:
    model = build()
    with shared_prefix_layers(model):
        once = gradients(model, text_run, autocast=True)
        model.zero_grad()
        with half_weights(model, trained=True):
            for _ in range(3):
                with torch.autocast("cpu", torch.bfloat16):
                    out = text_run(model).float()
                (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    for name, parameter in model.named_parameters():
        if name in once:
            assert parameter.grad is not None
            torch.testing.assert_close(parameter.grad, 3 * once[name], rtol=1e-6, atol=1e-7)
    assert not any("forward" in vars(module) for module in model.modules())


def test_half_weights_leave_gradients_alone_that_something_waits_for() -> None:
    model, seen = build(), []
    layers = model.model.language_model.layers
    layers[0].mlp.up_proj.weight.register_post_accumulate_grad_hook(lambda p: seen.append(p))
    layers[1].mlp.up_proj.requires_grad_(False)
    with half_weights(model, trained=True):
        assert "forward" not in vars(layers[0].mlp.up_proj)
        assert "forward" in vars(layers[0].mlp.down_proj)
    with half_weights(model, trained=False):
        assert "forward" not in vars(layers[0].mlp.down_proj)
        assert "forward" in vars(layers[1].mlp.up_proj)
    with shared_prefix_layers(model), half_weights(model, trained=True):
        gradients(model, text_run, autocast=True)
    assert seen == [layers[0].mlp.up_proj.weight]


def test_all_is_as_it_was_afterwards_and_hooks_run() -> None:
    model, calls = build(), []
    kinds = {name: type(module) for name, module in model.named_modules()}
    model.model.language_model.layers[0].input_layernorm.register_forward_hook(lambda *_: calls.append("norm"))
    model.model.language_model.layers[0].register_forward_hook(lambda *_: calls.append("layer"))
    with contextlib.suppress(KeyboardInterrupt), fused(model), fused(model):
        text_run(model)
        raise KeyboardInterrupt
    assert calls == ["norm", "layer"]
    assert {name: type(module) for name, module in model.named_modules()} == kinds
    assert not any("forward" in vars(module) for module in model.modules())


def test_norms_of_another_formula_are_left_alone() -> None:
    sizes = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    model = Cohere2ForCausalLM(Cohere2Config(**sizes, **heads, pad_token_id=0)).eval()
    ids = torch.arange(6)[None]
    expected = model(ids).logits
    with fused_modules(model):
        assert torch.equal(model(ids).logits, expected)
        assert not any("forward" in vars(module) for module in model.modules())


def test_norms_that_multiply_by_one_plus_their_weight() -> None:
    """In bfloat16, where 1 + weight has to be float32."""
    norm = Gemma2RMSNorm(64).bfloat16()
    torch.nn.init.normal_(norm.weight, std=0.01)
    x = torch.randn(5, 64, dtype=torch.bfloat16)
    expected = norm(x)
    with fused_modules(norm):
        torch.testing.assert_close(norm(x), expected, rtol=2**-8, atol=0)


def is_left_out(name: str) -> bool:
    """What no fusion saves: matrix products, attention itself, and the sums of weights' gradients over micro-batches,
    which the measured figures do not hold either."""
    return name in ("aten::mm", "aten::addmm", "aten::add_") or name.startswith("aten::_flash_attention")


def counted(tokens: int, run: Callable[[], Tensor]) -> Iterator[tuple[float, int]]:
    """Kilobytes for each token, and kernels, of a forward and then of a backward pass."""
    with Traffic(is_left_out) as traffic, torch.autocast("cpu", torch.bfloat16):
        out = run()
    yield sum(traffic.bytes.values()) / tokens / 1e3, sum(traffic.kernels.values())
    gradient = torch.empty_like(out)
    with Traffic(is_left_out) as traffic:
        out.backward(gradient)
    yield sum(traffic.bytes.values()) / tokens / 1e3, sum(traffic.kernels.values())


@NEEDS_INTERPRETER
def test_a_text_layer_and_a_vision_block_move_a_third(triton: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of Qwen2-VL-2B's size, on fake tensors, with the attention of a GPU; weights were cast in an earlier pass."""
    for place in ("fastgrpo.update.shared_prefix", "fastgrpo.model.attention"):
        monkeypatch.setattr(f"{place}.pick_attention", lambda q, forced: named_backend("varlen"))
    with FakeTensorMode():
        model = build(hidden=1536, intermediate=8960, vision=1280, heads=(12, 2))
        text, block = model.model.language_model, model.model.visual.blocks[0]
        angle, picture_angle = torch.empty(1, TOKENS, 128), torch.empty(PATCHES, 80)
        pictures = picture_segments([PATCHES // 2] * 2)
        layout = layout_of(PROMPT, [COMPLETION] * GROUP)

        def layer() -> Tensor:
            x = torch.empty(1, TOKENS, 1536, dtype=torch.bfloat16, requires_grad=True)
            return text.layers[0](x, position_embeddings=(angle, angle), shared_prefix=SharedPrefix(layout))

        def vision() -> Tensor:
            x = torch.empty(PATCHES, 1280, dtype=torch.bfloat16, requires_grad=True)
            angles = (picture_angle, picture_angle)
            return block(x, cu_seqlens=pictures.cu_q, position_embeddings=angles, segments=(pictures,))

        with fused(model), half_weights(model, trained=True):
            for run, tokens, limits in (
                (layer, TOKENS, (TEXT_FORWARD, TEXT_BACKWARD)),
                (vision, PATCHES, (VISION_FORWARD, VISION_BACKWARD)),
            ):
                list(counted(tokens, run))
                for found, before in zip(counted(tokens, run), limits, strict=True):
                    assert found[0] <= before[0] / 3
                    assert found[1] <= before[1] / 3


def test_pictures_are_seen_without_a_read_from_the_device() -> None:
    """On the meta device, from which nothing can be read."""
    with torch.device("meta"):
        model = build()
    tower, grids = model.model.visual, torch.tensor([[1, 4, 6], [1, 2, 4]])
    pixels = torch.empty(32, 3 * 2 * 4 * 4, device="meta")
    with fused_vision(tower):
        seen = tower(pixels, grid_thw=grids).pooler_output
    seen.sum().backward()
    assert seen.shape == (8, 32)
    with pytest.raises(RuntimeError, match="meta"):
        tower(pixels, grid_thw=grids.to("meta"))
