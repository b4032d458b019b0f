"""Model families, one record each, and access to the parts of any model."""

from dataclasses import dataclass, replace
from typing import Any

from fastgrpo.model.picture_styles import BestResolution, Grids, SplitTiles, Tiles


@dataclass(frozen=True)
class Family:
    """What differs between families of models. A family not in `FAMILIES` trains on text only."""

    name: str
    model_types: tuple[str, ...]
    """`config.model_type` of its models."""
    image_token: str | None = None
    """Placeholder in a prompt's text; None: pictures are not supported."""
    image_markers: tuple[str, str] = ("", "")
    """Text before and after a picture's placeholders."""
    template_token: str | None = None
    """What the chat template writes for a picture; None: markers and placeholder."""
    style: Grids = Grids()
    """How pictures are cut and handed to the model."""
    whole_pictures: bool = False
    """Whether the tokens of a picture attend to all of it, not only to those before them."""
    mrope_sections: tuple[int, int, int] | None = None
    """transformers' default if `rope_parameters` has no `mrope_section`; None for 1-D positions."""
    has_packed_decoder: bool = False
    """Whether the sampler's own decoder supports its text layers."""

    @property
    def image_place(self) -> str:
        """A picture in a prompt's text, its placeholder not yet repeated; "" if pictures are not supported."""
        return "" if self.image_token is None else self.image_token.join(self.image_markers)

    @property
    def picture_tokens(self) -> tuple[str, ...]:
        """Tokens that only pictures bring into a prompt."""
        markers = (marker.strip() for marker in self.image_markers)
        return tuple(token for token in (self.image_token, *markers, *self.style.tokens) if token)


QWEN2 = Family("Qwen2", ("qwen2",), has_packed_decoder=True)
QWEN2_VL = Family(
    "Qwen2-VL",
    ("qwen2_vl",),
    image_token="<|image_pad|>",
    image_markers=("<|vision_start|>", "<|vision_end|>"),
    mrope_sections=(16, 24, 24),
    has_packed_decoder=True,
)
QWEN2_5_VL = replace(QWEN2_VL, name="Qwen2.5-VL", model_types=("qwen2_5_vl",))
QWEN3_VL = replace(
    QWEN2_VL,
    name="Qwen3-VL",
    model_types=("qwen3_vl", "qwen3_vl_moe"),
    mrope_sections=(24, 20, 20),
    has_packed_decoder=False,
)
QWEN3_5 = replace(QWEN3_VL, name="Qwen3.5", model_types=("qwen3_5", "qwen3_5_moe"), mrope_sections=(11, 11, 10))
GLM_4V = replace(
    QWEN3_VL,
    name="GLM-4V",
    model_types=("glm4v", "glm4v_moe", "glm46v"),
    image_token="<|image|>",
    image_markers=("<|begin_of_image|>", "<|end_of_image|>"),
    mrope_sections=(8, 12, 12),
)
LLAVA = Family("LLaVA", ("llava",), image_token="<image>", style=Tiles())
LLAVA_NEXT = replace(LLAVA, name="LLaVA-NeXT", model_types=("llava_next",), style=BestResolution())
LLAVA_ONEVISION = replace(
    LLAVA,
    name="LLaVA-OneVision",
    model_types=("llava_onevision",),
    style=BestResolution(whole_among_others=True),
)
INTERNVL = Family(
    "InternVL",
    ("internvl",),
    image_token="<IMG_CONTEXT>",
    image_markers=("<img>", "</img>"),
    template_token="<IMG_CONTEXT>",
    style=Tiles(options={"crop_to_patches": True}),
)
GEMMA_3 = Family(
    "Gemma 3",
    ("gemma3",),
    image_token="<image_soft_token>",
    image_markers=("\n\n<start_of_image>", "<end_of_image>\n\n"),
    template_token="<start_of_image>",
    style=Tiles(length="mm_tokens_per_image", options={"do_pan_and_scan": False}),
    whole_pictures=True,
)
SMOLVLM = Family("SmolVLM", ("smolvlm", "idefics3"), image_token="<image>", style=SplitTiles())

FAMILIES = (
    QWEN2, QWEN2_VL, QWEN2_5_VL, QWEN3_VL, QWEN3_5, GLM_4V,
    LLAVA, LLAVA_NEXT, LLAVA_ONEVISION, INTERNVL, GEMMA_3, SMOLVLM,
)  # fmt: skip

VISION_TOWERS = ("visual", "vision_tower", "vision_model")
"""Attribute names of vision towers."""

PROJECTORS = ("merger", "projector", "connector", "image_newline")
"""Parts of the names of what maps a tower's output into the language model."""

PICTURE_TOKENS = ("image_token_id", "image_token_index", "video_token_id")
"""Config names of placeholder ids."""


def family_of(config: Any) -> Family:
    """The family of a model with this transformers config; if unknown, a text-only one named by its type."""
    kind = config.model_type
    family = next((family for family in FAMILIES if kind in family.model_types), Family(kind, (kind,)))
    return replace(family, style=family.style.of(config))


def unwrap(model: Any) -> Any:
    """The transformers (or peft) model inside DDP or DeepSpeed."""
    while hasattr(model, "module"):
        model = model.module
    return model


def base_model(model: Any) -> Any:
    """The transformers model inside DDP, DeepSpeed or peft wrappers."""
    model = unwrap(model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def learns_prompt(model: Any) -> bool:
    """Whether a peft model learns vectors in front of every input: prefix or prompt tuning."""
    return bool(getattr(getattr(unwrap(model), "active_peft_config", None), "is_prompt_learning", False))


def text_model(model: Any) -> Any:
    """The module with `embed_tokens`, `layers` and `norm`."""
    inner = base_model(model).base_model
    return getattr(inner, "language_model", getattr(inner, "text_model", inner))


def is_multimodal(model: Any) -> bool:
    """Whether a model takes pictures."""
    return hasattr(base_model(model).config, "vision_config")


def mrope_sections(model: Any) -> tuple[int, ...] | None:
    """How many frequencies rotate by time, height and width; None for a model with 1-D positions."""
    config = base_model(model).config
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    return tuple(rope.get("mrope_section") or ()) or family_of(config).mrope_sections


def end_ids(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end a completion: the model's and the tokenizer's."""
    eos = model.generation_config.eos_token_id
    return sorted({*([eos] if isinstance(eos, int) else eos or []), tokenizer.eos_token_id} - {None})


def placeholder_ids(model: Any) -> list[int]:
    """Placeholder tokens of pictures and videos. They must not be sampled: without features, they break the next
    forward pass."""
    config = base_model(model).config
    ids = (getattr(config, name, None) for name in PICTURE_TOKENS)
    return sorted({token for token in ids if isinstance(token, int)})


def patch_sizes(model: Any) -> tuple[int, int]:
    """(patches merged per side, values in a patch) of a Qwen-like vision tower.

    Raises:
        ValueError: a vision tower of another kind.
    """
    vision = base_model(model).config.vision_config
    try:
        return vision.spatial_merge_size, vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    except AttributeError as error:
        raise ValueError(f"{type(base_model(model)).__name__} has no vision tower like Qwen2-VL's: {error}") from error
