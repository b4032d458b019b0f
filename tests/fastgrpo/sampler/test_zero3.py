import os
import subprocess
import sys
from pathlib import Path


def test_ranks_draw_from_a_partitioned_policy_without_waiting_for_each_other(tmp_path: Path) -> None:
    """As from a whole one: the sync gathers, and nothing between two syncs does."""
    script = Path(__file__).with_name("zero3_rollout.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    command.append(str(tmp_path))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "LOCAL_SIZE": "2"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=300)
    # gloo now and then aborts at tear-down, when all is done.
    assert {path.name for path in tmp_path.iterdir()} == {"rank0", "rank1"}, result.stderr[-4000:]
