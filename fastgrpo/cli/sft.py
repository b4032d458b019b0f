"""`fastgrpo sft`: the same run as `fastgrpo train`, by imitating the data's answers."""

from collections.abc import Sequence

from fastgrpo.cli.arguments import parse_sft
from fastgrpo.cli.assembly import build_sft_trainer
from fastgrpo.cli.launch import launch
from fastgrpo.cli.quiet import quieten
from fastgrpo.cli.train import resumable, run_training
from fastgrpo.cli.train_help import SFT, asked_for_help


def run(argv: Sequence[str]) -> None:
    """Trains as the flags say."""
    if asked_for_help(argv, SFT) or launch("sft", argv):
        return
    quieten()
    config, script = parse_sft(argv)
    resumable(config, lambda: run_training(config, script, build_sft_trainer))
