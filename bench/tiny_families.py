"""Tiny random models of many families, made offline from transformers' config classes, and prompts for them."""

from collections.abc import Callable
from typing import Any

import torch
import transformers
from PIL import Image

from fastgrpo.data.prompts import mrope_position_ids
from fastgrpo.model.families import family_of, patch_sizes
from fastgrpo.model.picture_styles import Tiles
from fastgrpo.types import Prompt

VOCABULARY = 97
TEXT = {
    "vocab_size": VOCABULARY, "hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": 3,
    "num_attention_heads": 6, "num_key_value_heads": 2, "bos_token_id": None, "eos_token_id": None,
    "pad_token_id": None,
}  # fmt: skip
HEADS = {"head_dim": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
DELTA = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"], "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
WINDOWED = ["sliding_attention", "full_attention", "sliding_attention"]

TEXT_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen2": ("Qwen2", {}),
    "Qwen3": ("Qwen3", HEADS),
    "Qwen3-MoE": ("Qwen3Moe", HEADS | EXPERTS),
    "Llama": ("Llama", {}),
    "Mistral without window": ("Mistral", {"sliding_window": None}),
    "Mistral": ("Mistral", {"sliding_window": 7}),
    "Gemma 2": (
        "Gemma2",
        HEADS
        | {"sliding_window": 7, "layer_types": WINDOWED, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 4.0}
        | {"attn_implementation": "eager"},  # transformers' other ones leave the cap out
    ),
    "Gemma 3": ("Gemma3Text", HEADS | {"sliding_window": 7, "layer_types": WINDOWED}),
    "Qwen2 with window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 7, "layer_types": WINDOWED}),
    "Command R7B": ("Cohere2", HEADS | {"sliding_window": 7, "logit_scale": 0.5, "layer_types": WINDOWED}),
    "Qwen3-Next": ("Qwen3Next", HEADS | EXPERTS | DELTA | {"shared_expert_intermediate_size": 24}),
    "Phi-3": ("Phi3", {}),
    "Gemma": ("Gemma", HEADS),
    "Granite": ("Granite", {"logits_scaling": 4.0}),
    "OLMo 2": ("Olmo2", {}),
    "SmolLM3": ("SmolLM3", {}),
    "GLM-4": ("Glm4", HEADS | {"partial_rotary_factor": 0.5}),
}
"""Name → transformers' prefix of the classes, and what its config has beside `TEXT`."""


IMAGE, VIDEO, START, END = 90, 91, 92, 93
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
TOWER = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 48}
CLIP = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 7,
}  # fmt: skip
SIGLIP = CLIP | {"model_type": "siglip_vision_model", "vision_use_head": False}
VISION_FAMILIES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "Qwen2-VL": ("Qwen2VL", MROPE, {"depth": 2, "embed_dim": 32, "hidden_size": 48, "num_heads": 2, "mlp_ratio": 2}),
    "Qwen2.5-VL": ("Qwen2_5_VL", MROPE, TOWER | {"fullatt_block_indexes": [1], "window_size": 56}),
    "Qwen3-VL": ("Qwen3VL", MROPE | HEADS, TOWER | {"deepstack_visual_indexes": [0]}),
    "Qwen3-VL-MoE": (
        "Qwen3VLMoe",
        MROPE | HEADS | EXPERTS | {"decoder_sparse_step": 1},
        TOWER | {"deepstack_visual_indexes": [0]},
    ),
    "Qwen3.5": ("Qwen3_5", MROPE | HEADS | DELTA | {"partial_rotary_factor": 1.0}, TOWER),
    "GLM-4V": (
        "Glm4v",
        {"rope_parameters": MROPE["rope_parameters"] | {"partial_rotary_factor": 1.0}},
        TOWER | {"image_size": 28, "patch_size": 14},
    ),
    "GLM-4.6V": (
        "Glm46V",
        {"rope_parameters": MROPE["rope_parameters"] | {"partial_rotary_factor": 1.0}},
        TOWER | {"image_size": 28, "patch_size": 14},
    ),
    "LLaVA": ("Llava", {"model_type": "llama"}, CLIP | {"model_type": "clip_vision_model"}),
    "LLaVA-NeXT": ("LlavaNext", {"model_type": "llama"}, CLIP | {"model_type": "clip_vision_model"}),
    "LLaVA-OneVision": ("LlavaOnevision", {"model_type": "qwen2"}, SIGLIP),
    "InternVL": ("InternVL", {"model_type": "qwen2"}, CLIP | {"image_size": [28, 28], "patch_size": [7, 7]}),
    "Gemma 3 with pictures": ("Gemma3", HEADS | {"sliding_window": 7, "layer_types": WINDOWED}, SIGLIP),
    "SmolVLM": ("SmolVLM", {"model_type": "llama"}, CLIP),
    "Idefics3": ("Idefics3", {"model_type": "llama"}, CLIP),
}
"""Name → transformers' prefix of the classes, and what its text and vision configs have."""

RESOLUTIONS = {"image_grid_pinpoints": [[28, 56], [56, 28], [56, 56]]}
OWN: dict[str, dict[str, Any]] = {
    "LLaVA": {"image_seq_length": 16},
    "LLaVA-NeXT": RESOLUTIONS,
    "LLaVA-OneVision": RESOLUTIONS | {"vision_aspect_ratio": "anyres_max_1"},  # what has more tiles is shrunk
    "InternVL": {"image_seq_length": 4},
    "Gemma 3 with pictures": {"mm_tokens_per_image": 4, "boi_token_index": START, "eoi_token_index": END},
}
"""What the whole config of a family has besides."""

