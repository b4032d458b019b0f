"""Scripts written for TRL in `examples/`: each runs with `trl` changed to `fastgrpo` in its imports, and nothing else.

That TRL 1.16 runs them as they are is checked where the environment of the comparisons is installed.
"""

import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

pytest.importorskip("datasets")

EXAMPLES = Path(__file__).parent / "examples"
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py"))
TRLS_PYTHON = Path(__file__).parents[3] / ".venv-bench" / "bin" / "python"
UNDER_TRL = """
import fastgrpo.profile.sides.trl_on_cpu
import runpy, sys
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""TRL's environment on a CPU needs the first line."""
SETTINGS = """
per_device_train_batch_size: 4
per_device_eval_batch_size: 4
num_generations: 4
max_completion_length: 8
learning_rate: 1.0e-3
max_steps: 2
logging_steps: 1
eval_strategy: steps
eval_steps: 2
use_peft: true
lora_r: 2
lora_target_modules: [q_proj, v_proj]
use_cpu: true
bf16: false
report_to: none
"""


@pytest.fixture
def arguments(text_model: Path, tiny_model_dir: Path, reward_model: Path, tmp_path: Path) -> Any:
    """A script's command line."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"Row {i} is", "length": i}) + "\n" for i in range(2)))
    more = {"text_reward_model": [str(reward_model)], "streaming": [str(rows)]}
    settings = tmp_path / "settings.yaml"
    settings.write_text(SETTINGS)

    def of(name: str) -> list[str]:
        if name == "program":
            own = ["--model_name_or_path", text_model, "--dataset_name", rows, "--output_dir", tmp_path / "run"]
            return ["--config", str(settings), *map(str, own)]
        model = tiny_model_dir if name.startswith("vision") else text_model
        return [str(model), str(tmp_path / "run"), *more.get(name, [])]

    return of


def run(name: str, arguments: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The script's variables when it has run with its imports changed."""
    lines = (EXAMPLES / f"{name}.py").read_text().splitlines()
    ours = [line.replace("from trl", "from fastgrpo", 1) if line.startswith("from trl") else line for line in lines]
    assert 1 <= sum(a != b for a, b in zip(lines, ours, strict=True)) <= 2
    script = folder / f"{name}.py"
    script.write_text("\n".join(ours))
    monkeypatch.setattr(sys, "argv", [str(script), *arguments])
    return runpy.run_path(str(script))


def test_the_examples_are_these() -> None:
    assert NAMES == ["gspo", "program", "streaming", "text_function", "text_reward_model", "vision", "vision_lora"]


@pytest.mark.parametrize("name", NAMES)
def test_a_script_for_trl_runs_with_its_imports_changed(
    name: str, arguments: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = run(name, arguments(name), tmp_path, monkeypatch)["trainer"]
    steps = [line for line in trainer.state.log_history if "loss" in line]
    assert len(steps) == trainer.args.max_steps
    assert all(line["grad_norm"] > 0 for line in steps)
    assert (tmp_path / "run" / "report.html").is_file()
    if name == "text_reward_model":
        evaluated = next(line for line in trainer.state.log_history if "eval_reward" in line)
        assert {"eval_loss", "eval_kl", "eval_rewards/tiny-judge/mean"} <= set(evaluated)
        assert steps[0]["tokens"] == 4 * steps[0]["completions/mean_length"]
    if name == "text_function":
        with safe_open(tmp_path / "run" / "model.safetensors", "pt") as saved:
            assert "lm_head.weight" in saved.keys()  # noqa: SIM118
    if name in ("program", "vision_lora"):
        assert (tmp_path / "run" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.skipif(not TRLS_PYTHON.is_file(), reason="needs .venv-bench: make install-bench")
@pytest.mark.parametrize("name", NAMES)
def test_trl_runs_the_script_as_it_is(name: str, arguments: Any) -> None:
    command = [str(TRLS_PYTHON), "-c", UNDER_TRL, str(EXAMPLES / f"{name}.py"), *arguments(name)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
