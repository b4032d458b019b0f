"""Run folders with plausible made-up figures, every file of them."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageDraw

TASKS = {"Count": 0.25, "Relation": 0.5, "Depth": 0.5, "Distance": 0.5}
COLORS = ["red", "blue", "green", "orange", "purple"]


def thumbnail(seed: int) -> bytes:
    draws = np.random.default_rng(seed)
    image = Image.new("RGB", (180, 130), (236, 238, 241))
    canvas = ImageDraw.Draw(image)
    for _ in range(5):
        x, y, size = draws.integers(10, 140), draws.integers(10, 90), draws.integers(14, 34)
        canvas.ellipse([x, y, x + size, y + size], fill=str(draws.choice(COLORS)))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return buffer.getvalue()


def prompt(row_id: int, task: str) -> str:
    question = {
        "Count": f"How many {COLORS[row_id % 5]} balls are there? Choose between the following options: 1, 2, 3 or 4",
        "Relation": "Is the red ball left of the blue one? Choose between the following options: yes or no",
        "Depth": "Which ball is nearer to the camera? Choose between the following options: red or blue",
        "Distance": "Which ball is nearer to the green one? Choose between the following options: red or blue",
    }[task]
    return (
        "A conversation between User and Assistant. The user asks a question about the image.\n"
        f"User: <|vision_start|>{'<|image_pad|>' * 60}<|vision_end|>{question}\n"
        "Assistant: Let me solve this step by step.\n<think>"
    )


def completion(draws: np.random.Generator, progress: float, right: bool) -> str:
    if draws.random() > 0.3 + 0.7 * progress:
        return "The answer is a ball, ball, ball. The image shows a ball and a ball & a <ball>. " * int(
            draws.integers(1, 4)
        )
    thought = "I look at the picture. The red ball is on the left side, and the blue one stands further back. "
    if draws.random() < progress * 0.8:
        thought += "Wait, let me check again: the blue ball is in front of the shelf. "
    thought += "So I compare their sizes and where they touch the ground. " * int(1 + 3 * progress)
    return f"{thought}</think>\n<answer>{'blue' if right else 'red'}</answer>"


def metrics_line(step: int, progress: float, draws: np.random.Generator) -> dict[str, Any]:
    def near(value: float, noise: float) -> float:
        return float(value + noise * draws.normal())

    accuracy = near(0.3 + 0.35 * progress, 0.05)
    form = min(1.0, max(0.0, near(0.2 + 0.8 * min(1.0, 3 * progress), 0.04)))
    length = near(90 + 160 * progress, 12)
    spans = {"rollout": near(1.2 + 0.7 * progress, 0.05), "reward": 0.02}
    spans |= {"update/forward": near(0.3, 0.02), "update/backward": near(0.5, 0.03)}
    step_time = sum(spans.values()) + near(0.12, 0.01) + (4.0 if step == 1 else 0.0)
    spans["rollout/generate"] = 0.8 * spans["rollout"]
    return {
        "step": step, "epoch": 2 * progress, "loss": near(0, 0.01), "grad_norm": abs(near(0.6, 0.15)),
        "learning_rate": 1e-6 * (1 - progress), "step_time": step_time, "num_tokens": 64 * 300 * step,
        "tokens_per_second": 64 * length / step_time, "reward": accuracy + form, "reward_std": 0.4,
        "frac_reward_zero_std": min(1.0, abs(near(0.1 + 0.25 * progress, 0.05))),
        "rewards/accuracy/mean": accuracy, "rewards/accuracy/std": 0.4, "rewards/format/mean": form,
        "rewards/format/std": 0.2, "entropy": near(1.6 - 0.9 * progress, 0.05), "kl": abs(near(0.05 * progress, 0.003)),
        "completions/mean_length": length, "completions/min_length": 0.4 * length,
        "completions/max_length": 2.2 * length,
        "completions/clipped_ratio": abs(near(0.08 * (1 - progress), 0.01)), "skipped_rows": step // 50,
        "reflection_rate": min(1.0, abs(near(0.04 + 0.4 * progress**2, 0.02))),
        "reflections_per_1k_tokens": abs(near(0.4 + 3 * progress**2, 0.2)),
        "self_correction/wrong_to_right": abs(near(0.01 + 0.05 * progress, 0.005)),
        "self_correction/right_to_wrong": abs(near(0.02, 0.005)),
        "sampling/sampling_logp_difference/mean": abs(near(0.003, 0.0005)),
        **{f"time/{name}": seconds for name, seconds in spans.items()},
    }  # fmt: skip


def completion_table(step: int, progress: float, draws: np.random.Generator, repeat_rows: bool) -> pa.Table:
    rows = []
    for group in range(4):
        row_id = group if repeat_rows else 4 * step + group
        task = list(TASKS)[group]
        for index in range(8):
            right = draws.random() < 0.3 + 0.4 * progress
            text = completion(draws, progress, right)
            formed = float(text.endswith("</answer>"))
            rows.append({
                "step": step, "row_id": row_id, "index": index, "prompt": prompt(row_id, task), "completion": text,
                "finish_reason": "stop" if formed else "length", "length": len(text) // 4,
                "advantage": float(draws.normal()), "reward": formed + right, "rewards/accuracy": float(right),
                "rewards/format": formed, "task": task, "solution": "blue",
                "thumbnail": thumbnail(row_id) if index == 0 else None,
            })  # fmt: skip
    return pa.Table.from_pylist(rows)


def evaluation(name: str, step: int, figures: dict[str, Any], draws: np.random.Generator) -> dict[str, Any]:
    after = name == "after"
    rate = figures[f"answered_rate_{name}"]
    return {
        "name": name, "step": step, "dataset": "CV-Bench", "num_questions": 2638,
        "accuracy": figures[f"accuracy_{name}"], "accuracy_strict": figures[f"accuracy_strict_{name}"],
        "unreadable_rate": figures[f"unreadable_rate_{name}"], "answered_rate": rate,
        "answered_accuracy": figures[f"answered_accuracy_{name}"], "chance": figures["chance"],
        "accuracy_by_task": {
            task: {
                "count": 650, "accuracy": row[name], "accuracy_strict": row[name],
                "answered_accuracy": min(1.0, row[name] / rate),
                "answered_rate": rate, "chance": row["chance"],
            }
            for task, row in figures["accuracy_by_task"].items()
        },
        "mean_length": figures[f"mean_length_{name}"], "reflection_rate": 0.4 if after else 0.05,
        "pass_at_k": None if after else {
            "k": 8, "value": figures["pass_at_8_before"], "chance": figures["pass_at_8_chance"],
        },
        "answered_accuracy_shuffled_images": figures["answered_accuracy_shuffled_images"] if after else None,
    }  # fmt: skip


def evaluation_table(name: str, draws: np.random.Generator) -> pa.Table:
    rows = []
    for row_id in range(40):
        task = list(TASKS)[row_id % 4]
        right = bool(draws.random() < (0.6 if name == "after" else 0.3))
        text = completion(draws, 1.0 if name == "after" else 0.1, right)
        answered = text.endswith("</answer>")
        rows.append({
            "row_id": row_id, "task": task, "prompt": prompt(row_id, task), "solution": "blue", "completion": text,
            "answer": ("blue" if right else "red") if answered else None, "answered": answered,
            "correct": right and answered, "length": len(text) // 4, "reflections": text.count("Wait"),
            "correction": "wrong to right" if right and row_id % 8 == 0 else None,
            "thumbnail": thumbnail(1000 + row_id),
        })  # fmt: skip
    return pa.Table.from_pylist(rows)


def fake_figures(seed: int, **changed: Any) -> dict[str, Any]:
    draws = np.random.default_rng(100 + seed)
    shift = float(0.02 * draws.normal())
    return {
        "accuracy_before": 0.3138, "accuracy_after": round(0.5947 + shift, 4),
        "accuracy_strict_before": 0.2409, "accuracy_strict_after": round(0.5866 + shift, 4),
        "unreadable_rate_before": 0.0822, "unreadable_rate_after": 0.0113,
        "answered_rate_before": 0.52, "answered_rate_after": 0.98,
        "answered_accuracy_before": 0.4615, "answered_accuracy_after": round(0.6068 + shift, 4),
        "answered_accuracy_shuffled_images": round(0.4712 + shift / 2, 4), "chance": 0.4375, "pass_at_8_before": 0.8721,
        "pass_at_8_chance": 0.9724,
        "accuracy_by_task": {
            task: {
                "before": before, "after": round(after + float(0.02 * draws.normal()), 4),
                "chance": chance, "count": 650,
            }
            for (task, chance), before, after in zip(
                TASKS.items(), (0.5469, 0.2246, 0.0016, 0.3166), (0.5964, 0.6676, 0.5416, 0.5666), strict=True
            )
        },
        "mean_length_before": 96.4, "mean_length_after": 251.8, "wall_s": 3421.0 + 40 * seed,
        "tokens_per_s": 6120.5 + 55 * seed, "seed": seed,
        "environment": {
            "date": "2026-11-26 03:50 UTC", "commit": "abc1234", "hardware": "EPYC, 2 threads", "python": "3.11.7",
            "torch": "2.13.0",
        }, **changed,
    }  # fmt: skip


def write_fake_run(folder: Path, *, steps: int = 60, seed: int = 0, repeat_rows: bool = True, **changed: Any) -> Path:
    """Writes a run folder. `changed` replaces figures of the summary and the evaluations."""
    draws = np.random.default_rng(seed)
    figures = {**fake_figures(seed, **changed), "steps": steps}
    for name in ("completions", "evals"):
        (folder / name).mkdir(parents=True)
    config = {
        "model_name_or_path": "Qwen/Qwen2-VL-2B", "dataset_name": "array/SAT", "seed": seed, "beta": 0.04,
        "num_generations": 8, "max_completion_length": 700, "reward_funcs": ["accuracy", "format"],
        "output_dir": str(folder), "model_init_kwargs": {"dtype": "bfloat16"},
    }  # fmt: skip
    (folder / "settings.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2_vl"}))
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            progress = step / steps
            file.write(json.dumps(metrics_line(step, progress, draws)) + "\n")
            if step == 1 or step % 10 == 0 or step == steps:
                table = completion_table(step, progress, draws, repeat_rows)
                pq.write_table(table, folder / "completions" / f"completions_{step:05d}.parquet")
    for name, step in (("before", 0), ("after", steps)):
        (folder / "evals" / f"{name}.json").write_text(json.dumps(evaluation(name, step, figures, draws)))
        pq.write_table(evaluation_table(name, draws), folder / "evals" / f"{name}.parquet")
    (folder / "summary.json").write_text(json.dumps(figures))
    return folder


@pytest.fixture
def fake_run(tmp_path: Path) -> Callable[..., Path]:
    """fake_run(name, **options) writes `tmp_path/name` and returns it; options as of `write_fake_run`."""

    def write(name: str = "run", **options: Any) -> Path:
        return write_fake_run(tmp_path / name, **options)

    return write


@pytest.fixture
def fake_lab(tmp_path: Path) -> Callable[..., Path]:
    """fake_lab({arm: options of each of its runs}, seeds, claims) writes `tmp_path/lab` and returns it."""

    def write(arms: dict[str, dict[str, Any]], seeds: tuple[int, ...] = (0, 1, 2), claims: Any = ()) -> Path:
        return write_fake_lab(tmp_path / "lab", arms, seeds, claims)

    return write


def write_fake_lab(folder: Path, arms: dict[str, dict[str, Any]], seeds: tuple[int, ...], claims: Any) -> Path:
    """Writes a lab's folder; with the option `command`, an arm of that program."""
    folder.mkdir(parents=True)
    told = [
        {"name": name, "about": f"what {name} is", "command": one.pop("command", "train")} for name, one in arms.items()
    ]
    content = {"title": "A lab", "arms": told, "seeds": seeds, "claims": claims}
    (folder / "lab.json").write_text(json.dumps(content))
    for name, options in arms.items():
        for seed in seeds:
            write_fake_run(folder / name / f"seed-{seed}", seed=seed, **options)
    return folder
