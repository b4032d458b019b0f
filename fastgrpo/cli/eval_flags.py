"""The flags of `fastgrpo eval`: which models, on what."""

import shlex
from argparse import SUPPRESS, BooleanOptionalAction, Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastgrpo.cli.console import say
from fastgrpo.cli.inference import MODEL_HELP, add_model_options
from fastgrpo.cli.options import Parser, at_least
from fastgrpo.safe_text.redaction import redacted

TITLES = {"cvbench": "CV-Bench", "sat": "SAT", "blink": "BLINK", "vsr": "VSR", "mossbench": "MOSSBench"}
"""Benchmark, as `--benchmark` has it → its name."""
USAGE = """fastgrpo eval --benchmark NAME MODEL… [--data DATA]
       fastgrpo eval MODEL… DATA"""


@dataclass(frozen=True)
class Target:
    """What is scored, on what."""

    models: list[str]
    benchmark: str | None
    """A key of `TITLES`; None where the columns tell the schema."""
    data: str | None
    """A file, folder or hub id; None: where the benchmark is published."""
    name: str
    """Of the files that are written."""
    command: str
    """That asked for it, without secrets."""

    @property
    def dataset(self) -> str:
        """What files and page say was asked."""
        return self.data or TITLES[self.benchmark or ""]

    @property
    def title(self) -> str:
        """Of the page."""
        return TITLES[self.benchmark] if self.benchmark else Path(self.dataset).name


def read_flags(argv: Sequence[str]) -> tuple[Namespace, Target]:
    """Parses the command line.

    Raises:
        ValueError: a flag or value that does not fit, no model, or nothing to ask.
    """
    options = _parser().parse_args(argv)
    published = _take_published(options)
    models, data, benchmark = [*options.names, *options.model_path], options.data, options.benchmark
    if benchmark is None and data is None:
        if options.names and len(models) > 1:
            data = models.pop(len(options.names) - 1)
        elif options.model_path:
            benchmark = "cvbench"
            published.append("without a data set, CV-Bench is asked")
        else:
            raise ValueError("asked about what? Name a benchmark (--benchmark cvbench), or a data set behind the model")
    _check_benchmark_flags(options, benchmark)
    if options.pictures is not None and not options.pictures.is_dir():
        raise ValueError(f"--pictures {options.pictures}: there is no such folder")
    if not models:
        raise ValueError("no model is named: fastgrpo eval --benchmark cvbench MODEL")
    name = (benchmark or "eval") if options.name is None else options.name
    if Path(name).name != name or name in ("", ".."):
        raise ValueError(f"--name {name} is no plain file name")
    if published:
        say(f"flags of the published evaluators: {'; '.join(published)}")
    command: str = redacted({"command": shlex.join(["fastgrpo", "eval", *argv])})["command"]
    return options, Target(models, benchmark, data, name, command)


def _parser() -> Parser:
    parser = Parser(prog="fastgrpo eval", usage=USAGE, description="Greedy accuracy, in total and by task.")
    parser.add_argument("names", nargs="*", metavar="MODEL", help=f"{MODEL_HELP}; several are compared")
    parser.add_argument("--benchmark", choices=sorted(TITLES), help="what is asked, by its published name")
    parser.add_argument("--data", help="parquet, JSON or JSONL file, folder or hub id of the questions")
    parser.add_argument("--pictures", type=Path, help="folder of the pictures that the data names; beside it if unset")
    add_model_options(parser)
    parser.add_argument("--output_dir", type=Path, default=Path("."), help="gets the page and evals/NAME.*")
    parser.add_argument("--name", help="of the files; the benchmark's, else eval")
    parser.add_argument("--split", help="of a folder or hub data set; the one with answers if unset")
    parser.add_argument("--max_samples", type=at_least(1), help="the first questions alone")
    parser.add_argument("--max_new_tokens", type=at_least(1), default=1024)
    parser.add_argument("--batch_size", type=at_least(1), default=64, help="questions answered at once")
    parser.add_argument("--pass_at_k", type=at_least(0), default=0, help="also sample so many responses a question")
    parser.add_argument(
        "--shuffles", type=at_least(0), default=0, help="ask again about shuffled pictures, so many times"
    )
    parser.add_argument("--seed", type=at_least(0), default=0)
    parser.add_argument("--judge_base_url", help="OpenAI-compatible endpoint that judges refusals; else their words do")
    parser.add_argument("--judge_model", help="the model that it asks; the key is read from FASTGRPO_JUDGE_API_KEY")
    parser.add_argument("--model_path", action="append", default=[], help=SUPPRESS)
    parser.add_argument("--bs", type=at_least(1), help=SUPPRESS)
    parser.add_argument("--use_reasoning_prompt", action=BooleanOptionalAction, help=SUPPRESS)
    return parser


def _check_benchmark_flags(options: Namespace, benchmark: str | None) -> None:
    """Raises ValueError for flags that mean nothing to the benchmark."""
    asks_freely = benchmark == "mossbench"
    of_others = ("judge_base_url", "judge_model") if not asks_freely else ("pass_at_k", "shuffles")
    if given := [f"--{name}" for name in of_others if getattr(options, name)]:
        only = "is for --benchmark mossbench alone" if not asks_freely else "has no meaning in MOSSBench"
        raise ValueError(f"{', '.join(given)} {only}: leave it out")
    if bool(options.judge_base_url) != bool(options.judge_model):
        raise ValueError("a judge has an address and a name: give both --judge_base_url and --judge_model, or neither")


def _take_published(options: Namespace) -> list[str]:
    """Takes over the flags of the published evaluators; what each stands for."""
    told = []
    if options.model_path:
        told.append("--model_path is MODEL")
    if options.bs is not None:
        options.batch_size = options.bs
        told.append("--bs is --batch_size")
    if options.use_reasoning_prompt:
        options.prompt_template = options.prompt_template or "paper"
        told.append("--use_reasoning_prompt is --prompt_template paper")
    if options.use_reasoning_prompt is False:
        options.prompt_template = "direct"
        told.append("--no-use_reasoning_prompt is --prompt_template direct")
    return told
