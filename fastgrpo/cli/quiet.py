"""Switches off what libraries print that tells a user nothing."""

import os
import sys
import warnings
from importlib.util import find_spec

import torch
from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
from transformers.utils import logging


def quieten() -> None:
    """Call it before anything is loaded. Downloads keep their bars."""
    had_download_bars = not are_progress_bars_disabled()
    logging.disable_progress_bar()  # of loading and writing weights; the hub's go with them
    if had_download_bars:
        enable_progress_bars()
    if not sys.stderr.isatty() and find_spec("datasets"):  # a machine that only measures does without
        import datasets

        datasets.disable_progress_bars()
    # A model's own generation settings, often at odds with each other, are not used here.
    logging.get_logger("transformers.generation.configuration_utils").setLevel(logging.ERROR)
    # That settings of today get another name in transformers 6.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed warns when it has to find that out
