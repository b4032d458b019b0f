"""`fastgrpo generate`: asks a model one question, or many from standard input."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fastgrpo.cli.console import say
from fastgrpo.cli.inference import MODEL_HELP, Inference, add_model_options, load_inference
from fastgrpo.cli.options import Parser, at_least, between
from fastgrpo.safe_text.inert import inert

if TYPE_CHECKING:
    from fastgrpo.types import Completion, SamplingParams

INTERACTIVE = "a question a line; /image FILE… changes the pictures, an empty line ends"


def run(argv: Sequence[str]) -> None:
    """Asks the questions and prints the answers."""
    parser = Parser(prog="fastgrpo generate", description=f"A model's answers. Without a question: {INTERACTIVE}.")
    parser.add_argument("model", help=MODEL_HELP)
    add_model_options(parser)
    parser.add_argument("question", nargs="?", help="asked in the wording of --prompt_mode")
    parser.add_argument("--image", type=Path, action="append", default=[], help="a picture; once for each")
    parser.add_argument("--max_new_tokens", type=at_least(1), default=1024)
    parser.add_argument("--num_generations", type=at_least(1), default=1, help="answers to a question")
    parser.add_argument("--temperature", type=between(0), default=0.0, help="0, the default, takes the likeliest token")
    parser.add_argument("--top_p", type=between(0, 1), default=1.0)
    parser.add_argument("--top_k", type=at_least(0), default=0)
    parser.add_argument("--seed", type=at_least(0), default=0)
    options = parser.parse_args(argv)
    if options.num_generations > 1 and options.temperature == 0:
        raise ValueError("--num_generations above 1 draws the same answer each time at --temperature 0: raise it to 1")
    if options.question is not None and not options.question.strip():
        raise ValueError("the question is empty")
    pictures = [path.read_bytes() for path in options.image]  # a missing one is told before a model is loaded

    from fastgrpo.cli.quiet import quieten
    from fastgrpo.types import SamplingParams

    quieten()
    params = SamplingParams(
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        seed=options.seed,
    )
    model = load_inference(options, max_rows=options.num_generations)
    if options.question is not None:
        show(answers(model, options.question, pictures, options.num_generations, params))
        return
    if sys.stdin.isatty():
        say(INTERACTIVE)
    for number, line in enumerate(_lines()):
        try:
            if line.startswith("/image"):
                pictures = [Path(name).read_bytes() for name in line.removeprefix("/image").split()]
            else:
                show(answers(model, line, pictures, options.num_generations, params, step=number))
        except (ValueError, OSError) as error:
            say(f"error: {' '.join(str(error).split())}")


def answers(
    model: Inference, question: str, pictures: Sequence[bytes], count: int, params: SamplingParams, step: int = 0
) -> tuple[Completion, ...]:
    """`count` answers to a question about pictures (encoded, as in their files).

    Args:
        step: questions of one number and seed are drawn alike.

    Raises:
        ValueError: a picture that cannot be decoded, or one for a model that takes none.
    """
    from fastgrpo.data.chat import convert_chat

    row = convert_chat({"question": question, "images": list(pictures)}, row_id=0)
    (rollout,) = model.engine.generate([model.builder.build(row)], count, params, step=step)
    return rollout.completions


def show(completions: Sequence[Completion]) -> None:
    """Prints the texts, and whether one was cut."""
    for number, completion in enumerate(completions):
        if number:
            print("---")
        print(inert(completion.text), flush=True)
        if completion.finish_reason == "length":
            say(f"(cut after {len(completion.token_ids)} tokens: --max_new_tokens)")


def _lines() -> Iterator[str]:
    while line := _next_line():
        yield line


def _next_line() -> str:
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return ""
