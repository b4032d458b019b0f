"""What a slow reward function costs a training step: called group by group as groups are drawn, and on the whole batch.

    python bench/bench_rewards.py --device cpu

The step is that of `bench_step.py`; all its completions end together, so no decoding hides the wait, only the
reference's forward pass. Steps take turns: a free reward, one that waits 0.3 s for each group and is marked
`per_group`, and the same one unmarked.
"""

import json
import subprocess
import sys
import time
from statistics import median
from typing import Any

from harness import Result, parser, print_table
from smooth_reward import vowels
from step_setup import AGAINST_TRL, prepared, training_flags
from timing import paired_ratio, spread

from fastgrpo.rewards import per_group

SECONDS = 0.3
SIDES = ("free", "per_group", "whole_batch")
"""Step i is the turn of side i modulo 3."""


def judged(side: str, completions: list[Any], trainer_state: Any) -> list[float]:
    """The vowels' share; in its side's turn, after a wait."""
    if SIDES[trainer_state.global_step % len(SIDES)] == side:
        time.sleep(SECONDS * len(completions) / AGAINST_TRL.group)
    return vowels(completions)


@per_group
def early(completions: list[Any], trainer_state: Any, **_: Any) -> list[float]:
    return judged("per_group", completions, trainer_state)


def late(completions: list[Any], trainer_state: Any, **_: Any) -> list[float]:
    return judged("whole_batch", completions, trainer_state)


def main() -> int:
    arguments = parser(__doc__ or "")
    arguments.add_argument("--rounds", type=int, default=5, help="timed steps of each side")
    options = arguments.parse_args()
    result, steps = Result("bench_rewards", options.device), len(SIDES) * (options.rounds + 1)
    rows = AGAINST_TRL.prompts * (steps + 1)
    with prepared(AGAINST_TRL, options.device, rows=rows) as folder:
        flags = [*training_flags(folder, steps), "--output_dir", str(folder / "run"), "--report_to", "none"]
        rewards = ["--reward_funcs", "bench_rewards:early", "bench_rewards:late"]
        subprocess.run([sys.executable, "-m", "fastgrpo", "train", *flags, *rewards], check=True)
        written = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    lines = [json.loads(line) for line in written[len(SIDES) :]]
    times = {side: [line["step_time"] for line in lines[i :: len(SIDES)]] for i, side in enumerate(SIDES)}
    result.checks["same rewards"] = all(line["rewards/early/mean"] == line["rewards/late/mean"] for line in lines)
    result.ratios["time_vs_whole_batch"] = paired_ratio(times["whole_batch"], times["per_group"])
    result.ratios["time_vs_free"] = paired_ratio(times["free"], times["per_group"])
    seconds = {side: median(one) for side, one in times.items()}
    waits = {side: median(line["time/reward"] for line in lines[i :: len(SIDES)]) for i, side in enumerate(SIDES)}
    cost = {side: wait / seconds["free"] for side, wait in waits.items()}
    result.figures |= {"seconds": seconds, "wait_of_a_group": SECONDS, "waits": waits, "wait_per_free_step": cost}
    table = [[side, seconds[side], spread(times[side]), waits[side], cost[side]] for side in SIDES]
    print_table("A step", ("reward", "seconds", "spread", "of them waiting", "÷ a free step"), table)
    return result.finish(options.out)


if __name__ == "__main__":
    sys.exit(main())
