"""`fastgrpo merge`: adapters made part of their base's weights, for programs that know nothing of adapters."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from fastgrpo.cli.console import program, say
from fastgrpo.cli.inference import run_settings
from fastgrpo.cli.options import Parser, require_writable


def run(argv: Sequence[str]) -> None:
    """Merges as the flags say, and prints where the model is."""
    parser = Parser(
        prog="fastgrpo merge", description="A whole model, from adapters and the base they were trained on."
    )
    parser.add_argument(
        "adapter", help="folder or hub id of the adapters: a run trained with --use_peft, or a checkpoint"
    )
    parser.add_argument("out", type=Path, help="gets the model; must be new or empty")
    parser.add_argument("--dtype", default="auto", help="auto (the base's), float32, bfloat16 or float16")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the base")
    options = parser.parse_args(argv)

    from fastgrpo.cli.quiet import quieten
    from fastgrpo.model.adapters import adapter_base

    quieten()
    if adapter_base(options.adapter) is None:
        raise ValueError(f"{options.adapter!r} holds no adapters: there is no adapter_config.json in it")
    require_writable(options.out)
    if any(options.out.iterdir()):
        raise ValueError(f"{options.out} is not empty: name a new folder")
    merge(options.adapter, options.out, dtype=options.dtype, trust_remote_code=options.trust_remote_code)
    say(f"merged; ask it: {program()} generate {options.out} --image FILE '…'")
    print(options.out)


def merge(adapter: str, out: Path, *, dtype: str = "auto", trust_remote_code: bool = False) -> None:
    """Writes the merged model, its tokenizer and image processor, and the run's settings; whole or not at all.

    Raises:
        ValueError: adapters or a base that cannot be loaded.
    """
    from fastgrpo.atomic_files import publish
    from fastgrpo.model.load import load_merged, load_processing

    processing = load_processing(adapter, trust_remote_code=trust_remote_code)
    model = load_merged(adapter, dtype=dtype, trust_remote_code=trust_remote_code)
    aside = out.with_name(f".{out.name}.part")
    shutil.rmtree(aside, ignore_errors=True)  # what a killed merge left
    model.save_pretrained(aside)
    processing.save_pretrained(str(aside))
    if settings := run_settings(adapter):
        shutil.copy(settings, aside)  # says how the model was asked
    publish(aside, out)
