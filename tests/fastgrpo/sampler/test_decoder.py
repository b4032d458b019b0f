"""The compact decoder against transformers' own, and which models it takes."""

from typing import Any

import pytest
import torch
from fastgrpo_kernels import PagedLayout
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from fastgrpo.sampler.choice import is_packed
from fastgrpo.sampler.decoder import KVCache
from fastgrpo.sampler.packed_decoder import Chunk, DecoderShape, PackedDecoder, not_packed
from fastgrpo.sampler.weight_sync import sync_weights

PAGE = 4
SMALL = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}


def make_model(**changes: Any) -> Any:
    torch.manual_seed(0)
    return Qwen2ForCausalLM(Qwen2Config(**{**SMALL, **changes})).eval()


def make_decoder(model: Any) -> tuple[PackedDecoder, KVCache]:
    decoder = PackedDecoder(DecoderShape.of(model), torch.float32, "cpu")
    sync_weights(decoder, model)
    return decoder, KVCache.empty(decoder.shape, 32, PAGE, torch.float32, "cpu")


def prefill(decoder: PackedDecoder, cache: KVCache, pieces: list[tuple[Tensor, int, int, list[int]]]) -> Tensor:
    """Logits [pieces, V] after each piece: (ids of the whole prompt, start, end, pages)."""
    ids = torch.cat([prompt[start:end] for prompt, start, end, _ in pieces])
    positions = torch.cat([torch.arange(start, end) for _, start, end, _ in pieces])
    slots = torch.cat(
        [torch.tensor(p)[torch.arange(a, b) // PAGE] * PAGE + torch.arange(a, b) % PAGE for _, a, b, p in pieces]
    )
    chunks = [Chunk(start, end, torch.tensor(pages)[: -(-end // PAGE)]) for _, start, end, pages in pieces]
    hidden = decoder.prefill(decoder.embed[ids], positions.expand(3, -1), slots, chunks, cache)
    return decoder.head(hidden)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True, "num_key_value_heads": 6},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}},
    ],
)
@torch.no_grad()
def test_prefill_in_chunks_and_decode_equal_transformers(changes: dict[str, Any]) -> None:
    model = make_model(**changes)
    decoder, cache = make_decoder(model)
    long, short = torch.randint(0, 97, (13,)), torch.randint(0, 97, (1,))
    long_pages, short_pages = [7, 2, 9, 4], [11]
    prefill(decoder, cache, [(long, 0, 5, long_pages)])
    last = prefill(decoder, cache, [(long, 5, 13, long_pages), (short, 0, 1, short_pages)])
    for logits, ids in zip(last, (long, short), strict=True):
        torch.testing.assert_close(logits, model(ids[None]).logits[0, -1], atol=2e-5, rtol=1e-4)

    # Two completions of the long prompt, one of the short one; five tokens each.
    new = torch.randint(0, 97, (3, 5))
    tables = torch.tensor([[20, 21], [22, 23], [24, 25]], dtype=torch.int32)
    starts = torch.tensor([13, 13, 1])
    for step in range(5):
        layout = PagedLayout(
            suffix_tables=tables,
            suffix_lens=torch.full((3,), step + 1, dtype=torch.int32),
            prefix_tables=torch.tensor([long_pages, [*short_pages, -1, -1, -1]], dtype=torch.int32),
            prefix_lens=torch.tensor([13, 1], dtype=torch.int32),
            prefix_ids=torch.tensor([0, 0, 1], dtype=torch.int32),
            cu_prefix_rows=torch.tensor([0, 2, 3], dtype=torch.int32),
        )
        slots = tables[:, step // PAGE].long() * PAGE + step % PAGE
        logits = decoder.decode(new[:, step], starts + step, slots, layout, cache)
    for row, prompt in enumerate((long, long, short)):
        theirs = model(torch.cat([prompt, new[row]])[None]).logits[0, -1]
        torch.testing.assert_close(logits[row], theirs, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_few_rows_in_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the ops that sum a product's parts in the norm behind: as near to float32 as layer by layer."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = make_model(num_hidden_layers=2).to(device)
    rows, generator = 3, torch.Generator().manual_seed(0)
    states = torch.randn(2, 2, 9, PAGE, 2, 8, generator=generator)
    tables = torch.arange(3 * rows, dtype=torch.int32).view(rows, 3)
    lengths = torch.tensor([1, 4, 9], dtype=torch.int32)
    no_prefix = torch.empty(0, 0, dtype=torch.int32), torch.empty(0, dtype=torch.int32)
    ids, starts = torch.full((rows,), -1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    layout = PagedLayout(*(x.to(device) for x in (tables, lengths, *no_prefix, ids, starts)))
    at = lengths.long() - 1
    slots = (tables.long().gather(1, at[:, None] // PAGE)[:, 0] * PAGE + at % PAGE).to(device)
    tokens = torch.randint(0, 97, (rows,), generator=generator).to(device)
    logits = []
    for dtype, backend in ((torch.float32, "torch"), (torch.float16, "torch"), (torch.float16, "triton")):
        monkeypatch.setenv("FASTGRPO_KERNELS", backend)
        decoder = PackedDecoder(DecoderShape.of(model), dtype, device)
        sync_weights(decoder, model)
        cache = KVCache.empty(decoder.shape, 9, PAGE, dtype, device)
        for layers, values in zip((cache.keys, cache.values), states, strict=True):
            for layer, value in zip(layers, values, strict=True):
                layer.copy_(value)
        logits.append(decoder.decode(tokens, at.to(device), slots, layout, cache).float())
    apart = [(found - logits[0]).norm() / logits[0].norm() for found in logits[1:]]
    assert 0 < apart[1] <= 2 * apart[0] < 1e-2  # both are rounding


def test_what_it_cannot_compute_it_says() -> None:
    sizes = {name: value for name, value in SMALL.items() if name != "num_key_value_heads"}
    assert not_packed(make_model()) is None
    assert not_packed(LlamaForCausalLM(LlamaConfig(**sizes))) == (
        "model type llama is none of qwen2, qwen2_vl, qwen2_5_vl"
    )
    window = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    assert not_packed(make_model(**window)) == "it uses sliding-window attention"
    assert not_packed(make_model(hidden_act="gelu")) == "its activation is gelu, not silu"
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    assert not_packed(make_model(rope_parameters=dynamic)) == "its rotary embedding is of type dynamic"
    quantized = make_model()
    assert is_packed(quantized)
    quantized.model.layers[0].mlp.down_proj.weight = torch.nn.Parameter(
        torch.zeros(48, 72, dtype=torch.int8), requires_grad=False
    )
    assert not is_packed(quantized)
