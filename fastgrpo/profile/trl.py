"""Compares our update with TRL's, which runs in another environment: batch and gradients are exchanged in files."""

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.nn.utils.rnn import pad_sequence

from fastgrpo.profile import gate
from fastgrpo.profile.opponents import TRL
from fastgrpo.profile.sides.start import TRL_WORKER, require_trl, trl_environment


def compare_with_trl(
    answer: gate.Answer, limits: gate.Tolerances, settings: Sequence[str], output_dir: Path, trl_python: Path
) -> gate.Gate:
    """Prompts, loss and gradients of TRL on our fixed batch, both with loss_type grpo.

    Args:
        settings: flags of `fastgrpo train`, as TRL's side gets them.
        output_dir: gets the files that are exchanged.
        trl_python: the interpreter of the environment that holds TRL.

    Raises:
        GateError: TRL could not take the batch.
    """
    require_trl(trl_python)
    folder = output_dir / TRL / "gate"
    folder.mkdir(parents=True, exist_ok=True)
    batch = answer.batch
    completions = [completion for group in batch.groups for completion in group.completions]
    save_file(
        {
            "token_ids": pad_sequence([c.token_ids for c in completions], batch_first=True),
            "lengths": torch.tensor([len(c.token_ids) for c in completions]),
            "advantages": torch.cat([group.advantages for group in batch.groups]),
        },
        folder / "batch.safetensors",
    )
    command = [str(trl_python), "-m", TRL_WORKER, "--check", str(folder), *settings, "--output_dir", str(folder)]
    run = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **trl_environment()})
    if run.returncode != 0:
        raise gate.GateError(f"TRL's side could not be checked:\n{run.stderr[-3000:]}")
    said = json.loads((folder / "answer.json").read_text())
    found = gate.Gate()
    ids = [prompt.input_ids.tolist() for prompt in batch.prompts]
    found.add("prompts that differ", float(sum(a != b for a, b in zip(ids, said["prompt_ids"], strict=True))), 0)
    theirs = load_file(folder / "gradients.safetensors")
    gate.compare_update(found, (answer.loss, answer.gradients), (said["loss"], theirs), limits)
    found.add("sampler against update, nats", answer.mismatch, limits.mismatch)
    return found