SIDE = {"height": 28, "width": 28}
SPLIT = {"size": {"longest_edge": 56}, "max_image_size": {"longest_edge": 28}}
PROCESSORS: dict[str, tuple[str, dict[str, Any]]] = {
    "LLaVA": ("CLIP", {"size": {"shortest_edge": 28}, "crop_size": SIDE}),
    "LLaVA-NeXT": ("LlavaNext", {"size": {"shortest_edge": 28}, "crop_size": SIDE} | RESOLUTIONS),
    "LLaVA-OneVision": ("LlavaOnevision", {"size": SIDE} | RESOLUTIONS),
    "InternVL": ("GotOcr2", {"size": SIDE, "max_patches": 6}),
    "Gemma 3 with pictures": ("Gemma3", {"size": SIDE}),
    "SmolVLM": ("SmolVLM", SPLIT),
    "Idefics3": ("Idefics3", SPLIT),
}
"""Name → transformers' prefix of the image processor's class, and its settings; of families with tiles."""


def image_processor(name: str) -> Any:
    """Of a family with tiles."""
    prefix, settings = PROCESSORS[name]
    return getattr(transformers, f"{prefix}ImageProcessorPil")(**settings)


def tiny_config(name: str) -> Any:
    """Of a vision-language model of that name."""
    prefix, text, vision = VISION_FAMILIES[name]
    return getattr(transformers, f"{prefix}Config")(
        text_config=TEXT | text,
        vision_config=vision,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
        **OWN.get(name, {}),
    )


def vision_model(name: str) -> Any:
    """A vision-language model of that name, float32, without end token."""
    kind = getattr(transformers, f"{VISION_FAMILIES[name][0]}ForConditionalGeneration")
    return sharpened(lambda: kind(tiny_config(name)))


def vision_prompts(name: str, model: Any) -> list[Prompt]:
    """One picture, none, and two pictures."""
    if isinstance(style := family_of(model.config).style, Tiles):
        return tile_prompts(style, image_processor(name))
    draw = torch.Generator().manual_seed(0)
    merge, width = patch_sizes(model)
    prompts = []
    for row, sizes in enumerate([[(2, 3)], [], [(1, 2), (3, 2)]]):
        ids, grids = torch.randint(3, 80, (5,), generator=draw), []
        for height, columns in sizes:
            places = torch.tensor([START, *[IMAGE] * height * columns, END])
            ids = torch.cat([ids, places, torch.randint(3, 80, (4,), generator=draw)])
            grids.append([1, height * merge, columns * merge])
        grid = torch.tensor(grids) if grids else None
        patches = 0 if grid is None else int(grid.prod(1).sum())
        pixels = torch.randn(patches, width, generator=draw) if grids else None
        prompts.append(Prompt(row, ids, mrope_position_ids(ids, grid, IMAGE, merge), pixels, grid, ""))
    return prompts


def tile_prompts(style: Tiles, processor: Any) -> list[Prompt]:
    """The same for a family that cuts pictures into tiles."""
    draw, prompts = torch.Generator().manual_seed(0), []
    for row, sizes in enumerate([[(40, 60)], [], [(28, 28), (70, 40)]]):
        ids, grid, pixels = torch.randint(3, 80, (5,), generator=draw), None, None
        if sizes:
            noise = [torch.randint(256, (*size, 3), dtype=torch.uint8, generator=draw) for size in sizes]
            pixels, grid = style.process(processor, [Image.fromarray(picture.numpy()) for picture in noise])
            for count in style.places(grid, 1):
                own = torch.tensor([START, *[IMAGE] * count, END])
                ids = torch.cat([ids, own, torch.randint(3, 80, (4,), generator=draw)])
        prompts.append(Prompt(row, ids, torch.arange(len(ids)).expand(3, -1), pixels, grid, ""))
    return prompts


FAMILIES = (*TEXT_FAMILIES, *VISION_FAMILIES)


def family(name: str) -> tuple[Any, list[Prompt]]:
    """A model of that name and prompts for it."""
    if name in TEXT_FAMILIES:
        return text_model(name), text_prompts(1, 9, 22)
    model = vision_model(name)
    return model, vision_prompts(name, model)


def text_model(name: str) -> Any:
    """A causal language model of that name, float32, without end token."""
    prefix, changes = TEXT_FAMILIES[name]
    config = getattr(transformers, f"{prefix}Config")(**(TEXT | changes))
    kind = getattr(transformers, f"{prefix.removesuffix('Text')}ForCausalLM")
    return sharpened(lambda: kind(config))


def sharpened(make: Callable[[], Any]) -> Any:
    """A model with larger weights: a fresh one's distributions are nearly uniform and forget the context."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make().eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if not parameter.any() and parameter.ndim > 1:  # Gemma 3's projector, through which nothing would pass
                    parameter.normal_(std=0.2)
                elif parameter.ndim > 1:
                    parameter.mul_(3 if "embed" in name else 5)
                elif name.endswith("bias"):
                    parameter.normal_(std=0.3)
                else:  # norms, some of which multiply by 1 + weight
                    parameter.add_(0.1 * torch.randn_like(parameter))
    model.generation_config.eos_token_id = None
    return model


def text_prompts(*lengths: int) -> list[Prompt]:
    """Prompts of random tokens."""
    draw = torch.Generator().manual_seed(0)
    return [
        Prompt(i, torch.randint(3, VOCABULARY, (n,), generator=draw), torch.arange(n).expand(3, -1), None, None, "")
        for i, n in enumerate(lengths)
    ]
