"""Builds and starts the sides of a comparison: the same settings, model and data; another engine and updater."""

import copy
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from fastgrpo_profiling.worker import WorkerSide

from fastgrpo.cli.assembly import build_trainer as build_our_trainer
from fastgrpo.cli.assembly import load_training_rows
from fastgrpo.cli.run_arguments import ScriptArguments
from fastgrpo.config import GRPOConfig
from fastgrpo.plain.engine import PlainEngine
from fastgrpo.plain.updater import PlainUpdater
from fastgrpo.profile.opponents import OURS, PAPER, TRL
from fastgrpo.profile.sides.paper import paper_parts
from fastgrpo.training.trainer import GRPOTrainer

OUR_WORKER, TRL_WORKER = "fastgrpo.profile.sides.worker", "fastgrpo.profile.sides.trl"
"""Modules that run as a side's process."""
NEEDED = ("trl", "fastgrpo", "fastgrpo_kernels", "fastgrpo_profiling")
"""What TRL's process imports."""


def build_trainer(
    side: str, config: GRPOConfig, script: ScriptArguments, trainer_class: type[GRPOTrainer] = GRPOTrainer
) -> GRPOTrainer:
    """A trainer of one side (`ours`, `plain` or `paper`) with a newly loaded model."""
    if side != OURS:
        config = copy.copy(config)
        config.engine = "plain"
    rows = load_training_rows(script, config.seed)
    trainer = build_our_trainer(config, script, rows, trainer_class=trainer_class)
    if side == PAPER:
        assert isinstance(trainer.engine, PlainEngine)
        assert isinstance(trainer.updater, PlainUpdater)
        reference_model = trainer.updater.reference_model
        if reference_model is None:
            reference_model = trainer.accelerator.prepare_model(
                copy.deepcopy(trainer.model).eval().requires_grad_(False), evaluation_mode=True
            )
        trainer.engine, trainer.updater = paper_parts(trainer.model, trainer.engine, trainer.updater, reference_model)
    return trainer


def start_side(
    side: str,
    settings: Sequence[str],
    output_dir: Path,
    *,
    trl_python: Path,
    environment: Mapping[str, str] | None = None,
) -> WorkerSide:
    """Starts the process of one side.

    Args:
        settings: flags of `fastgrpo train`.
        output_dir: gets a folder for each side's own logs.
        trl_python: the interpreter of the environment that holds TRL.
        environment: variables set for the process.

    Raises:
        ValueError: TRL's side cannot be started here.
    """
    flags = [*settings, "--output_dir", str(output_dir / side)]
    if side == TRL:
        require_trl(trl_python)
        command = [str(trl_python), "-m", TRL_WORKER, *flags]
        return WorkerSide(side, command, {**trl_environment(), **(environment or {})})
    return WorkerSide(side, [sys.executable, "-m", OUR_WORKER, side, *flags], environment)


def require_trl(trl_python: Path) -> None:
    """Raises ValueError unless TRL's side can be started."""
    if not trl_python.is_file():
        raise ValueError(f"--trl_python {trl_python} is missing: run `make install-bench`, or name another.")
    code = f"from importlib.util import find_spec; print(*(name for name in {NEEDED} if find_spec(name) is None))"
    looked = subprocess.run(
        [str(trl_python), "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **trl_environment()},
    )
    if looked.returncode != 0 or looked.stdout.strip():
        raise ValueError(
            f"--trl_python {trl_python} lacks {looked.stdout.strip() or 'a Python that works'}: install it there, or "
            "name another."
        )


def trl_environment() -> dict[str, str]:
    """Variables of TRL's process, which reads settings and data with this very code.

    An installed package is not handed on: its folder holds all the other packages of this environment too.
    """
    origins = [spec.origin for name in NEEDED[1:] if (spec := find_spec(name)) and spec.origin]
    roots = dict.fromkeys(str(Path(origin).parents[1]) for origin in origins)
    ours = [root for root in roots if Path(root).name not in ("site-packages", "dist-packages")]
    return {"PYTHONPATH": os.pathsep.join(filter(None, [*ours, os.environ.get("PYTHONPATH", "")]))}
