"""FLOPs against a count of torch's own, and by hand."""

from dataclasses import replace

import pytest
import torch
from fastgrpo_profiling.roofline import (
    NOTHING,
    Ceilings,
    ModelShape,
    StepWork,
    Update,
    decode_bytes,
    measure_ceilings,
    measure_flops,
    step_flops,
    utilisation,
)
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen2_5_VLConfig, Qwen3MoeConfig, Qwen3VLConfig

from fastgrpo.demo.base_model import tiny_model

DECODER = ModelShape(hidden=4, layers=2, heads=2, kv_heads=1, head_dim=3, intermediate=5, vocab=7)
TWO_GROUPS = StepWork(prompts=[3, 2], pictures=[], completions=[[1, 2], [2, 2]])


def test_a_decoder_layer_counts_its_matrices():
    # q and o: 4 × 6 each, k and v: 4 × 3 each, three MLP matrices of 4 × 5.
    assert DECODER.layer_weights == 2 * 24 + 2 * 12 + 60
    assert DECODER.text_flops(tokens=10, pairs=0) == 2 * 2 * 132 * 10
    assert DECODER.text_flops(tokens=0, pairs=1) == 2 * 4 * 6
    assert DECODER.head_flops(3) == 2 * 4 * 7 * 3


def test_a_step_encodes_each_prompt_once_and_asks_logits_of_completions_only():
    flops = step_flops(DECODER, TWO_GROUPS, Update(reference_pass=True))
    assert flops["vision"] == 0
    assert flops["prefill"] == DECODER.text_flops(5, 6 + 3) + DECODER.head_flops(2)
    # Of completions of 1, 2, 2 and 2 tokens the last one is never fed: one token each of the others sees its prompt.
    pairs = 0 + (3 + 1) + 2 * (2 + 1)
    assert flops["decode"] == DECODER.text_flops(3, pairs) + DECODER.head_flops(3)
    assert flops["forward"] == DECODER.text_flops(5 + 3, 9 + pairs)
    assert flops["head"] == DECODER.head_flops(7)
    assert flops["backward"] == 2 * (flops["forward"] + flops["head"])
    assert flops["reference"] == flops["forward"] + flops["head"]
    assert step_flops(DECODER, TWO_GROUPS, Update(reference_pass=False))["reference"] == 0


def test_what_has_no_gradient_is_drawn_but_not_trained_on():
    trained = StepWork(prompts=[2], pictures=[], completions=[[2]])
    flops = step_flops(DECODER, TWO_GROUPS, Update(reference_pass=True), trained)
    alone = step_flops(DECODER, trained, Update(reference_pass=True))
    whole = step_flops(DECODER, TWO_GROUPS, Update(reference_pass=True))
    assert {name: flops[name] for name in ("prefill", "decode")} == {n: whole[n] for n in ("prefill", "decode")}
    for name in ("reference", "forward", "head", "backward"):
        assert flops[name] == alone[name], name
    skipped = step_flops(DECODER, TWO_GROUPS, Update(reference_pass=True), NOTHING)
    assert sum(skipped.values()) == skipped["prefill"] + skipped["decode"] > 0


def test_a_further_update_on_a_rollout_draws_nothing():
    update = Update(reference_pass=False, old_logprobs_pass=True)
    first = step_flops(DECODER, TWO_GROUPS, update, TWO_GROUPS)
    second = step_flops(DECODER, NOTHING, update, TWO_GROUPS)
    assert first["old log-probs"] == first["forward"] + first["head"]
    assert second["old log-probs"] == second["decode"] == second["prefill"] == 0
    assert second["backward"] == first["backward"]


def test_weights_that_do_not_train_have_no_gradient_to_compute():
    seeing = ModelShape(4, 2, 2, 1, 3, 5, 7, vision_layers=1, vision_hidden=4, vision_mlp_weights=32, patch_dim=6)
    work = StepWork([3], [8], [[2]])
    picture = seeing.vision_flops(8)
    whole = step_flops(seeing, work, Update(reference_pass=True))
    blind = step_flops(seeing, work, Update(reference_pass=True, vision_trains=False))
    assert whole["vision"] == blind["vision"] == picture
    for name, times in (("forward", 1), ("reference", 1), ("backward", 2)):
        assert whole[name] - blind[name] == pytest.approx(times * picture), name
    adapters = step_flops(seeing, work, Update(reference_pass=True, text_trains=False, vision_trains=False))
    matrices = 2 * seeing.layers * seeing.layer_weights * 4 + seeing.head_flops(2)
    assert blind["backward"] - adapters["backward"] == pytest.approx(matrices)


def test_adapters_in_the_tower_pass_gradients_through_it():
    seeing = ModelShape(4, 2, 2, 1, 3, 5, 7, vision_layers=1, vision_hidden=4, vision_mlp_weights=32, patch_dim=6)
    work = StepWork([3], [8], [[2]])
    blind = step_flops(seeing, work, Update(True, text_trains=False, vision_trains=False))
    adapted = step_flops(seeing, work, Update(True, text_trains=False, vision_trains=False, vision_adapts=True))
    for name in ("forward", "reference", "backward"):
        assert adapted[name] - blind[name] == pytest.approx(seeing.vision_flops(8)), name


