"""The packed update of every tiny family against transformers' own forward pass of each sequence alone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from family_parity import update_errors
from tiny_families import FAMILIES, family


@pytest.mark.parametrize("name", FAMILIES)
def test_logprobs_and_gradients(name: str) -> None:
    logprobs, gradients = update_errors(*family(name))
    assert logprobs < 1e-4
    assert gradients < 1e-5


def test_rollout_and_update_on_ranks(tmp_path: Path) -> None:
    """Under ZeRO 2 and 3, uneven ranks draw the tokens and find the gradients of one process."""
    pytest.importorskip("deepspeed")
    cases = [f"{stage}:{name}" for name in ("Qwen3-VL", "Gemma 3", "Qwen3.5", "InternVL") for stage in (2, 3)]
    root = Path(__file__).parents[3]
    paths = [root, root / "kernels", root / "profiling", root / "bench"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"}
    environment |= {"DS_ACCELERATOR": "cpu", "LOCAL_SIZE": "2"}
    script = str(Path(__file__).with_name("family_ranks_run.py"))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script]
    command += [str(tmp_path), *cases]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=300)
    # gloo now and then aborts at tear-down, when all is done.
    expected = {f"{case}:{rank}" for case in cases for rank in range(2)}
    assert {path.name for path in tmp_path.iterdir()} == expected, result.stderr[-3000:]
