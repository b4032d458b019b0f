"""Two ranks with uneven groups, under DDP and ZeRO 1 to 3, take the steps of one process that has all of them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fastgrpo.model.load import load_policy

SCRIPT = Path(__file__).with_name("packed_ranks_run.py")
FLOAT32 = ("ddp", "zero1", "zero2", "zero3")
FROZEN = ("ddp-frozen", "zero2-frozen", "zero3-frozen")
BFLOAT16 = ("zero2-bf16", "zero3-bf16")
Found = dict[str, dict[str, Tensor]]


def run(launcher: list[str], *arguments: str) -> None:
    root = SCRIPT.parents[3]
    paths = [str(root), str(root / "kernels"), str(root / "profiling"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    environment |= {"DS_ACCELERATOR": "cpu", "LOCAL_SIZE": "2"}
    command = [sys.executable, *launcher, str(SCRIPT), *arguments]
    # Generous, since DeepSpeed compiles its collectives once per machine; a hang would last for ever.
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=600)
    # gloo now and then aborts at tear-down, when all is written.
    assert (Path(arguments[1]) / f"{arguments[-1]}.safetensors").exists(), result.stderr[-3000:]


@pytest.fixture(scope="module")
def found(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Found:
    """The first step's gradients and the last parameters, by scenario."""
    out = tmp_path_factory.mktemp("ranks")
    run([], str(tiny_model_dir), str(out), "single", "single-frozen")
    scenarios = (*FLOAT32, *FROZEN, *BFLOAT16)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run(launcher, str(tiny_model_dir), str(out), *scenarios)
    start = {f"start.{name}": p.detach() for name, p in load_policy(str(tiny_model_dir)).named_parameters()}
    names = ("single", "single-frozen", *scenarios)
    return {"start": start} | {name: load_file(out / f"{name}.safetensors") for name in names}


def gradient_norm(gradients: dict[str, Tensor]) -> float:
    return max(value.norm().item() for name, value in gradients.items() if name.startswith("gradient."))


def update_error(found: Found, scenario: str) -> float:
    """‖θ − θ of one process‖ / ‖θ of one process − θ at the start‖, all parameters together."""
    single, ours, start = found[single_of(scenario)], found[scenario], found["start"]
    names = [name.removeprefix("start.") for name in start]
    off = torch.stack([(ours[f"end.{name}"] - single[f"end.{name}"]).norm() for name in names]).norm()
    moved = torch.stack([(single[f"end.{name}"] - start[f"start.{name}"]).norm() for name in names]).norm()
    return (off / moved).item()


def single_of(scenario: str) -> str:
    """What one process did on the same model."""
    return "single-frozen" if scenario in FROZEN else "single"


@pytest.mark.parametrize("scenario", [*FLOAT32, *FROZEN])
def test_gathered_gradients_and_parameters_in_float32(found: Found, scenario: str) -> None:
    """With a frozen vision tower, its features kept, too."""
    single, ours = found[single_of(scenario)], found[scenario]
    assert ours.keys() == single.keys()
    least = 1e-3 * gradient_norm(single)
    for name in (name for name in single if name.startswith("gradient.")):
        error = (ours[name] - single[name]).norm().item()
        assert error <= 1e-5 * max(single[name].norm().item(), least), name
    assert update_error(found, scenario) <= 1e-5


@pytest.mark.parametrize("scenario", BFLOAT16)
def test_parameters_in_bfloat16(found: Found, scenario: str) -> None:
    """bf16 weights in the forward pass, float32 master weights; 8 bits of mantissa are 0.4 % of each product."""
    assert update_error(found, scenario) <= 0.05


def test_the_two_ranks_had_something_to_disagree_on(found: Found) -> None:
    assert gradient_norm(found["single"]) > 0.1
    visual = [name for name in found["single"] if name.startswith("gradient.model.visual")]
    assert all(found["single"][name].norm() > 0 for name in visual)
