"""`sample` under truncations whose tokens lie everywhere: the kernels find what plain torch finds."""

import pytest
import torch
from fastgrpo_kernels import SampleParams, sample
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VOCABULARY = 5003


def logits_of(kind: str) -> Tensor:
    """[3, V]. Whatever sizes chunks have: the best tokens side by side, apart, tied, or all alike."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, VOCABULARY, generator=generator)
    if kind == "side by side":
        logits = logits.sort(dim=1).values
    elif kind == "apart":
        logits[:, ::128] += 8
    elif kind == "tied":
        logits = logits.mul(2).round()  # some ten values
    elif kind == "one finite":
        logits[:] = -torch.inf
        logits[:, [7, 5000]] = torch.tensor([1.0, 2.0])
    return logits.to(DEVICE)


@pytest.mark.parametrize(
    "params",
    [
        SampleParams(top_k=1),
        SampleParams(top_k=50),
        SampleParams(0.7, top_k=64, top_p=0.9, min_p=0.1),
        SampleParams(top_k=300, top_p=0.5),
        SampleParams(top_k=1500),  # more than are searched for
        SampleParams(top_p=0.02),
        SampleParams(0.2, top_p=0.9),
        SampleParams(top_p=0.9),  # reached by thousands
        SampleParams(min_p=0.5),
        SampleParams(min_p=0.001, repetition_penalty=1.3),  # likewise
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["random", "side by side", "apart", "tied", "one finite"])
def test_both_backends_draw_the_same_tokens(kind: str, params: SampleParams) -> None:
    logits = logits_of(kind)
    index = torch.arange(3, device=DEVICE)
    seen, suppressed = logits > 2.5, (torch.arange(VOCABULARY, device=DEVICE) % 7) == 3
    expected, actual = (
        sample(logits, params, seeds=index, counters=index, seen=seen, suppressed=suppressed, backend=backend)
        for backend in ("torch", "triton")
    )
    assert torch.equal(actual.tokens, expected.tokens)
    torch.testing.assert_close(actual.logprobs, expected.logprobs, atol=2e-5, rtol=1e-6)
    # At the edge of a top-p a token may be in or out as the masses were rounded; it weighs some 1e-4.
    torch.testing.assert_close(actual.sampling_logprobs, expected.sampling_logprobs, atol=4e-4, rtol=1e-6)