def test_decode_reads_weights_once_a_token_and_a_shared_prompt_once_a_group():
    weights = 2 * 132 + 4 * 7
    kv = 2 * 2 * 1 * 3
    three = StepWork(prompts=[3, 2], pictures=[], completions=[[2, 3], [3, 3]])  # so 1, 2, 2 and 2 steps
    read = 3 * 2 + (1 + 3) + 2 * 2 + (3 + 3)
    assert decode_bytes(DECODER, three, bytes_per_value=2) == 2 * (2 * weights + kv * read)
    assert decode_bytes(DECODER, StepWork([3], [], [[]]), bytes_per_value=2) == 0


def test_forward_flops_agree_with_what_torch_counts():
    model = tiny_model()
    model.set_attn_implementation("eager")  # its products are counted, and over the whole square
    shape = ModelShape.from_config(model.config)
    patches, tokens = 4 * 6, 11
    grid = torch.tensor([[1, 4, 6]])
    with torch.no_grad(), FlopCounterMode(display=False) as vision:
        model.model.visual(torch.randn(patches, shape.patch_dim), grid_thw=grid)
    with torch.no_grad(), FlopCounterMode(display=False) as text:
        model(input_ids=torch.ones(1, tokens, dtype=torch.int64), use_cache=False)
    assert shape.vision_flops(patches) == pytest.approx(vision.get_total_flops(), rel=0.01)
    assert shape.text_flops(tokens, tokens**2) + shape.head_flops(tokens) == pytest.approx(
        text.get_total_flops(), rel=0.01
    )


def test_a_gated_vision_tower_is_read_too():
    shape = ModelShape.from_config(Qwen2_5_VLConfig())
    vision = Qwen2_5_VLConfig().vision_config
    assert shape.vision_hidden == vision.hidden_size
    assert shape.vision_mlp_weights == 3 * vision.hidden_size * vision.intermediate_size
    assert ModelShape.from_config(Qwen3VLConfig()).vision_mlp_weights == (
        2 * Qwen3VLConfig().vision_config.hidden_size * Qwen3VLConfig().vision_config.intermediate_size
    ), "no gate"


def test_most_blocks_of_a_windowed_tower_see_a_window():
    whole = ModelShape(4, 2, 2, 1, 3, 5, 7, vision_layers=4, vision_hidden=2, patch_dim=6)
    windowed = replace(whole, vision_window=8, vision_whole_layers=1)
    assert whole.vision_flops(32) - windowed.vision_flops(32) == 3 * 4 * 2 * 32 * (32 - 8)
    assert whole.vision_flops(8) == windowed.vision_flops(8)
    shape = ModelShape.from_config(Qwen2_5_VLConfig())
    assert (shape.vision_window, shape.vision_whole_layers) == ((112 // 14) ** 2, 4)


def test_utilisation_divides_by_what_was_measured():
    ceilings = Ceilings(flops_per_s=100.0, bytes_per_s=10.0, dtype="float32")
    flops = {"decode": 20.0, "backward": 60.0, "reference": 0.0}
    used = utilisation(flops, 5.0, [1.0, 2.0, 30.0], {"decode": 0.5, "backward": 1.0, "reference": 0.1}, ceilings)
    assert used.mfu == 80 / (2.0 * 100)
    assert used.by_phase == {"decode": 0.4, "backward": 0.6}
    assert used.decode_bandwidth == 1.0
    assert utilisation(flops, 5.0, [1.0], {"backward": 1.0}, ceilings).decode_bandwidth is None


def test_a_head_without_a_time_of_its_own_ran_inside_the_forward_pass():
    ceilings = Ceilings(flops_per_s=100.0, bytes_per_s=10.0, dtype="float32")
    flops = {"forward": 20.0, "head": 30.0}
    inside = utilisation(flops, 0.0, [1.0], {"forward": 1.0}, ceilings)
    apart = utilisation(flops, 0.0, [1.0], {"forward": 0.5, "head": 0.5}, ceilings)
    assert inside.by_phase == {"forward": 0.5}
    assert apart.by_phase == {"forward": 0.4, "head": 0.6}
    assert inside.mfu == apart.mfu == 0.5


def test_a_ceiling_draws_nothing_from_the_runs_random_numbers():
    before = torch.get_rng_state()
    assert measure_flops("cpu", torch.float32, repeats=1) > 0
    assert torch.equal(torch.get_rng_state(), before)


def test_sizes_with_other_names_are_not_guessed():
    assert ModelShape.known(object()) is None
    assert ModelShape.known(Qwen3MoeConfig()) is None, "a token sees a few of its experts"
    assert ModelShape.known(Qwen2_5_VLConfig()) == ModelShape.from_config(Qwen2_5_VLConfig())


def test_ceilings_are_measured():
    found = measure_ceilings("cpu", torch.float32, repeats=1)
    assert found.flops_per_s > 0
    assert found.bytes_per_s > 0
    assert Ceilings(7.9e14, 4.3e12, "bfloat16").text == "790 TFLOP/s (bfloat16), 4,300.0 GB/s"
    assert Ceilings(3.2e10, 1.26e10, "float32").text == "32 GFLOP/s (float32), 12.6 GB/s"
