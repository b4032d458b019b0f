"""The decode step: no look at the device, the same addresses, rows that stand still once they have ended."""

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from device_only import DeviceOnly
from fastgrpo_kernels import SampleParams
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastgrpo.sampler.packed_decoder import DecoderShape, PackedDecoder
from fastgrpo.sampler.runner import Limits, RowState, Runner
from fastgrpo.sampler.sequence import PromptGroup
from fastgrpo.sampler.weight_sync import sync_weights

LIMITS = Limits(rows=8, groups=3, prefix_pages=4, suffix_pages=3, max_new_tokens=33, pages=64)
SETTINGS = [
    SampleParams(0.8, top_k=7, top_p=0.9, min_p=0.01, repetition_penalty=1.2),
    SampleParams(),
    SampleParams(temperature=0.0),
]


def make_runner(decoder: PackedDecoder, params: SampleParams, **changes: Any) -> Runner:
    return Runner(decoder, LIMITS, 16, params, eos_ids=[0, 7], suppressed=[3], cuda_graphs=False, **changes)


@pytest.mark.parametrize("params", SETTINGS)
@pytest.mark.parametrize("rows", [1, 8])
def test_the_step_stays_on_a_cuda_device(qwen2_vl: Any, params: SampleParams, rows: int) -> None:
    """The CUDA branch, on CUDA tensors without data."""
    shape = DecoderShape.of(qwen2_vl.model)
    with FakeTensorMode(allow_non_fake_inputs=True):
        runner = make_runner(PackedDecoder(shape, torch.bfloat16, "cuda"), params)
        before = {name: (value, value.shape) for name, value in vars(runner.state).items() if value is not None}
        with DeviceOnly() as mode:
            runner.step(rows)
        assert mode.calls > 20
        for name, (value, size) in before.items():
            assert getattr(runner.state, name) is value, f"{name} was replaced"
            assert value.shape == size


class OpsPerLayer(TorchDispatchMode):
    """Counts what launches kernels; views do not."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and func.namespace != "prim":
            self.ops[str(func.overloadpacket)] += 1
        return func(*args, **(kwargs or {}))


def test_a_layer_of_the_step_launches_eight_kernels(qwen2_vl: Any) -> None:
    """Seven ops, of which attention is two kernels. Found as the difference that one more layer makes."""
    counts = []
    for layers in (1, 2):
        shape = replace(DecoderShape.of(qwen2_vl.model), layers=layers)
        with FakeTensorMode(allow_non_fake_inputs=True):
            runner = make_runner(PackedDecoder(shape, torch.bfloat16, "cuda"), SETTINGS[1])
            with OpsPerLayer() as mode:
                runner.step(8)
            counts.append(mode.ops)
    assert counts[1] - counts[0] == {
        "fastgrpo_kernels.add_norm": 2,
        "fastgrpo_kernels.thin_linear": 4,
        "fastgrpo_kernels.decode_attention": 1,
    }


def test_the_watch_notices_what_it_is_there_for() -> None:
    with FakeTensorMode():
        x = torch.zeros(3, device="cuda")
        on_host, scalar = torch.zeros(3), torch.zeros(())
        aten = torch.ops.aten
        leaks = (
            lambda: aten._to_copy(x, device="cpu"),
            lambda: aten._local_scalar_dense(x),
            lambda: aten.nonzero(x),
            lambda: aten.masked_select(x, x > 0),
            lambda: aten.add(on_host, 1),
            lambda: aten.add(x, scalar),  # allowed by torch, but its value is fixed when a graph is captured
        )
        for leak in leaks:
            with pytest.raises(AssertionError, match=r"in the decode step|touches a tensor on cpu"), DeviceOnly():
                leak()


def snapshot(state: RowState, rows: tuple[int, int]) -> dict[str, torch.Tensor]:
    """What must not change in rows that have ended; the last column of the results takes their draws."""
    results = ("drawn", "logprobs", "sampling_logprobs")
    part = {name: value for name, value in vars(state.part(*rows)).items() if value is not None}
    return {name: (value[:, :-1] if name in results else value).clone() for name, value in part.items()}


def test_rows_that_have_ended_stand_still(qwen2_vl: Any) -> None:
    """Their state and every page of the cache but the running rows' own; so a capture's trial steps change nothing."""
    decoder = PackedDecoder(DecoderShape.of(qwen2_vl.model), torch.float32, "cpu")
    sync_weights(decoder, qwen2_vl.model)
    runner = make_runner(decoder, SETTINGS[0])
    for cache in (*runner.cache.keys, *runner.cache.values):
        cache.zero_()
    group = PromptGroup.of(qwen2_vl.prompts["no image"], 4, seed=0, step=0)
    group.pages = [0, 1, 2]
    group.first_logits = torch.randn(1, decoder.shape.vocabulary)
    for sequence in group.sequences:
        sequence.pages = [10 + 3 * sequence.index + i for i in range(3)]
    runner.arrange(group.sequences)
    runner.state.finished[:] = True
    runner.state.finished[2] = False
    before = [snapshot(runner.state, rows) for rows in ((0, 2), (3, 8))]
    runner.run(3)
    for old, rows in zip(before, ((0, 2), (3, 8)), strict=True):
        for name, value in snapshot(runner.state, rows).items():
            assert torch.equal(value, old[name]), name
    assert runner.state.counters[2] == 4
    written = runner.cache.keys[1].abs().amax(dim=(1, 2, 3)).nonzero().flatten()
    assert written.tolist() == [16]  # row 2's first page


@pytest.mark.gpu
def test_graphs_draw_what_the_eager_step_draws(qwen2_vl: Any) -> None:
    """In bf16 on a GPU; the smaller buckets after the largest, and again after new weights."""
    model = qwen2_vl.model
    decoder = PackedDecoder(DecoderShape.of(model), torch.bfloat16, "cuda")
    sync_weights(decoder, model)
    drawn = []
    for graphs in (False, True):
        runner = Runner(decoder, LIMITS, 16, SETTINGS[1], eos_ids=[], suppressed=[3], cuda_graphs=graphs)
        for cache in (*runner.cache.keys, *runner.cache.values):
            cache.fill_(0.1)
        group = PromptGroup.of(qwen2_vl.prompts["no image"], 7, seed=0, step=0)
        group.pages = [0, 1, 2]
        group.first_logits = torch.linspace(-1, 1, decoder.shape.vocabulary, device="cuda")[None]
        for sequence in group.sequences:
            sequence.pages = [10 + 3 * sequence.index + i for i in range(3)]
        runner.arrange(group.sequences)
        runner.run(5)
        runner.arrange(group.sequences[:3])
        sync_weights(decoder, model)
        runner.run(5)
        drawn.append(runner.state.drawn[:3, :11].tolist())
    assert drawn[0] == drawn[1]
