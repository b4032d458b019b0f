"""The update's forward and backward pass: packed groups that share their prompts, against the naive padded batch.

Naive has TRL's shape: each completion in a row of its own behind its whole prompt, padded to the longest, the vision
tower once per row, log-probs of the completion alone. It is `PlainUpdater`; ours is `PackedUpdater`; timed is the
whole of `accumulate`: loss, metrics and gradients. Same dtype, threads and model; no checkpointing on either side.

On CPU the model is a Qwen2-VL of 3.6 M parameters in float32, on CUDA one of Qwen2-VL-2B's shape in bfloat16.
"""

import sys
from functools import partial
from statistics import median
from typing import Any, NamedTuple

from fastgrpo_kernels import LossParams
from harness import Result, parser, print_table
from timing import in_fresh_process, paired_ratio, paired_seconds, peak_bytes, spread
from torch import Tensor
from workloads import SMALL, Workload, build_groups, build_model, updates_of

from fastgrpo.plain.updater import PlainUpdater
from fastgrpo.types import TrainingGroup, Updater
from fastgrpo.update.updater import PackedUpdater


class Tolerance(NamedTuple):
    """How far the sides may be apart, relatively."""

    loss: float
    gradient: float


TOLERANCES = {"cpu": Tolerance(1e-5, 1e-5), "cuda": Tolerance(3e-2, 1e-1)}
"""float32; bfloat16, where the sides round in different places."""
COLUMNS = ("workload", "naive s", "packed s", "times faster", "naive MiB", "packed MiB")


def training_model(device: str) -> Any:
    """Of the size that all of a device's workloads have."""
    return build_model(updates_of(device)["full"].model, device).train()


def updaters(model: Any, device: str) -> dict[str, Updater]:
    """The two sides. A micro-batch of the naive one is a group."""
    params = LossParams(epsilon_high=0.28)
    budget = 16_384 if device == "cuda" else 4096
    return {
        "naive": PlainUpdater(model, params, micro_batch_size=8),
        "packed": PackedUpdater(model, params, token_budget=budget),
    }


def gradients_of(model: Any, updater: Updater, groups: list[TrainingGroup]) -> tuple[float, dict[str, Tensor]]:
    """Loss and every parameter's gradient, float32."""
    model.zero_grad()
    loss = updater.accumulate(groups).loss.item()
    return loss, {name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None}


def max_relative_error(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The largest ‖Δg‖ / ‖g‖ of any parameter, ‖g‖ taken as at least 1e-3 of the largest one's."""
    assert ours.keys() == theirs.keys()
    least = 1e-3 * max(gradient.norm().item() for gradient in theirs.values())
    return max((ours[n] - g).norm().item() / max(g.norm().item(), least) for n, g in theirs.items())


def step(model: Any, updater: Updater, groups: list[TrainingGroup], *, keep_gradients: bool = False) -> None:
    """One update; `keep_gradients` zeroes them where they lie rather than freeing them."""
    model.zero_grad(set_to_none=not keep_gradients)
    updater.accumulate(groups)


def measure(
    name: str, workload: Workload, model: Any, device: str, result: Result, *, rounds: int, peaks: bool = True
) -> list[list[Any]]:
    """Checks both sides' loss and gradients on one workload, then times them; the table's row.

    Where they differ nothing is timed, and there is no row.
    """
    sides, limits, groups = updaters(model, device), TOLERANCES[device], build_groups(workload)
    their_loss, theirs = gradients_of(model, sides["naive"], groups)
    our_loss, ours = gradients_of(model, sides["packed"], groups)
    error = max_relative_error(ours, theirs)
    del ours, theirs
    same_loss = abs(our_loss - their_loss) <= limits.loss * (0.1 + abs(their_loss))
    result.figures["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    result.checks |= {f"loss_{name}": same_loss, f"gradients_{name}": error <= limits.gradient}
    result.checks["max_grad_rel_err"] = max(error, result.checks.get("max_grad_rel_err", 0.0))
    if not (same_loss and error <= limits.gradient):
        print(f"Not timed: {name}: losses {our_loss:.6g} and {their_loss:.6g}, gradients {error:.2g} apart")
        return []
    calls = {side: partial(step, model, updater, groups) for side, updater in sides.items()}
    times = paired_seconds(calls, rounds=rounds, device=device)
    ratio = result.ratios[f"time_vs_naive_{name}"] = paired_ratio(times["naive"], times["packed"])
    result.figures[name] = {
        "lengths": workload.lengths,
        "prompts": workload.prompts,
        "prompt_tokens": workload.prompt_tokens,
        **{f"{side}_seconds": median(found) for side, found in times.items()},
        **{f"{side}_spread": spread(found) for side, found in times.items()},
    }
    row = [name, *(median(times[side]) for side in sides), ratio]
    if peaks:
        found = {side: in_fresh_process("--device", device, "--peak", name, side) for side in sides}
        result.ratios[f"memory_vs_naive_{name}"] = found["naive"] / max(found["packed"], 1)
        result.figures[name] |= {f"{side}_peak_bytes": peak for side, peak in found.items()}
        row += [found["naive"] / 2**20, found["packed"] / 2**20]
    return [row]


def peak_of(side: str, workload: Workload, device: str) -> int:
    """Peak bytes of one side's step beyond weights, gradients and inputs."""
    model, groups = training_model(device), build_groups(workload)
    updater = updaters(model, device)[side]
    step(model, updater, build_groups(SMALL.of(2, group=2), 100))  # from here on gradients are there, libraries loaded
    return peak_bytes(partial(step, model, updater, groups, keep_gradients=True), device)


def main() -> int:
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--rounds", type=int, default=7, help="paired timings of each workload")
    arguments.add_argument("--only", nargs="*", help="workloads to run; all by default")
    arguments.add_argument("--peak", nargs=2, metavar=("WORKLOAD", "SIDE"), help="measure one side's memory, alone")
    options = arguments.parse_args()
    device, workloads = options.device, updates_of(options.device)
    if options.peak:
        print(peak_of(options.peak[1], workloads[options.peak[0]], device))
        return 0
    model, result, rows = training_model(device), Result("bench_update", device), []
    for name in options.only or workloads:
        rows += measure(name, workloads[name], model, device, result, rounds=options.rounds)
    parameters = result.figures["parameters"]
    print_table(f"Update, forward + backward, {parameters / 1e6:.1f} M parameters", COLUMNS, rows)
    return result.finish(options.out)


if __name__ == "__main__":
    sys.exit(main())
