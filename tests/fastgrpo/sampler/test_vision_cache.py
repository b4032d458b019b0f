"""A frozen vision tower sees a picture once; what is built on it is what it was without a cache."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from family_parity import NoText, training_groups
from fastgrpo_kernels import LossParams
from peft import LoraConfig, get_peft_model
from tiny_families import family
from torch import Tensor

from fastgrpo.config import GRPOConfig
from fastgrpo.data.loading import load_rows
from fastgrpo.data.prompts import image_digests
from fastgrpo.model.families import family_of
from fastgrpo.model.freezing import freeze as freeze_parts
from fastgrpo.model.load import load_policy
from fastgrpo.model.vision import image_features, new_vision_cache, vision_tower
from fastgrpo.model.vision_cache import VisionCache
from fastgrpo.sampler.engine import SamplerEngine
from fastgrpo.training.trainer import GRPOTrainer
from fastgrpo.types import Completion, Prompt, SamplingParams, TrainingGroup
from fastgrpo.update.updater import PackedUpdater

PLENTY = 1 << 30


@pytest.fixture(params=["qwen2_vl", "qwen2_5_vl"])
def pictured(request: pytest.FixtureRequest) -> Any:
    """A family with pictures and its frozen tower; a copy that may be trained."""
    family = request.getfixturevalue(request.param)
    family = replace(family, model=copy.deepcopy(family.model))
    freeze(family.model)
    return family


def freeze(model: Any) -> None:
    for name, parameter in vision_tower(model).named_parameters():
        parameter.requires_grad_(name.startswith("merger"))


class Seen:
    """Counts the patches that go through towers' blocks."""

    def __init__(self, *towers: Any) -> None:
        self.patches = 0
        self.hooks = [tower.blocks[0].register_forward_pre_hook(self._note) for tower in towers]

    def _note(self, _: Any, inputs: tuple[Tensor, ...]) -> None:
        self.patches += len(inputs[0])


def patches(prompts: list[Prompt]) -> int:
    return sum(0 if prompt.pixel_values is None else len(prompt.pixel_values) for prompt in prompts)


def gradients(model: Any) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def groups_of(prompts: list[Prompt]) -> list[TrainingGroup]:
    draw = torch.Generator().manual_seed(0)
    groups = []
    for prompt in prompts:
        drawn = [torch.randint(10, 200, (n,), generator=draw) for n in (5, 3)]
        completions = tuple(
            Completion(prompt.row_id, i, ids, "", "stop", torch.zeros(len(ids)), torch.zeros(len(ids)))
            for i, ids in enumerate(drawn)
        )
        weights = tuple(torch.full((len(ids),), 0.1) for ids in drawn)
        masks = tuple(torch.ones(len(ids), dtype=torch.bool) for ids in drawn)
        groups.append(TrainingGroup(prompt, completions, torch.tensor([1.0, -0.7]), weights, masks))
    return groups


