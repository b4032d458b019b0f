"""summary.json and report.html, from the files of a run."""

import json
from pathlib import Path

from fastgrpo.evaluation.summary import RunSummary
from fastgrpo.report.finish import finish_run


def write_run(folder: Path) -> None:
    (folder / "evals").mkdir(parents=True)
    steps = [
        {"step": 1, "step_time": 2.0, "tokens_per_second": 100.0},
        {"step": 2, "step_time": 1.0, "tokens_per_second": 250.0},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    tasks = {"Count": (0.1, 0.5, 0.25, 6), "Depth": (0.4, 0.9, 0.5, 4)}
    for name, place in (("before", 0), ("after", 1)):
        figures = {
            "accuracy": [0.2, 0.7][place],
            "accuracy_strict": [0.1, 0.6][place],
            "unreadable_rate": [0.3, 0.05][place],
            "answered_accuracy": [0.5, 0.8][place],
            "answered_rate": [0.4, 0.9][place],
            "answered_accuracy_shuffled_images": [None, 0.45][place],
            "chance": 0.35,
            "num_questions": 10,
            "mean_length": [12.5, 30.0][place],
            "reflection_rate": [0.0, 0.1][place],
            "pass_at_k": [{"k": 8, "value": 0.75, "chance": 0.9}, None][place],
            "accuracy_by_task": {
                task: {"accuracy": values[place], "accuracy_strict": 0.0, "chance": values[2], "count": values[3]}
                for task, values in tasks.items()
            },
        }
        (folder / "evals" / f"{name}.json").write_text(json.dumps(figures))


def test_figures_of_a_summary(tmp_path: Path) -> None:
    write_run(tmp_path)
    found = finish_run(tmp_path, seed=5, wall_s=10.0)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary == found.to_json()
    assert RunSummary.read(summary) == found
    assert "<html" in (tmp_path / "report.html").read_text()
    assert {"date", "commit", "hardware", "python", "torch", "transformers"} <= summary.pop("environment").keys()
    del summary["torch"]
    assert summary == {
        "accuracy_before": 0.2,
        "accuracy_after": 0.7,
        "accuracy_strict_before": 0.1,
        "accuracy_strict_after": 0.6,
        "unreadable_rate_before": 0.3,
        "unreadable_rate_after": 0.05,
        "answered_accuracy_before": 0.5,
        "answered_accuracy_after": 0.8,
        "answered_rate_before": 0.4,
        "answered_rate_after": 0.9,
        "answered_accuracy_shuffled_images": 0.45,
        "chance": 0.35,
        "answered_rate_shuffled_images": None,
        "pass_at_8_before": 0.75,
        "pass_at_8_chance": 0.9,
        "accuracy_by_task": {
            "Count": {"before": 0.1, "after": 0.5, "chance": 0.25, "count": 6},
            "Depth": {"before": 0.4, "after": 0.9, "chance": 0.5, "count": 4},
        },
        "mean_length_before": 12.5,
        "mean_length_after": 30.0,
        "reflection_rate_before": 0.0,
        "reflection_rate_after": 0.1,
        "num_questions": 10,
        "steps": 2,
        "wall_s": 10.0,
        "train_s": 3.0,
        "tokens_per_s": 150.0,  # 200 and 250 tokens in 3 s
        "seed": 5,
    }


def test_summary_of_a_run_without_scores(tmp_path: Path) -> None:
    write_run(tmp_path)
    for path in (tmp_path / "evals").iterdir():
        path.unlink()
    summary = finish_run(tmp_path, seed=0, wall_s=1.0)
    assert (summary.accuracy_before, summary.accuracy_after, summary.by_task) == (None, None, {})
    assert "pass_at_8_before" not in summary.to_json()
    assert (summary.steps, summary.tokens_per_s) == (2, 150.0)
