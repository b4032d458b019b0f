"""Tiny random models of the three families, prompts for them, and what transformers makes of both."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import (
    GenerationConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from fastgrpo.data.prompts import PromptBuilder
from fastgrpo.data.rows import Row
from fastgrpo.model.load import Processing, load_policy, load_processing
from fastgrpo.sampler.engine import SamplerEngine, SamplerOptions
from fastgrpo.types import Completion, Prompt

TIE = 1e-4
"""Two paths may part where the best two logits are closer than this."""


@dataclass
class Family:
    """A model with the tokenizer and image processor of the tests."""

    model: Any
    processing: Processing
    prompts: dict[str, Prompt]
    suppressed: list[int] = field(default_factory=list)

    def engine(self, *, stops: bool = True, **options: Any) -> SamplerEngine:
        """A sampler of small pages; without `stops` there is no end token."""
        engine = SamplerEngine(self.model, self.processing.tokenizer, options=SamplerOptions(**options))
        if not stops:
            engine.eos_ids = []
        engine.sync()
        return engine

    def inputs(self, prompt: Prompt, token_ids: Tensor | None = None) -> dict[str, Tensor]:
        """What a plain user of transformers passes for a prompt (and a completion): one row, no positions."""
        ids = prompt.input_ids if token_ids is None else torch.cat([prompt.input_ids, token_ids])
        inputs = {"input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None]}
        if prompt.pixel_values is not None:
            inputs["pixel_values"], inputs["image_grid_thw"] = prompt.pixel_values, prompt.image_grid_thw
            inputs["mm_token_type_ids"] = (ids == self.model.config.image_token_id).int()[None]
        return inputs

    @torch.no_grad()
    def logits(self, prompt: Prompt, token_ids: Tensor) -> Tensor:
        """[C, V] float64: what predicts each completion token in one whole forward pass."""
        logits = self.model(**self.inputs(prompt, token_ids), use_cache=False).logits[0]
        return logits[len(prompt.input_ids) - 1 : -1].double()

    @torch.no_grad()
    def greedy(self, prompt: Prompt, tokens: int) -> Tensor:
        """[tokens] by HF generate, image tokens suppressed, no end token."""
        config = GenerationConfig(
            do_sample=False, max_new_tokens=tokens, suppress_tokens=self.suppressed or None, pad_token_id=0
        )
        return self.model.generate(**self.inputs(prompt), generation_config=config)[0, len(prompt.input_ids) :]

    def assert_same_until_tie(self, prompt: Prompt, ours: Tensor, theirs: Tensor) -> None:
        """Token for token equal, or parted where two logits tie."""
        assert len(ours) == len(theirs)
        parted = (ours != theirs).nonzero()
        if len(parted):
            place = int(parted[0])
            scores = self.logits(prompt, theirs[: place + 1])[-1]
            scores[self.suppressed] = -torch.inf
            best = scores.topk(2).values
            assert best[0] - best[1] < TIE, f"token {place}: {ours[place]} and not {theirs[place]}"

    def assert_logprobs(self, prompt: Prompt, completion: Completion, temperature: float = 1.0) -> None:
        """Within 1e-4 of a full forward pass, without and with the suppression."""
        scores = self.logits(prompt, completion.token_ids) / temperature
        chosen = completion.token_ids[:, None]
        plain = scores.log_softmax(-1).gather(1, chosen).squeeze(1)
        torch.testing.assert_close(completion.logprobs.double(), plain, atol=1e-4, rtol=0)
        scores[:, self.suppressed] = -torch.inf
        drawn = scores.log_softmax(-1).gather(1, chosen).squeeze(1)
        torch.testing.assert_close(completion.sampling_logprobs.double(), drawn, atol=1e-4, rtol=0)


def exact(family: Family) -> Family:
    """The same in float64, in which two ways to compute the same never part at a tie."""
    return replace(family, model=copy.deepcopy(family.model).double())


def sharpened(model: Any) -> Any:
    """Larger weights: a fresh model's distributions are nearly uniform and forget the context."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.mul_(3 if "embed_tokens" in name else 6)
            elif name.endswith("bias"):
                parameter.normal_(std=0.3)
    model.generation_config.eos_token_id = None
    return model.eval()


