"""Prints how many machine codes micro-batches of two sizes need, by kernel. Not under the interpreter."""

import json
from collections import defaultdict

import torch
from fastgrpo_kernels import activations, norms, rotary
from fastgrpo_kernels.merge_attention import _launch
from fastgrpo_kernels.tl_utils import compile_only

codes = defaultdict(set)
with compile_only(90) as launches:
    for tokens in (1600, 1601):
        part = torch.empty(tokens, 12, 128, dtype=torch.bfloat16, device="meta")
        lse = torch.empty(12, tokens + 100, dtype=torch.float32, device="meta")
        own = torch.empty(12, tokens, dtype=torch.float32, device="meta")
        _launch(part, own, part, own, part, lse[:, 100:])
        x, weight = (torch.empty(*shape, dtype=torch.bfloat16, device="meta") for shape in ((tokens, 1536), (1536,)))
        norms._forward(x, x, weight, None, 1e-6)
        norms._backward(x, x, x, weight, 1e-6, False, True)
        wide, angle = (torch.empty(tokens, size, dtype=torch.bfloat16, device="meta") for size in (8960, 128))
        activations._swiglu(wide, wide)
        activations._swiglu_backward(wide, wide, wide)
        activations._quick_gelu(wide)
        activations._quick_gelu_backward(wide, wide)
        rotary._launch(part, part[:, :2], angle, angle, True)
for launch in launches:
    codes[launch.name].add(launch.kernel.hash)
print(json.dumps({name: len(found) for name, found in codes.items()}))
