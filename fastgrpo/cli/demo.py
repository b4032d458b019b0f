"""`fastgrpo demo`: trains a tiny model on this machine."""

from collections.abc import Sequence
from pathlib import Path

from fastgrpo.cli.options import Parser, at_least


def run(argv: Sequence[str]) -> None:
    """Runs the demo as the flags say."""
    parser = Parser(prog="fastgrpo demo", description="Trains a tiny Qwen2-VL on spatial questions, on a CPU.")
    parser.add_argument("--seed", type=at_least(0), default=0)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/demo"))
    parser.add_argument("--steps", type=at_least(1), help="optimizer steps; 200 if unset")
    options = parser.parse_args(argv)

    from fastgrpo.cli.quiet import quieten
    from fastgrpo.demo.run import DEMO_STEPS, run_demo

    quieten()
    run_demo(options.output_dir, seed=options.seed, steps=options.steps or DEMO_STEPS)