def picture(width: int, height: int, colour: str) -> Image.Image:
    image = Image.new("RGB", (width, height), colour)
    image.paste("white", (0, 0, width // 2, height // 3))
    return image


ROWS = {
    "one image": Row(3, [picture(112, 84, "red")], "How many cubes are there?"),
    "two images": Row(
        5, [picture(84, 140, "blue"), picture(56, 56, "green")], "Which picture is darker, and why is it?"
    ),
    "no image": Row(8, [], "Is two more than one?"),
}


@pytest.fixture(scope="session")
def processing(tiny_model_dir: Path) -> Processing:
    return load_processing(str(tiny_model_dir))


def _vision_family(model: Any, processing: Processing) -> Family:
    builder = PromptBuilder(processing.tokenizer, processing.image_processor)
    prompts = {name: builder.build(row) for name, row in ROWS.items()}
    return Family(sharpened(model), processing, prompts, [model.config.image_token_id, model.config.video_token_id])


def make_qwen2_vl(model_dir: Path, processing: Processing) -> Family:
    torch.manual_seed(1)
    return _vision_family(load_policy(str(model_dir)), processing)


def make_qwen2_5_vl(model_dir: Path, processing: Processing) -> Family:
    """Like the tiny Qwen2-VL, with Qwen2.5-VL's windowed vision tower and a head of its own."""
    theirs = load_policy(str(model_dir)).config
    config = Qwen2_5_VLConfig(
        text_config={**theirs.text_config.to_dict(), "model_type": "qwen2_5_vl_text", "num_attention_heads": 4},
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "out_hidden_size": theirs.text_config.hidden_size,
            "fullatt_block_indexes": [1],
            "window_size": 56,
        },
        image_token_id=theirs.image_token_id,
        video_token_id=theirs.video_token_id,
        vision_start_token_id=theirs.vision_start_token_id,
        vision_end_token_id=theirs.vision_end_token_id,
        tie_word_embeddings=False,
    )
    config.text_config.rope_parameters["mrope_section"] = [2, 3, 3]
    torch.manual_seed(2)
    return _vision_family(Qwen2_5_VLForConditionalGeneration(config), processing)


def make_qwen2(model_dir: Path, processing: Processing) -> Family:
    config = Qwen2Config(
        vocab_size=len(processing.tokenizer),
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(3)
    model = sharpened(Qwen2ForCausalLM(config))
    prompts = {}
    for row_id, length in enumerate((1, 5, 16, 33)):
        ids = torch.randint(1, config.vocab_size, (length,))
        prompts[f"{length} tokens"] = Prompt(row_id, ids, torch.arange(length).expand(3, -1), None, None, "")
    return Family(model, processing, prompts)


MAKERS: dict[str, Callable[[Path, Processing], Family]] = {
    "qwen2": make_qwen2,
    "qwen2_vl": make_qwen2_vl,
    "qwen2_5_vl": make_qwen2_5_vl,
}


@pytest.fixture(scope="session", params=list(MAKERS))
def family(request: pytest.FixtureRequest, tiny_model_dir: Path, processing: Processing) -> Family:
    """Each of the three families in turn; never trained on."""
    return MAKERS[request.param](tiny_model_dir, processing)


@pytest.fixture(scope="session")
def qwen2(tiny_model_dir: Path, processing: Processing) -> Family:
    return make_qwen2(tiny_model_dir, processing)


@pytest.fixture(scope="session")
def qwen2_vl(tiny_model_dir: Path, processing: Processing) -> Family:
    return make_qwen2_vl(tiny_model_dir, processing)


@pytest.fixture(scope="session")
def qwen2_5_vl(tiny_model_dir: Path, processing: Processing) -> Family:
    return make_qwen2_5_vl(tiny_model_dir, processing)


@pytest.fixture(scope="session")
def qwen2_exact(qwen2: Family) -> Family:
    return exact(qwen2)


@pytest.fixture(scope="session")
def qwen2_vl_exact(qwen2_vl: Family) -> Family:
    return exact(qwen2_vl)
