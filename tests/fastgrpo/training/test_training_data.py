"""Rows, good and bad, as users hand them over."""

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from run_files import changed, completions_of, metrics_of, parameters
from transformers import TrainerCallback

datasets = pytest.importorskip("datasets")


def test_corrupt_rows_are_left_out_and_counted(build: Any, sat_file: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = pq.read_table(sat_file).slice(0, 8).to_pylist()
    for index in (1, 4, 5):
        rows[index]["image_bytes"] = [b"no picture"]
    trainer = build(train_dataset=rows, shuffle_dataset=False, max_steps=4, optim="sgd")
    before = {}

    class Watch(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            before[state.global_step + 1] = parameters(trainer)

    trainer.add_callback(Watch())
    trainer.train()
    steps = metrics_of(trainer.args.output_dir)
    assert [step["skipped_rows"] for step in steps] == [1, 1, 3, 3]
    assert {row["row_id"] for row in completions_of(trainer.args.output_dir, 1)} == {0}
    assert steps[2]["loss"] == steps[2]["grad_norm"] == 0.0, "both rows of the third step were bad"
    assert "reward" not in steps[2]
    assert all(torch.equal(before[3][name], value) for name, value in before[4].items())
    assert not all(torch.equal(before[1][name], value) for name, value in before[2].items())
    assert {row["row_id"] for row in completions_of(trainer.args.output_dir, 4)} == {6, 7}


def test_nothing_but_corrupt_rows(build: Any, sat_file: Path) -> None:
    rows = pq.read_table(sat_file).slice(0, 8).to_pylist()
    for row in rows:
        row["image_bytes"] = [b"no picture"]
    with pytest.raises(ValueError, match=r"none of the 8 rows can be used; row 0: .*image"):
        build(train_dataset=rows)


def test_a_data_set_smaller_than_a_rollout(build: Any, sat_file: Path) -> None:
    trainer = build(train_dataset=pq.read_table(sat_file).slice(0, 1).to_pylist())
    with pytest.raises(ValueError, match="1 rows, but one rollout takes 2 prompts"):
        trainer.train()


def test_conversations_with_and_without_pictures(build: Any) -> None:
    def ask(text: str) -> list[dict[str, str]]:
        return [{"role": "system", "content": "Be brief."}, {"role": "user", "content": text}]

    picture = Image.new("RGB", (84, 56), "blue")
    rows = datasets.Dataset.from_dict(
        {
            "prompt": [ask("What colour?"), ask("Two and two?"), ask("Blue or red?"), ask("Why?")],
            "image": [picture, None, picture, None],
            "solution": ["blue", "4", "blue", "so"],
        },
        features=datasets.Features(
            {
                "prompt": [{"role": datasets.Value("string"), "content": datasets.Value("string")}],
                "image": datasets.Image(),
                "solution": datasets.Value("string"),
            }
        ),
    )
    seen: list[dict[str, Any]] = []

    def judge(prompts: Any, completions: Any, solution: list[str], **columns: Any) -> list[float]:
        seen.append({"prompts": prompts, "completions": completions, "solution": solution, **columns})
        return [float(len(completion[0]["content"])) for completion in completions]

    trainer = build(judge, train_dataset=rows, max_steps=2, beta=0.04, shuffle_dataset=False)
    before = parameters(trainer)
    trainer.train()
    assert changed(before, trainer) == set(before)
    assert [call["solution"] for call in seen] == [["blue"] * 4 + ["4"] * 4, ["blue"] * 4 + ["so"] * 4]
    user = seen[0]["prompts"][0][-1]["content"]
    assert user == [{"type": "image", "image": seen[0]["image"][0]}, {"type": "text", "text": "What colour?"}]
    assert seen[0]["prompts"][4][-1]["content"] == "Two and two?"
    assert all([message["role"] for message in completion] == ["assistant"] for completion in seen[0]["completions"])
    prompts = [row["prompt"] for row in completions_of(trainer.args.output_dir, 1)]
    assert prompts[0].startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n<|vision_start|>")
    assert prompts[0].endswith("<|im_end|>\n<|im_start|>assistant\n")
