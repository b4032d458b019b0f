"""Kinds of kernels by their names, and a real profile of operators on the CPU."""

import threading
from types import SimpleNamespace

import pytest
import torch
from fastgrpo_kernels import kv_cache, paged_attention_kernels, sampling_kernels
from fastgrpo_profiling import span
from fastgrpo_profiling.kernels import KINDS, OTHER_KERNELS, KernelWatch, kind_of, seconds_by_kind
from fastgrpo_profiling.span import listen
from torch.autograd import DeviceType

DEVICE_KERNELS = {
    "nvjet_tst_64x8_64x16_2x1_v_bz_TNT": "matrix products",
    "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize64x64x64_cublas": "matrix products",
    "void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16_16x16>(...)": "matrix products",
    "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16, float, false>(...)": "matrix products",
    "void gemvNSP_kernel<__nv_bfloat16, __nv_bfloat16, __nv_bfloat16, float, 1, 32, 4, 1024>(...)": "matrix products",
    "void pytorch_flash::flash_fwd_splitkv_kernel<pytorch_flash::Flash_fwd_kernel_traits<128>>(...)": "attention",
    "fmha_cutlassF_bf16_aligned_64x128_rf_sm80(PyTorchMemEffAttention::AttentionKernel<...>)": "attention",
    "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7": "attention",
    "attend_kernel": "attention",
    "merge_kernel": "attention",
    "thin_linear_kernel": "matrix products",
    "add_norm_kernel": "norms, elementwise and copies",
    "_rope_and_cache_kernel": "rope and cache",
    "scan_kernel": "sampling",
    "winner_kernel": "sampling",
    "void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<float>": "norms, elementwise and copies",
    "void at::native::vectorized_elementwise_kernel<8, at::native::silu_kernel(at::TensorIteratorBase&)>": (
        "norms, elementwise and copies"
    ),
    "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<bool>>": "norms, elementwise and copies",
    "Memcpy DtoD (Device -> Device)": "norms, elementwise and copies",
    "ncclDevKernel_AllReduce_Sum_bf16_RING_LL": OTHER_KERNELS,
}


@pytest.mark.parametrize(("name", "kind"), DEVICE_KERNELS.items())
def test_kernels_have_a_kind(name, kind):
    assert kind_of([name]) == kind


def test_every_kernel_of_the_decode_step_has_a_kind():
    for module, kind in ((paged_attention_kernels, "attention"), (sampling_kernels, "sampling"), (kv_cache, "rope")):
        kernels = [name for name in vars(module) if name.endswith("_kernel")]
        assert kernels
        assert all(kind_of([name]).startswith(kind) for name in kernels), kernels


def device_event(name, microseconds, device_type=DeviceType.CUDA, annotation=False):
    elapsed = SimpleNamespace(elapsed_us=lambda: microseconds)
    return SimpleNamespace(name=name, device_type=device_type, time_range=elapsed, is_user_annotation=annotation)


def test_a_replay_is_split_by_what_ran_on_the_device():
    events = [
        device_event("cudaGraphLaunch", 900.0, DeviceType.CPU),
        device_event("rollout/decode", 800.0, annotation=True),
        *(device_event(name, 100.0) for name in ("nvjet_tst_64x8", "attend_kernel", "merge_kernel", "scan_kernel")),
        device_event("nvjet_tst_128x8", 50.0),
    ]
    expected = {"matrix products": 150e-6, "attention": 200e-6, "sampling": 100e-6}
    assert seconds_by_kind(events, "cuda") == pytest.approx(expected)


def test_an_operator_counts_as_what_it_runs_in():
    outer = SimpleNamespace(name="fastgrpo_kernels::sample", self_cpu_time_total=2.0, cpu_parent=None)
    inner = SimpleNamespace(name="aten::mm", self_cpu_time_total=3.0, cpu_parent=outer)
    alone = SimpleNamespace(name="aten::mm", self_cpu_time_total=5.0, cpu_parent=None)
    assert seconds_by_kind([outer, inner, alone], "cpu") == pytest.approx({"sampling": 5e-6, "matrix products": 5e-6})


def test_spans_of_a_name_are_looked_into():
    matrix = torch.ones(64, 64)
    watch = KernelWatch("decode", "cpu", every=2)
    with listen(watch):
        for _ in range(5):
            with span("decode"), span("nested"):
                torch.mm(matrix, matrix)
        with span("other"):
            torch.nn.functional.scaled_dot_product_attention(*3 * [matrix[None, None]])
    assert watch.watched == 3
    assert watch.seconds["matrix products"] > 0
    assert set(watch.seconds) <= {*KINDS, OTHER_KERNELS}
    assert "attention" not in watch.seconds


def test_another_threads_spans_are_not():
    def work() -> None:
        with span("decode"):
            pass

    watch = KernelWatch("decode", "cpu")
    with listen(watch):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert watch.watched == 0


def test_a_span_that_raises_ends_its_profile():
    watch = KernelWatch("decode", "cpu")
    with listen(watch):
        for _ in range(2):
            with pytest.raises(RuntimeError), span("decode"):
                raise RuntimeError
    assert watch.watched == 2
