"""The `fastgrpo` command: finds the command that was named and runs it."""

import os
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module

from fastgrpo import __version__
from fastgrpo.cli.suggestions import did_you_mean
from fastgrpo.safe_text.last_line import last_line
from fastgrpo.safe_text.redaction import redacted
from fastgrpo.settings.given import is_out_of_memory

COMMANDS = {
    "train": ("train a model with GRPO", "fastgrpo train --help lists the flags"),
    "sft": ("fine-tune on a data set's answers", "fastgrpo sft --help lists the flags"),
    "eval": ("score models on a benchmark", "fastgrpo eval --benchmark cvbench MODEL…"),
    "generate": ("ask a model", 'fastgrpo generate MODEL --image FILE "question"'),
    "merge": ("make a whole model of adapters", "fastgrpo merge ADAPTER OUT"),
    "lab": ("run an experiment: arms × seeds", "fastgrpo lab configs/lab_aha.yaml"),
    "profile": ("see where a step's time goes", "fastgrpo profile CONFIG --against plain"),
    "report": ("draw a run's report, or several", "fastgrpo report RUN…"),
    "demo": ("train a tiny model on this machine", "fastgrpo demo"),
    "doctor": ("see what is installed, what is missing", "fastgrpo doctor"),
}
"""Command, and module of this package → what it does, and an example."""


def usage() -> str:
    """What `fastgrpo --help` prints."""
    lines = "\n".join(f"  {name:<8}  {what:<38}  {example}" for name, (what, example) in COMMANDS.items())
    return f"usage: fastgrpo COMMAND …\n\n{lines}\n\nFASTGRPO_TRACEBACK=1 shows where an error came from.\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit code: 0, 2 for a user's mistake, 130 when interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0].startswith("--local_rank="):
        arguments.pop(0)  # from DeepSpeed's launcher, which also sets it in the environment
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage(), end="")
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"fastgrpo {__version__}")
        return 0
    name, rest = arguments[0], arguments[1:]
    if name not in COMMANDS:
        hint = did_you_mean(name, COMMANDS, f": use {', '.join(COMMANDS)}")
        print(f"fastgrpo: unknown command {name!r}{hint}", file=sys.stderr)
        return 2
    try:
        import_module(f"fastgrpo.cli.{name}").run(rest)
    except Exception as error:
        told = _in_one_line(error)
        if told is None:
            error.add_note(f"This is a fault of fastgrpo {__version__}, not of what it was given: please report it.")
        is_bug = told is None or bool(os.environ.get("FASTGRPO_TRACEBACK"))
        if not _is_a_rank():
            if is_bug:
                raise
            last_line(_without_secrets(f"fastgrpo {name}: error: {told}"))
            return 2
        if is_bug:
            traceback.print_exc()
        cause = told or f"{type(error).__name__}: {error}"
        last_line(_without_secrets(f"fastgrpo {name}: error on rank {os.environ['RANK']}: {cause}"))
        sys.stdout.flush()
        os._exit(1 if is_bug else 2)  # torch's own end waits for ranks that will not come
    except KeyboardInterrupt as interrupt:
        print(f"fastgrpo {name}: interrupted{f'; {interrupt}' if interrupt.args else ''}", file=sys.stderr)
        return 130
    return 0


def _is_a_rank() -> bool:
    """Whether this is one of several processes that have met."""
    distributed = sys.modules.get("torch.distributed")
    is_one_of_several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    return is_one_of_several and distributed is not None and bool(distributed.is_initialized())


def _without_secrets(line: str) -> str:
    return str(redacted({"line": line})["line"])


def _in_one_line(error: Exception) -> str | None:
    """The message for a user's mistake or an exhausted machine; None for an error of this program."""
    line = " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if isinstance(error, (ValueError, OSError)):
        return line
    if type(error).__module__.startswith(("httpx", "requests", "huggingface_hub")):
        return f"the network does not answer: {line}"
    if isinstance(error, MemoryError):
        return f"this machine's memory is full: lower dataloader_num_workers or per_device_train_batch_size. {line}"
    if is_out_of_memory(error):
        whose = "GPU" if type(error).__name__ == "OutOfMemoryError" else "machine"
        return (
            f"the {whose}'s memory is full: set gradient_checkpointing, or lower token_budget, max_completion_length "
            f"(max_new_tokens), per_device_train_batch_size or sampler_max_cache_tokens. {line}"
        )
    return None
