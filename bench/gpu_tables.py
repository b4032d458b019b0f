"""The READMEs' tables of what was measured on GPUs."""

from typing import Any

from result_files import Card, ResultFile, Results, formatted, markdown

TIMES = "{:.1f} times faster"
HEAD = ("head", "head", None, "fastgrpo")
PAPER = "**On a GPU**, the paper's step (8 prompts × 8 completions of 700 tokens, Qwen2-VL-2B's shape, bf16, beta 0.04)"
STEP = ("step", "step_seconds", "median")
AUTO = ("step", "as auto chooses", "step_seconds", "median")
"""An earlier suite names it by what auto chose there; our side of a comparison takes the step so, too."""


def state(results: Results) -> str:
    """In a sentence or two: what the paper's step takes on a GPU."""
    told = []
    for card in results.cards():
        stages = _named_anew(card)
        if auto := stages["step"][AUTO[1]]:
            seconds = formatted("{:.1f} s", stages, *AUTO)
            if stages["step"].get("step_seconds", auto["step_seconds"]) != auto["step_seconds"]:
                seconds += formatted(" ({:.1f} s with all layers checkpointed)", stages, *STEP)
            told.append(f"{seconds} on one {card.name} ({_links(card.used, 'bench/results')})")
    now = f"{PAPER} takes {' and '.join(told)}"
    first = results.first_step()
    if first is None:
        return f"{now}.\n" if told else "**Nothing has been measured on a GPU yet.**\n"
    seconds = sorted(first.record["figures"]["step_s"])
    as_written = (
        f"{seconds[len(seconds) // 2]:.1f} s on one {first.record['device']} as first written "
        f"({_links([first], 'bench/results')}, {min(seconds):.1f} … {max(seconds):.1f} s of {len(seconds)} steps)"
    )
    if told:
        return f"{now}; it took {as_written}. The goal is 2.2 s on one H200.\n"
    return (
        f"{PAPER} took {as_written}. Of what was written since, no figure is in yet; the goal is 2.2 s on one H200.\n"
    )


def speed(results: Results) -> str:
    """The numbers to reach on an H200 beside those measured, a column for each card."""
    rows: list[tuple[str, str, str, tuple[str | None, ...]]] = [
        ("the paper's step, 8 prompts × 8 × 700 tokens", "≤ 2.2 s", "{:.2f} s", AUTO),
        ("… all layers checkpointed", "–", "{:.2f} s", STEP),
        ("… against plain transformers and torch", "–", TIMES, _ratio("step_plain", "step_time_vs_plain")),
        ("… against TRL 1.16", "–", TIMES, _ratio("step_trl", "step_time_vs_trl")),
        ("decode step, prompts of 700 and 324 new tokens, B = 64", "≤ 1.6 ms", "{:.2f} ms", _decode(64)),
        ("… B = 256", "≤ 2.3 ms", "{:.2f} ms", _decode(256)),
        ("LM head, forward + backward, 16,384 tokens", "≤ 36 ms", "{:.1f} ms", (*HEAD, "ms")),
        ("… peak memory at 32,768 tokens", "≤ 9.96 GB", "{:.2f} GB", ("memory", "gigabytes", "head, fastgrpo")),
        ("weight sync", "≤ 5 ms", "{:.1f} ms", ("sync", "ms")),
    ]
    cards = results.cards()
    figures = [_named_anew(card) for card in cards] or [{}]
    table = markdown(
        ["Qwen2-VL-2B's shape, bf16", "to reach on an H200", *([f"one {card.name}" for card in cards] or ["measured"])],
        [[what, reach, *(formatted(form, one, *path) for one in figures)] for what, reach, form, path in rows],
    )
    told = "".join(f"\n{card.name}: {_links(card.used, 'bench/results')}.\n" for card in cards)
    return table + told


def kernel_rows(results: Results) -> list[list[str]]:
    """The ops on the card of the newest suite."""
    card = next(iter(results.cards()), None)
    stages = {} if card is None else _named_anew(card)
    ops = [("head", "loss", "grpo_loss"), ("decode_ops", "decode_attention", "decode_attention")]
    ops += [("decode_ops", "rope", "rope_and_cache"), ("decode_ops", "sample", "sample")]
    head = (stages, *HEAD)
    peak = (stages, "memory", "gigabytes")
    where = "one GPU" if card is None else f"one {card.name}"
    return [
        [f"{where}: head, forward + backward, T = 16,384, H = 1536", "≤ 36 ms", formatted("{:.1f} ms", *head, "ms")],
        ["… forward alone", "floor 9.7 ms", formatted("{:.1f} ms", *head, "forward_ms")],
        ["… peak at 32,768 tokens, logits kept", "≤ 9.96 GB", formatted("{:.2f} GB", *peak, "head, fastgrpo")],
        ["… recomputed", "≤ 1.07 GB", formatted("{:.2f} GB", *peak, "head, fastgrpo_recompute")],
        *(
            [f"… `{name}`", "–", formatted("{:.3f} ms", stages, stage, op, None, "fastgrpo", "ms")]
            for stage, op, name in ops
        ),
    ]


def _decode(sequences: int) -> tuple[str, ...]:
    return "rollout", f"B={sequences}", "decode_ms_per_step", "ours"


def _ratio(stage: str, name: str) -> tuple[str, ...]:
    return stage, "ratios", name


def _named_anew(card: Card) -> dict[str, Any]:
    """A card's stages, peaks in gigabytes, names as they are today."""
    stages = card.stages
    peaks = stages.get("memory", {}).get("peak_bytes", {})
    named = {**stages, "memory": {"gigabytes": {name: peak / 1e9 for name, peak in peaks.items()}}}
    step, compared = stages.get("step", {}), stages.get("step_trl", {})
    named_so = (step.get(AUTO[1]), step.get("without checkpointing"), compared.get("ours"), step)
    named["step"] = {**step, AUTO[1]: next((one for one in named_so if one), {})}
    return named


def _links(files: list[ResultFile], folder: str) -> str:
    return ", ".join(
        f"[record of {str(one.record.get('date', ''))[:10]}]({folder}/{one.name}), commit {one.record['commit']}"
        for one in files
    )
