"""DeepSpeed on two CPU ranks: the steps of one process, checkpoints that come back, a sampler in step."""

import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen2VLForConditionalGeneration

from fastgrpo.config import GRPOConfig
from fastgrpo.data.loading import load_rows
from fastgrpo.plain.engine import vision_inputs
from fastgrpo.training.trainer import GRPOTrainer

SCRIPT = Path(__file__).with_name("deepspeed_run.py")
SCRIPTED = ("scripted-zero2-fast", "scripted-zero3-fast", "scripted-zero2-reference")
# DDP first: once a process has used DeepSpeed, its later runs do.
RUNS = (
    "whole-ddp", *SCRIPTED, "lora-zero3", "whole-zero3", "resumed-zero3-zero3", "resumed-zero2-zero3",
    "short-zero2_offload", "short-zero3_offload", "scheduled-zero2-ddp", "idle-zero2",
)  # fmt: skip
FIGURES = ("loss", "grad_norm", "learning_rate", "entropy", "reward")


def run(model: Path, data: Path, out: Path, *names: str) -> str:
    """What two ranks print; their last run must have ended."""
    root = SCRIPT.parents[3]
    paths = [str(root), str(root / "kernels"), str(root / "profiling"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    environment |= {"DS_ACCELERATOR": "cpu", "LOCAL_SIZE": "2"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, str(SCRIPT), str(model), str(data), str(out), *names]
    # Generous, since DeepSpeed compiles its collectives once per machine; a hang would last for ever.
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=600)
    # gloo now and then aborts at tear-down, when all is written.
    assert (out / names[-1] / "metrics.jsonl").exists(), result.stderr[-3000:]
    return result.stderr


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        return runpy.run_path(str(SCRIPT))
    finally:
        sys.path.pop(0)


@pytest.fixture(scope="module")
def finished(tiny_model_dir: Path, sat_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of all runs, and what they printed."""
    out = tmp_path_factory.mktemp("deepspeed")
    return out, run(tiny_model_dir, sat_file, out, *RUNS)


@pytest.fixture
def out(finished: tuple[Path, str]) -> Path:
    return finished[0]


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def figures(step: dict[str, Any]) -> dict[str, Any]:
    return {name: step[name] for name in FIGURES}


def assert_same_weights(found: Path, expected: Path) -> None:
    ours, theirs = load_file(found / "model.safetensors"), load_file(expected / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


@pytest.fixture(scope="module")
def alone(script: dict[str, Any], tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process that has all rows."""
    folder: Path = tmp_path_factory.mktemp("alone")
    script["scripted"](str(tiny_model_dir), folder, "ddp", "fast", ranks=1)
    return folder


@pytest.mark.parametrize("name", SCRIPTED)
def test_uneven_rows_and_a_rank_without_any(out: Path, alone: Path, tiny_model_dir: Path, name: str) -> None:
    start = load_file(tiny_model_dir / "model.safetensors")
    one, two = load_file(alone / "model.safetensors"), load_file(out / name / "model.safetensors")
    for key, value in one.items():
        difference, update = (two[key] - value).abs().max(), (start[key] - value).abs().max()
        assert difference < 1e-6, key
        assert difference < 0.01 * update, key
    for ours, theirs in zip(metrics_of(out / name), metrics_of(alone), strict=True):
        assert ours["skipped_rows"] == theirs["skipped_rows"]
        for figure in ("loss", "grad_norm", "entropy", "kl"):
            assert ours[figure] == pytest.approx(theirs[figure], rel=1e-4, abs=1e-6), (figure, theirs["step"])


def test_adapters_under_zero_3_train_as_in_one_process(
    out: Path, script: dict[str, Any], tiny_model_dir: Path, tmp_path: Path
) -> None:
    """Their reference is the model with them off; the merger is saved whole."""
    script["scripted"](str(tiny_model_dir), tmp_path, "ddp", "fast", ranks=1, adapters=script["ADAPTERS"])
    one, two = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path, out / "lora-zero3"))
    assert one.keys() == two.keys()
    assert any("merger" in name for name in one)
    for name, value in one.items():
        assert (two[name] - value).abs().max() < 1e-6, name
        assert "lora_B" not in name or value.any(), f"{name} has not moved"
    for ours, theirs in zip(metrics_of(out / "lora-zero3"), metrics_of(tmp_path), strict=True):
        for figure in ("loss", "grad_norm", "entropy", "kl"):
            assert ours[figure] == pytest.approx(theirs[figure], rel=1e-4, abs=1e-6), (figure, theirs["step"])


def test_adam_under_zero_3_steps_as_under_ddp(out: Path) -> None:
    zero, ddp = metrics_of(out / "whole-zero3"), metrics_of(out / "whole-ddp")
    assert [step["step"] for step in zero] == [1, 2, 3, 4]
    for ours, theirs in zip(zero, ddp, strict=True):
        assert figures(ours) == pytest.approx(figures(theirs), rel=1e-4, abs=1e-6)
        assert ours["grad_norm"] > 0.1


def test_the_same_stage_resumes_the_same_run(out: Path) -> None:
    whole, resumed = metrics_of(out / "whole-zero3"), metrics_of(out / "resumed-zero3-zero3")
    assert [figures(step) for step in resumed] == [figures(step) for step in whole[2:]]
    for weights in ("checkpoint-4", "checkpoint-4/reference"):
        assert_same_weights(out / "resumed-zero3-zero3" / weights, out / "whole-zero3" / weights)


