"""A command that a launcher (torchrun, accelerate) started several times."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import TYPE_CHECKING

from fastgrpo.cli.console import console

if TYPE_CHECKING:
    from fastgrpo.evaluation import Ranks

PATIENCE = timedelta(days=1)
"""How long a rank waits for the others: their answers may be longer."""


def join_ranks(device: str | None) -> tuple[Ranks, str | None]:
    """This process's place among the ranks, and its device. All but the first fall silent.

    Args:
        device: as the user named it; None for a GPU of this rank's own if there is one.
    """
    from fastgrpo.evaluation import Ranks

    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Ranks(), device

    import torch
    from accelerate import PartialState

    state = PartialState(cpu=device == "cpu" or not torch.accelerator.is_available(), timeout=PATIENCE)
    console.quiet = not state.is_main_process
    return Ranks(state.process_index, state.num_processes), device or str(state.device)
