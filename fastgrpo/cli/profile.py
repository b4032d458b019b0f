"""`fastgrpo profile`: where each millisecond of a training step goes, beside another implementation."""

import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from fastgrpo.cli.options import Parser, at_least
from fastgrpo.profile.opponents import OPPONENTS, PLAIN


def run(argv: Sequence[str]) -> None:
    """Profiles as the flags say."""
    parser = Parser(
        prog="fastgrpo profile",
        description="Whole training steps against another implementation, taking turns. Further flags are fastgrpo "
        "train's and override the config's; a config without a model or data gets the demo's.",
    )
    parser.add_argument("config", type=Path, help="settings of `fastgrpo train` (YAML)")
    meaning = "; ".join(f"{name}: {what}" for name, what in OPPONENTS.items())
    parser.add_argument("--against", choices=tuple(OPPONENTS), default=PLAIN, help=meaning)
    parser.add_argument("--steps", type=at_least(1), default=5, help="timed steps of each side")
    parser.add_argument("--warmup", type=at_least(0), default=1, help="steps of each side before them")
    parser.add_argument("--scale", action="store_true", help="again with half the completions: how each phase grows")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/profile"))
    parser.add_argument(
        "--trl_python",
        type=Path,
        default=trl_python(),
        help="the Python that has TRL (%(default)s)",
    )
    options, flags = parser.parse_known_args(argv)

    from fastgrpo.cli.quiet import quieten
    from fastgrpo.profile.run import ProfileOptions, run_profile

    quieten()
    run_profile(ProfileOptions(**vars(options), flags=flags))


def trl_python() -> Path:
    """This Python where TRL is installed beside fastgrpo, else that of `make install-bench`."""
    return Path(sys.executable) if find_spec("trl") else Path(".venv-bench/bin/python")
