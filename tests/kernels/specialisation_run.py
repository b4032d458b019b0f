"""Prints how many machine codes micro-batches of two sizes need, by kernel. Not under the interpreter."""

import json
from collections import defaultdict

import torch
from fastgrpo_kernels.merge_attention import _launch
from fastgrpo_kernels.norms import _backward
from fastgrpo_kernels.tl_utils import compile_only

codes = defaultdict(set)
with compile_only(90) as launches:
    for tokens in (1600, 1601):
        part = torch.empty(tokens, 12, 128, dtype=torch.bfloat16, device="meta")
        lse = torch.empty(12, tokens + 100, dtype=torch.float32, device="meta")
        own = torch.empty(12, tokens, dtype=torch.float32, device="meta")
        _launch(part, own, part, own, part, lse[:, 100:])
        x, weight = (torch.empty(*shape, dtype=torch.bfloat16, device="meta") for shape in ((tokens, 1536), (1536,)))
        _backward(x, x, x, weight, 1e-6, False, True)
for launch in launches:
    codes[launch.name].add(launch.kernel.hash)
print(json.dumps({name: len(found) for name, found in codes.items()}))
