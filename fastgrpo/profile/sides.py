"""The sides of a comparison: the same settings, model and data; another engine and updater."""

import copy
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from fastgrpo_profiling.worker import WorkerSide

from fastgrpo.cli.arguments import ScriptArguments
from fastgrpo.cli.train import load_model, load_training_rows, lora_config
from fastgrpo.config import GRPOConfig
from fastgrpo.model.load import load_processing
from fastgrpo.plain.engine import PlainEngine
from fastgrpo.plain.updater import PlainUpdater
from fastgrpo.profile.paper import paper_parts
from fastgrpo.training.trainer import GRPOTrainer

OURS, PLAIN, PAPER, TRL = "ours", "plain", "paper", "trl"
OPPONENTS = {
    PLAIN: "HF generate and one padded batch (fastgrpo.plain.engine)",
    PAPER: "the published code's way (fastgrpo.profile.paper)",
    TRL: "TRL's GRPOTrainer, as installed in its own environment",
}
"""What `--against` takes."""

TRL_WORKER = Path(__file__).parents[2] / "bench" / "trl_worker.py"


def build_trainer(
    side: str, config: GRPOConfig, script: ScriptArguments, trainer_class: type[GRPOTrainer] = GRPOTrainer
) -> GRPOTrainer:
    """A trainer of one side (`ours`, `plain` or `paper`), its model freshly loaded."""
    if side != OURS:
        config = copy.copy(config)
        config.engine = "plain"
    trainer = trainer_class(
        model=load_model(script, config),
        reward_funcs=script.reward_funcs,
        args=config,
        train_dataset=load_training_rows(script, config.seed),
        processing_class=load_processing(
            script.model_name_or_path, script.min_pixels, script.max_pixels, config.trust_remote_code
        ),
        peft_config=lora_config(script),
    )
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
        return WorkerSide(
            side, [str(trl_python), str(TRL_WORKER), *flags], {**trl_environment(), **(environment or {})}
        )
    return WorkerSide(side, [sys.executable, "-m", "fastgrpo.profile.worker", side, *flags], environment)


def require_trl(trl_python: Path) -> None:
    """Raises ValueError unless TRL's side can be started."""
    if not TRL_WORKER.is_file():
        raise ValueError(f"--against trl needs a checkout of this project: {TRL_WORKER} is not installed with it.")
    if not trl_python.is_file():
        raise ValueError(f"--trl_python {trl_python} is missing: run `make install-bench`, or name another.")


def trl_environment() -> dict[str, str]:
    """Variables of TRL's process: it reads settings and data with this very code."""
    root = TRL_WORKER.parents[1]
    folders = [*(str(root / folder) for folder in (".", "kernels", "profiling")), os.environ.get("PYTHONPATH", "")]
    return {"PYTHONPATH": os.pathsep.join(filter(None, folders))}