def test_another_stage_goes_on_with_a_fresh_optimizer(finished: tuple[Path, str]) -> None:
    out, printed = finished
    whole, resumed = metrics_of(out / "whole-zero3"), metrics_of(out / "resumed-zero2-zero3")
    assert [step["step"] for step in resumed] == [3, 4]
    assert figures(resumed[0]) == pytest.approx(figures(whole[2]), rel=1e-5), "the same weights, rows and rate"
    assert resumed[1]["learning_rate"] == whole[3]["learning_rate"]
    assert resumed[1]["loss"] != pytest.approx(whole[3]["loss"], rel=1e-3), "Adam's moments were not carried over"
    said = "was saved under ZeRO stage 3 on 2 ranks, this run is under ZeRO stage 2 on 2 ranks"
    assert printed.count(said) == 1
    assert "the optimizer's moments start anew" in printed


def test_a_schedule_of_deepspeeds_own_starts_anew_and_says_so(finished: tuple[Path, str]) -> None:
    out, printed = finished
    first, second = metrics_of(out / "scheduled-zero2-ddp")
    assert [first["step"], second["step"]] == [3, 4]
    assert first["learning_rate"] == 0.0 < second["learning_rate"]
    assert "under no DeepSpeed, this run is under ZeRO stage 2 on 2 ranks: weights and step go on, schedule" in printed


def test_a_step_without_gradients_has_no_norm(out: Path) -> None:
    """DeepSpeed itself would say that of the step before."""
    first, second, third = (step["grad_norm"] for step in metrics_of(out / "idle-zero2"))
    assert second == 0.0
    assert min(first, third) > 0.1


def trainer_alone(model: Path, data: Path, out: Path) -> GRPOTrainer:
    config = GRPOConfig(
        output_dir=str(out), use_cpu=True, report_to=[], save_strategy="no", max_steps=3, num_generations=4,
        per_device_train_batch_size=4, max_completion_length=4, learning_rate=0.01, warmup_steps=6,
        lr_scheduler_type="constant_with_warmup", disable_tqdm=True, resume_changed=True,
    )  # fmt: skip
    return GRPOTrainer(str(model), "length", config, load_rows(str(data)))


def test_a_checkpoint_of_zero_3_goes_on_without_deepspeed(
    out: Path, tiny_model_dir: Path, sat_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = out / "whole-zero3" / "checkpoint-2"
    trainer = trainer_alone(tiny_model_dir, sat_file, tmp_path / "run")
    weights, rates = {}, []
    accumulate = trainer.updater.accumulate

    def spy(groups: Any) -> Any:
        weights.update({name: value.clone() for name, value in trainer.model.state_dict().items()})
        rates.extend(group["lr"] for group in trainer.optimizer.param_groups)
        return accumulate(groups)

    trainer.updater.accumulate = spy
    trainer.train(resume_from_checkpoint=str(checkpoint))
    expected = Qwen2VLForConditionalGeneration.from_pretrained(checkpoint).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in weights.items())
    (step,) = metrics_of(tmp_path / "run")
    assert step["step"] == 3
    assert step["learning_rate"] == pytest.approx(0.01 * 2 / 6), "the third of a warm-up that starts at 0"
    assert set(rates) == {step["learning_rate"]}, "not only said: the step is taken with it"
    pieces = tmp_path / "pieces"
    shutil.copytree(checkpoint, pieces, ignore=shutil.ignore_patterns("model.safetensors", "manifest.json"))
    with pytest.raises(ValueError, match="holds no whole weights"):
        trainer_alone(tiny_model_dir, sat_file, tmp_path / "run").train(resume_from_checkpoint=str(pieces))


def test_the_sampler_draws_from_what_zero_3_trained(out: Path, script: dict[str, Any], sat_file: Path) -> None:
    checkpoint = out / "whole-zero3" / "checkpoint-4"
    trainer = trainer_alone(checkpoint, sat_file, out / "unused")
    prompt = trainer.data_collator([trainer.train_dataset[script["PROMPT_ROW"]]]).prompts[0]
    model = Qwen2VLForConditionalGeneration.from_pretrained(checkpoint)
    ids = prompt.input_ids[None]
    found = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        **vision_inputs(model, [prompt], ids),
        do_sample=False,
        max_new_tokens=script["GREEDY_TOKENS"],
        suppress_tokens=[model.config.image_token_id, model.config.video_token_id],
    )
    assert json.loads((out / "whole-zero3" / "greedy.json").read_text()) == found[0, ids.shape[1] :].tolist()


def test_the_reference_follows_a_partitioned_policy(out: Path) -> None:
    checkpoint = out / "whole-zero3" / "checkpoint-4"
    assert_same_weights(checkpoint / "reference", checkpoint)


@pytest.mark.parametrize("name", ["short-zero2_offload", "short-zero3_offload"])
def test_offloading_changes_nothing(out: Path, name: str) -> None:
    (step,) = metrics_of(out / name)
    first = metrics_of(out / "whole-ddp")[0]
    assert figures(step) == pytest.approx(figures(first), rel=1e-4, abs=1e-6)


@pytest.mark.slow
def test_offloading_as_shipped(tiny_model_dir: Path, sat_file: Path, tmp_path: Path) -> None:
    """With DeepSpeed's own Adam, which a compiler builds the first time: over a minute."""
    names = ("native-zero2_offload", "native-zero3_offload")
    run(tiny_model_dir, sat_file, tmp_path, *names)
    for name in names:
        assert metrics_of(tmp_path / name)[0]["grad_norm"] > 0.1
