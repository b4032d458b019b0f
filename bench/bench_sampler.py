"""Rollouts: `SamplerEngine` against HF `generate`, the same model, prompts, dtype, threads and number of tokens.

    python bench/bench_sampler.py --device cpu

HF gets what a GRPO trainer gives it: a left-padded batch that holds every prompt G times, pictures included. Both
sides draw at temperature 1 with image tokens suppressed and no end token, so exactly as many tokens as asked for. Only
ours also returns log-probs. Decode alone is the time of N tokens less that of one token, on both sides. On a GPU the
model is of Qwen2-VL-2B's shape with random weights.
"""

import sys
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from statistics import median
from typing import Any

import torch
from fastgrpo_profiling.roofline import measure_ceilings
from harness import Result, parser, print_table
from timing import in_fresh_process, paired_ratio, paired_seconds, peak_bytes, spread
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, Qwen2VLConfig, Qwen2VLForConditionalGeneration

from fastgrpo.plain.engine import vision_inputs
from fastgrpo.sampler.decoder import KVCache
from fastgrpo.sampler.engine import SamplerEngine, SamplerOptions
from fastgrpo.types import Prompt, SamplingParams

IMAGE, VIDEO = 3, 4
TIE = 1e-4
"""Greedy paths may part where the two best logits are closer than this."""


@dataclass(frozen=True)
class Workload:
    """A model, prompts with a picture each, and how many tokens to draw."""

    model: str
    prompts: int = 4
    group: int = 8
    patches: int = 24
    """Patches along each side of the picture, 14 pixels each; a quarter of all become tokens."""
    text_tokens: tuple[int, ...] = (70, 64, 76, 70)
    new_tokens: int = 64
    rounds: int = 5

    @property
    def rows(self) -> int:
        return self.prompts * self.group


TINY = Workload("tiny")
CPU_WORKLOADS = {
    "64 tokens": TINY,
    "256 tokens": replace(TINY, new_tokens=256, rounds=3),
    "50M model, 448 px": Workload("50M", patches=32, rounds=2),
}