def test_features_and_the_mergers_gradient_are_those_without_a_cache(pictured: Any) -> None:
    tower, prompts = vision_tower(pictured.model), list(pictured.prompts.values())
    cache = VisionCache(tower, PLENTY)

    def features(given: list[Prompt], cache: VisionCache | None) -> tuple[list[Tensor], dict[str, Tensor]]:
        found = [f for f in image_features(tower, given, cache) if f is not None]
        torch.cat(found).square().sum().backward()
        return [f.detach() for f in found], gradients(tower)

    plain, plain_gradients = features(prompts, None)
    assert {name.split(".")[0] for name in plain_gradients} == {"merger"}
    features(prompts[:1], cache)
    seen = Seen(tower)
    for _ in range(2):  # half of it kept, then all
        kept, kept_gradients = features(prompts, cache)
        torch.testing.assert_close(kept, plain, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(kept_gradients, plain_gradients, atol=1e-5, rtol=1e-5)
    pictures = sum(len(prompt.image_digests) for prompt in prompts)
    assert (cache.misses, cache.hits) == (pictures, 2 * pictures - cache.misses + 1)
    assert seen.patches == patches(prompts[1:])


def test_an_update_is_what_it_is_without_a_cache(pictured: Any) -> None:
    """Loss and gradients, with a frozen reference that takes what the policy's tower saw, or the reverse."""
    model, groups = pictured.model, groups_of(list(pictured.prompts.values()))
    reference = copy.deepcopy(model).requires_grad_(False)
    with torch.no_grad():
        for side in (reference.model.language_model, reference.model.visual.merger):
            for parameter in side.parameters():
                parameter.mul_(1.05)
    cache = VisionCache(vision_tower(model), PLENTY)
    options = {"token_budget": 10**6, "reference_model": reference}
    plain = PackedUpdater(model, LossParams(beta=0.04), **options)
    expected, expected_gradients = plain.accumulate(groups), gradients(model)
    seen = Seen(vision_tower(model), vision_tower(reference))
    kept = PackedUpdater(model, LossParams(beta=0.04), vision_cache=cache, **options)
    for _ in range(2):
        result = kept.accumulate(groups)
        torch.testing.assert_close(result.loss, expected.loss, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(result.metrics.kl_sum, expected.metrics.kl_sum, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(gradients(model), expected_gradients, atol=1e-6, rtol=1e-5)
    assert seen.patches == patches([group.prompt for group in groups])


@pytest.mark.parametrize(
    "name",
    [
        *("Qwen3-VL", "GLM-4V", "LLaVA-NeXT", "SmolVLM"),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("Qwen3.5", "LLaVA", "LLaVA-OneVision")),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("InternVL", "Gemma 3 with pictures", "Idefics3")),
    ],
)
def test_whatever_a_familys_tower_gives_is_kept(name: str) -> None:
    """Update and rollout are bit for bit those without a cache; a tower that trains sees for itself."""
    model, prompts = family(name)
    style = family_of(model.config).style
    prompts = [replace(p, image_digests=image_digests(p.pixel_values, p.image_grid_thw, style)) for p in prompts]
    freeze_parts(model, freeze_vision=True, freeze_llm=False)
    cache, groups, options = new_vision_cache(model, PLENTY), training_groups(prompts), {"token_budget": 10**6}
    assert cache is not None
    plain, kept = (PackedUpdater(model, LossParams(), vision_cache=c, **options) for c in (None, cache))
    expected, expected_gradients = plain.accumulate(groups), gradients(model)
    for _ in range(2):
        assert torch.equal(kept.accumulate(groups).loss, expected.loss)
        for parameter, gradient in gradients(model).items():
            assert torch.equal(gradient, expected_gradients[parameter]), parameter
    params = SamplingParams(6, seed=5)
    engines = [SamplerEngine(model, NoText(), vision_cache=c) for c in (None, cache)]
    assert drawn(engines[0], prompts, params) == drawn(engines[1], prompts, params)
    assert (cache.misses, cache.hits) == (3, 6)
    model.requires_grad_(True)
    expected, expected_gradients = plain.accumulate(groups), gradients(model)
    assert torch.equal(kept.accumulate(groups).loss, expected.loss)
    assert gradients(model).keys() == expected_gradients.keys()
    assert (cache.misses, cache.hits, cache.room) == (3, 6, 0)


def test_the_sampler_draws_what_it_draws_without_a_cache(pictured: Any) -> None:
    prompts = list(pictured.prompts.values())
    params = SamplingParams(12, temperature=1.1, seed=5)
    cache = VisionCache(vision_tower(pictured.model), PLENTY)
    plain = SamplerEngine(pictured.model, pictured.processing.tokenizer)
    kept = SamplerEngine(pictured.model, pictured.processing.tokenizer, vision_cache=cache)
    expected = drawn(plain, prompts, params)
    seen = Seen(vision_tower(pictured.model))
    assert drawn(kept, prompts, params) == drawn(kept, prompts, params) == expected
    assert seen.patches == patches(prompts)


def drawn(engine: SamplerEngine, prompts: list[Prompt], params: SamplingParams) -> list[list[int]]:
    engine.sync()
    return [c.token_ids.tolist() for _, group in engine.generate(prompts, 2, params, 0) for c in group]


def test_a_tower_that_trains_is_never_kept(qwen2_vl: Any) -> None:
    model, prompts = copy.deepcopy(qwen2_vl.model), [qwen2_vl.prompts["one image"]]
    tower = vision_tower(model)
    cache = VisionCache(tower, PLENTY)
    optimizer = torch.optim.SGD(tower.parameters(), lr=0.01)
    for _ in range(2):
        found = image_features(tower, prompts, cache)[0]
        assert found is not None
        assert torch.equal(found, image_features(tower, prompts)[0])
        found.sum().backward()
        optimizer.step()
    assert (cache.hits, cache.misses, cache.bytes, cache.room) == (0, 0, 0, 0)


def test_loaded_weights_drop_what_was_kept(qwen2_vl: Any) -> None:
    model, prompts = copy.deepcopy(qwen2_vl.model), [qwen2_vl.prompts["one image"]]
    freeze(model)
    tower = vision_tower(model)
    cache = VisionCache(tower, PLENTY)
    image_features(tower, prompts, cache)
    model.load_state_dict({name: 1.1 * value for name, value in model.state_dict().items()})
    torch.testing.assert_close(image_features(tower, prompts, cache), image_features(tower, prompts))
    assert (cache.hits, cache.misses) == (0, 2)


def test_a_reference_with_another_tower_sees_for_itself(qwen2_vl: Any) -> None:
    model, prompts = copy.deepcopy(qwen2_vl.model), [qwen2_vl.prompts["one image"]]
    freeze(model)
    other = copy.deepcopy(vision_tower(model))
    cache = VisionCache(vision_tower(model), PLENTY)
    image_features(vision_tower(model), prompts, cache)
    with torch.no_grad():
        image_features(other, prompts, cache)
        assert cache.hits == 1
        other.blocks[0].mlp.fc1.weight.mul_(1.5)
        assert torch.equal(image_features(other, prompts, cache)[0], image_features(other, prompts)[0])
    assert (cache.hits, cache.misses) == (1, 1)


@pytest.mark.parametrize("adapters", [{"target_modules": ["qkv"]}, {"modules_to_save": ["patch_embed"]}])
def test_adapters_in_the_tower_keep_the_cache_out(qwen2_vl: Any, adapters: dict[str, Any]) -> None:
    """Frozen ones too: the reference's pass switches them off."""
    model = copy.deepcopy(qwen2_vl.model).requires_grad_(False)
    config = LoraConfig(**{"target_modules": ["q_proj"], "init_lora_weights": False} | adapters)
    adapted = get_peft_model(model, config).requires_grad_(False)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "modules_to_save" in name:
                parameter.mul_(1.5)
    tower, prompts = vision_tower(adapted), [qwen2_vl.prompts["one image"]]
    cache = VisionCache(tower, PLENTY)
    image_features(tower, prompts, cache)
    with adapted.disable_adapter():
        assert torch.equal(image_features(tower, prompts, cache)[0], image_features(tower, prompts)[0])
    assert cache.hits == cache.misses == 0


def test_autocast_and_plain_features_are_not_mixed(qwen2_vl: Any) -> None:
    model, prompts = copy.deepcopy(qwen2_vl.model), [qwen2_vl.prompts["one image"]]
    freeze(model)
    tower = vision_tower(model)
    cache = VisionCache(tower, PLENTY)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(image_features(tower, prompts, cache)[0], image_features(tower, prompts)[0])
        assert torch.equal(image_features(tower, prompts, cache)[0], image_features(tower, prompts)[0])
    assert (cache.hits, cache.misses) == (2, 2)


def test_the_longest_unseen_pictures_make_room(qwen2_vl: Any) -> None:
    model = copy.deepcopy(qwen2_vl.model)
    freeze(model)
    tower, width = vision_tower(model), 4 * 32 * 4  # bytes of an image token's features, four patches of 32 floats

    def show(number: int, times: int = 1) -> None:
        pixels, grid = torch.full((16, 1176), float(number)), torch.tensor([[1, 4, 4]])
        many = (pixels.repeat(times, 1), grid.repeat(times, 1))
        prompt = Prompt(number, torch.zeros(4), torch.zeros(3, 4), *many, "", image_digests=image_digests(*many))
        image_features(tower, [prompt], cache)

    cache = VisionCache(tower, 2 * 4 * width)
    for number in (1, 2, 1, 3, 1, 2):  # 3 drops 2, the second 2 drops 3
        show(number)
    assert (cache.hits, cache.misses, cache.bytes, cache.room) == (2, 4, 8 * width, 0)
    show(5, times=3)  # a picture three times in one call
    assert (cache.misses, cache.bytes) == (5, 8 * width)
    cache.clear()
    assert (cache.bytes, cache.room) == (0, 8 * width)
    small = cache = VisionCache(tower, 4 * width - 1)
    show(1)
    show(1)
    assert (small.hits, small.misses, small.bytes) == (0, 2, 0)


def test_prompts_without_digests_are_not_kept(qwen2_vl: Any) -> None:
    model = copy.deepcopy(qwen2_vl.model)
    freeze(model)
    tower, prompt = vision_tower(model), qwen2_vl.prompts["two images"]
    cache = VisionCache(tower, PLENTY)
    for digests in ((), prompt.image_digests[:1]):
        found = image_features(tower, [replace(prompt, image_digests=digests)], cache)
        torch.testing.assert_close(found, image_features(tower, [prompt]))
    assert cache.misses == cache.bytes == 0


def test_digests_tell_pixels_and_grids_apart() -> None:
    pixels = torch.arange(16.0 * 1176).view(16, 1176)
    grids = [torch.tensor([[1, *grid]]) for grid in ((4, 4), (2, 8))]
    again = image_digests(torch.cat([pixels, pixels]), torch.cat([grids[0], grids[1]]))
    assert again == (*image_digests(pixels, grids[0]), *image_digests(pixels.clone(), grids[1]))
    assert len({*again, *image_digests(pixels + 1, grids[0])}) == 3
    assert image_digests(None, None) == ()


# A whole run


@pytest.fixture
def train(tiny_model_dir: Path, sat_file: Path, tmp_path: Path) -> Any:
    def run(cache_bytes: int) -> tuple[GRPOTrainer, Seen]:
        torch.manual_seed(0)
        config = GRPOConfig(
            output_dir=str(tmp_path / str(cache_bytes)), use_cpu=True, report_to=[], save_strategy="no", max_steps=2,
            batch_unit="prompts", per_device_train_batch_size=3, num_generations=2, max_completion_length=5, beta=0.04,
            learning_rate=1e-2, token_budget=150, vision_cache_bytes=cache_bytes, disable_tqdm=True, optim="sgd",
        )  # fmt: skip
        model = load_policy(str(tiny_model_dir), freeze_vision=True)
        trainer = GRPOTrainer(model, odd_tokens, config, load_rows(str(sat_file)))
        reference = trainer.updater.reference_model
        seen = Seen(vision_tower(trainer.model), vision_tower(reference))
        trainer.train()
        return trainer, seen

    return run


def odd_tokens(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [float(sum(ids) % 7) for ids in completion_ids]


def test_a_picture_goes_through_a_frozen_tower_once_in_a_run(train: Any) -> None:
    """Not once for sampling, once for the update and once for the frozen reference; and what is learnt is the same."""
    (with_cache, seen), (without, seen_without) = train(PLENTY), train(0)
    cache = with_cache.updater.vision_cache
    assert cache.misses == 6  # two steps of three rows, a picture each
    assert cache.hits == 2 * cache.misses
    assert seen_without.patches == 3 * seen.patches > 0
    assert without.updater.vision_cache is None
    untrained = load_policy(with_cache.model.config._name_or_path).state_dict()
    other = without.model.state_dict()
    for name, ours in with_cache.model.state_dict().items():
        torch.testing.assert_close(ours, other[name], atol=1e-6, rtol=1e-5, msg=name)
        assert torch.equal(ours, untrained[name]) == (".visual." in name and ".merger." not in name), name


def test_a_negative_size_is_named() -> None:
    with pytest.raises(ValueError, match=r"vision_cache_bytes=-1 is not valid: use 0 or more"):
        GRPOConfig(output_dir="unused", use_cpu=True, vision_cache_bytes=-1)
