"""DeepSpeed's settings for a batch that is one whole optimizer step, wherever they come from; what it leaves behind."""

import os
from pathlib import Path

from accelerate import Accelerator
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig
from transformers.utils import logging

from fastgrpo.settings.run_config import RunConfig

logger = logging.get_logger(__name__)

SHARED_MEMORY = Path("/dev/shm")
WHOLE_WEIGHTS = "stage3_gather_16bit_weights_on_model_save"


def take_whole_steps(config: RunConfig) -> None:
    """Fills in what says "auto" from `config`, then sets DeepSpeed's accumulation to 1. No DeepSpeed: nothing to do.

    Settings come from `--deepspeed FILE`, which transformers has filled in already, or from `accelerate launch
    --config_file FILE`, whose values reach us through the environment and are "auto" until the Trainer runs.

    Args:
        config: the user's own settings, whose batch is a micro-batch. Its DeepSpeed settings are changed in place.
    """
    plugin = config.deepspeed_plugin
    if plugin is None:
        return
    if getattr(config, "hf_deepspeed_config", None) is None:
        # As transformers does with --deepspeed; it would do this later, with a batch that is a whole step.
        filled_in = HfTrainerDeepSpeedConfig(plugin.hf_ds_config.config)
        filled_in.trainer_config_process(config)
        config.hf_deepspeed_config = plugin.hf_ds_config = filled_in
        plugin.deepspeed_config = filled_in.config
    settings = plugin.deepspeed_config
    zero = settings.get("zero_optimization", {})
    if zero.get("stage") != 3:  # sizes that it does not read, and which accelerate cannot work out of every config
        for name in [name for name, value in zero.items() if name.startswith("stage3_") and value == "auto"]:
            del zero[name]
    elif zero.get(WHOLE_WEIGHTS) is not True:  # "auto" and unset are off by now
        logger.warning(f"{WHOLE_WEIGHTS} was off: it is on, since the trained model would be saved without weights.")
        zero[WHOLE_WEIGHTS] = True
    if {"gradient_accumulation_steps", "train_batch_size"} <= settings.keys():  # else DeepSpeed's own are 1
        settings["train_batch_size"] //= settings["gradient_accumulation_steps"]
        settings["gradient_accumulation_steps"] = 1


def forget_shared_buffers(accelerator: Accelerator) -> None:
    """Ranks on CPUs reduce over files of 66 MB each in /dev/shm, which DeepSpeed never removes; on all ranks together.

    Once all ranks have opened them they go by name, and their memory with the processes, also with killed ones.
    """
    if accelerator.state.deepspeed_plugin is None or accelerator.device.type != "cpu":
        return
    accelerator.wait_for_everyone()
    place = [os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT")]
    rank = str(accelerator.process_index)
    name = "_".join(["deepspeed_allreduce_buffer", str(os.getuid()), *place, rank])
    (SHARED_MEMORY / name).unlink(missing_ok=True)