def paper_workload(rows: int) -> Workload:
    """Groups of 8 on 700-token prompts, 324 new tokens."""
    return Workload("2B", prompts=rows // 8, text_tokens=(444,), patches=32, new_tokens=324, rounds=3)


CUDA_WORKLOADS = {f"2B, B={rows}": paper_workload(rows) for rows in (8, 64, 256, 512)}
TEXT: dict[str, dict[str, Any]] = {
    "tiny": {"vocab_size": 4096, "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4},
    "50M": {"vocab_size": 32_000, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8},
    "2B": {"vocab_size": 151_936, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28},
}
HEADS = {"tiny": (6, 2, [4, 6, 6]), "50M": (8, 2, [8, 12, 12]), "2B": (12, 2, [16, 24, 24])}
VISION = {
    "tiny": {"depth": 4, "embed_dim": 128, "num_heads": 4},
    "50M": {"depth": 6, "embed_dim": 320, "num_heads": 8},
    "2B": {"depth": 32, "embed_dim": 1280, "num_heads": 16},
}


def build_model(name: str, device: str) -> Any:
    """Random weights; bf16 on a GPU, else fp32."""
    heads, kv_heads, sections = HEADS[name]
    text = {
        **TEXT[name],
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections},
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    vision = {**VISION[name], "hidden_size": text["hidden_size"], "mlp_ratio": 4, "patch_size": 14}
    config = Qwen2VLConfig(
        text_config=text, vision_config=vision, image_token_id=IMAGE, video_token_id=VIDEO, tie_word_embeddings=True
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = Qwen2VLForConditionalGeneration(config)
    return model.to(torch.bfloat16 if device == "cuda" else torch.float32).eval()


@cache
def build_prompts(workload: Workload) -> list[Prompt]:
    """A random picture, then random words; kept, so that no timing contains it."""
    prompts = []
    for row in range(workload.prompts):
        draw = torch.Generator().manual_seed(row)
        side = workload.patches // 2
        count = workload.text_tokens[row % len(workload.text_tokens)]
        words = torch.randint(10, TEXT[workload.model]["vocab_size"], (count,), generator=draw)
        place = torch.cartesian_prod(torch.arange(1), torch.arange(side), torch.arange(side)).T
        prompts.append(
            Prompt(
                row,
                torch.cat([torch.full((side * side,), IMAGE), words]),
                torch.cat([place, torch.arange(count).expand(3, -1) + side], dim=1),
                torch.randn(workload.patches**2, 3 * 2 * 14 * 14, generator=draw),
                torch.tensor([[1, workload.patches, workload.patches]]),
                "",
            )
        )
    return prompts


class NoTexts:
    """In place of a tokenizer: there are no words to these tokens, and no end token."""

    eos_token_id = None

    def batch_decode(self, sequences: list[Tensor], **_: Any) -> list[str]:
        return [""] * len(sequences)


def build_engine(model: Any, dtype: torch.dtype | None = None, **options: Any) -> SamplerEngine:
    model.generation_config.eos_token_id = None
    engine = SamplerEngine(model, NoTexts(), options=SamplerOptions(max_rows=1024, **options), dtype=dtype)
    engine.sync()
    return engine


def our_rollout(engine: SamplerEngine, workload: Workload, tokens: int, temperature: float = 1.0) -> dict[int, Any]:
    params = SamplingParams(tokens, temperature=temperature)
    groups = engine.generate(build_prompts(workload), workload.group, params, step=0)
    return {prompt.row_id: completions for prompt, completions in groups}


@torch.no_grad()
def hf_rollout(model: Any, workload: Workload, tokens: int, temperature: float = 1.0) -> Tensor:
    """[rows, tokens]"""
    prompts = [p for p in build_prompts(workload) for _ in range(workload.group)]
    ids = pad_sequence([p.input_ids for p in prompts], batch_first=True, padding_value=0, padding_side="left")
    lengths = torch.tensor([len(p.input_ids) for p in prompts])
    mask = (torch.arange(ids.shape[1]) >= ids.shape[1] - lengths[:, None]).long()
    ids, mask = ids.to(model.device), mask.to(model.device)
    draws = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0} if temperature else {"do_sample": False}
    config = GenerationConfig(
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        suppress_tokens=[IMAGE, VIDEO],
        pad_token_id=0,
        use_cache=True,
        **draws,
    )
    sequences = model.generate(
        input_ids=ids, attention_mask=mask, **vision_inputs(model, prompts, ids), generation_config=config
    )
    return sequences[:, ids.shape[1] :].cpu()


def check_greedy(model: Any, engine: SamplerEngine, workload: Workload) -> dict[str, Any]:
    """Token for token, until two logits tie; and every completion as long as asked for."""
    workload = replace(workload, group=1)
    ours = our_rollout(engine, workload, workload.new_tokens, temperature=0.0)
    theirs = hf_rollout(model, workload, workload.new_tokens, temperature=0.0)
    agree, unexplained = 0, 0
    for row, tokens in enumerate(theirs):
        mine = ours[row][0].token_ids
        parted = (mine != tokens).nonzero()
        if len(mine) == len(tokens) and len(parted) == 0:
            agree += 1
        elif len(mine) != len(tokens) or _gap(model, build_prompts(workload)[row], tokens, int(parted[0])) >= TIE:
            unexplained += 1
    return {"greedy_rows_equal_to_hf": agree, "greedy_differs_only_at_ties": unexplained == 0}


@torch.no_grad()
def _gap(model: Any, prompt: Prompt, tokens: Tensor, place: int) -> float:
    """Distance of the two best logits for token `place` of a completion."""
    ids = torch.cat([prompt.input_ids, tokens[:place]])[None].to(model.device)
    logits = model(input_ids=ids, **vision_inputs(model, [prompt], ids), use_cache=False).logits[0, -1].float()
    logits[[IMAGE, VIDEO]] = -torch.inf
    best = logits.topk(2).values
    return float(best[0] - best[1])


@torch.no_grad()
def forward_distance(model: Any, engine: SamplerEngine, workload: Workload) -> dict[str, float]:
    """Greedy completions against a whole HF forward pass: largest log-prob distance, share of equal best tokens."""
    distance, equal, count = 0.0, 0, 0
    prompts = {prompt.row_id: prompt for prompt in build_prompts(workload)}
    for row, (completion,) in our_rollout(engine, replace(workload, group=1), 64, temperature=0.0).items():
        tokens = completion.token_ids.to(model.device)
        ids = torch.cat([prompts[row].input_ids.to(model.device), tokens])[None]
        logits = model(input_ids=ids, **vision_inputs(model, [prompts[row]], ids), use_cache=False).logits[0]
        scores = logits[-len(tokens) - 1 : -1].float()
        logprobs = scores.log_softmax(-1).gather(1, tokens[:, None]).squeeze(1).cpu()
        distance = max(distance, float((logprobs - completion.logprobs).abs().max()))
        scores[:, [IMAGE, VIDEO]] = -torch.inf
        equal, count = equal + int((scores.argmax(-1) == tokens).sum()), count + len(tokens)
    return {"max_logprob_distance": distance, "top_1_agreement": equal / count}


def cache_bytes(engine: SamplerEngine, workload: Workload) -> dict[str, float]:
    """MiB of cache pages that the rollout holds, and would hold if each completion had its prompt's pages to itself."""
    size = engine.options.page_size
    page = KVCache.page_bytes(engine.decoder.shape, size, engine.decoder.dtype) / 2**20
    prompts = [-(-len(p.input_ids) // size) for p in build_prompts(workload)]
    own = workload.rows * -(-(workload.new_tokens - 1) // size)
    return {
        "cache_mib_shared": page * (sum(prompts) + own),
        "cache_mib_unshared": page * (workload.group * sum(prompts) + own),
    }


class ProcessorTimes:
    """Processor seconds of each call: what a busy machine distorts less than the time on the clock."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}

    def of(self, side: str, function: Callable[[], Any]) -> Callable[[], None]:
        def timed() -> None:
            start = time.process_time()
            function()
            self.seconds.setdefault(side, []).append(time.process_time() - start)

        return timed


def measure(name: str, workload: Workload, device: str, result: Result) -> list[Any]:
    """Paired times of whole rollouts and of one token; a row of the table."""
    model = build_model(workload.model, device)
    engine = build_engine(model)
    distance = forward_distance(model, engine, workload)
    if device == "cpu":  # bf16 on a GPU rounds: there the distance is a figure, not a check
        checks = check_greedy(model, engine, replace(workload, new_tokens=64))
        checks["logprobs_within_1e-4_of_hf"] = distance["max_logprob_distance"] < 1e-4
        result.checks |= {f"{name}: {key}": value for key, value in checks.items()}
    tokens, engine_for_one, cpu = workload.new_tokens, build_engine(model), ProcessorTimes()
    times = paired_seconds(
        {
            "hf": cpu.of("hf", lambda: hf_rollout(model, workload, tokens)),
            "ours": cpu.of("ours", lambda: our_rollout(engine, workload, tokens)),
            "hf, one token": lambda: hf_rollout(model, workload, 1),
            "ours, one token": lambda: our_rollout(engine_for_one, workload, 1),
        },
        rounds=workload.rounds,
        device=device,
    )
    whole = {side: times[side] for side in ("hf", "ours")}
    one = {side: times[f"{side}, one token"] for side in whole}
    decode = {side: [w - o for w, o in zip(whole[side], one[side], strict=True)] for side in whole}
    drawn = workload.rows * tokens
    ratio = paired_ratio(whole["hf"], whole["ours"])
    decode_ratio = paired_ratio(decode["hf"], decode["ours"])
    key = "tokens_per_s_vs_hf" + ("" if name == "64 tokens" else f", {name}")
    result.ratios |= {key: ratio, f"decode_tokens_per_s_vs_hf, {name}": decode_ratio}
    result.figures[name] = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens_per_s": {side: drawn / median(seconds) for side, seconds in whole.items()},
        "seconds": {side: median(seconds) for side, seconds in whole.items()},
        "spread": {side: spread(seconds) for side, seconds in whole.items()},
        "one_token_seconds": {side: median(seconds) for side, seconds in one.items()},
        "decode_ms_per_step": {side: 1e3 * median(d) / (tokens - 1) for side, d in decode.items()},
        "processor_seconds": {side: median(seconds) for side, seconds in cpu.seconds.items()},
        **cache_bytes(engine, workload),
        **distance,
    }
    if device == "cuda":
        bandwidth = measure_ceilings(device, torch.bfloat16).bytes_per_s
        floor = {"floor_ms_per_step": floor_ms(engine, workload, bandwidth)}
        result.figures[name] |= {**floor, **graphs_off(model, workload)}
    return [name, *(drawn / median(whole[side]) for side in ("hf", "ours")), ratio, decode_ratio]


def floor_ms(engine: SamplerEngine, workload: Workload, bytes_per_s: float) -> float:
    """Milliseconds to read the weights once and the cache, prompts shared, at the length of half the completion."""
    decoder = engine.decoder
    weights = [decoder.head_weight] + [w for layer in decoder.layers for w in vars(layer).values()]
    token = KVCache.page_bytes(decoder.shape, 1, decoder.dtype)
    prompts = sum(len(p.input_ids) for p in build_prompts(workload))
    read = sum(w.nbytes for w in weights) + token * (prompts + workload.rows * workload.new_tokens / 2)
    return 1e3 * read / bytes_per_s


def graphs_off(model: Any, workload: Workload) -> dict[str, float]:
    """Seconds of a rollout whose decode steps are launched one kernel at a time."""
    engine = build_engine(model, cuda_graphs=False)
    times = paired_seconds(
        {"ours": lambda: our_rollout(engine, workload, workload.new_tokens)}, rounds=2, device="cuda"
    )
    return {"seconds_without_graphs": median(times["ours"])}


def peak_memory(side: str, device: str) -> int:
    """Bytes at the peak of one rollout above what the model holds; for ours, its own weights and cache included."""
    workload = CPU_WORKLOADS["64 tokens"] if device == "cpu" else CUDA_WORKLOADS["2B, B=64"]
    model = build_model(workload.model, device)
    if side == "hf":
        return peak_bytes(lambda: hf_rollout(model, workload, workload.new_tokens), device)
    return peak_bytes(lambda: our_rollout(build_engine(model), workload, workload.new_tokens), device)


def main() -> int:
    arguments = parser(__doc__ or "")
    arguments.add_argument("--only", metavar="NAME", help="one workload of the table")
    arguments.add_argument("--threads", type=int, default=1, help="CPU threads, of both sides")
    arguments.add_argument("--peak-memory", choices=("hf", "ours"), help="print one side's peak and leave")
    options: Namespace = arguments.parse_args()
    torch.set_num_threads(options.threads)
    if options.peak_memory:
        print(peak_memory(options.peak_memory, options.device))
        return 0
    result = Result("bench_sampler", options.device)
    workloads = CPU_WORKLOADS if options.device == "cpu" else CUDA_WORKLOADS
    chosen = {name: w for name, w in workloads.items() if options.only in (None, name)}
    rows = [measure(name, workload, options.device, result) for name, workload in chosen.items()]
    if options.only is None:
        flags = ("--device", options.device, "--threads", str(options.threads))
        peaks: dict[str, Any] = {side: in_fresh_process(*flags, "--peak-memory", side) for side in ("hf", "ours")}
        result.figures["peak_memory_mib"] = {side: peak / 2**20 for side, peak in peaks.items()}
        result.ratios["peak_memory_vs_hf"] = peaks["hf"] / peaks["ours"]
    columns = ["workload", "HF tokens/s", "ours tokens/s", "times faster", "decode alone, times faster"]
    print_table("Rollouts", columns, rows)
    return result.finish(options.out)


if __name__ == "__main__":
    sys.exit(main())
