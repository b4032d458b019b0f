"""A lab's YAML file: arms, their settings, seeds."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import product
from pathlib import Path
from typing import Any

from fastgrpo.cli.arguments import known_settings, read_settings
from fastgrpo.cli.suggestions import did_you_mean
from fastgrpo.report.claims import read_claim

COMMANDS = ("train", "sft")
OF_A_RUN = ("seed", "output_dir", "resume_from_checkpoint", "run_name")
"""Settings that the lab gives each run itself."""


@dataclass(frozen=True)
class Arm:
    """One setting of the experiment, run once per seed."""

    name: str
    """Its folder's name inside the lab's."""
    about: str = ""
    command: str = "train"
    """`fastgrpo` program that makes a run: train or sft."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Flags of that program by name."""
    evaluations: tuple[str, ...] = ()
    """Names of the lab's evaluations, made before and after."""


@dataclass(frozen=True)
class Lab:
    """What a lab's file says."""

    output_dir: Path
    seeds: tuple[int, ...]
    arms: tuple[Arm, ...]
    title: str = ""
    prepare: tuple[str, ...] = ()
    """`python -m` command lines that make data or models, run once before the first arm."""
    evaluations: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Flags of `fastgrpo eval` by the evaluation's name."""
    claims: tuple[dict[str, Any], ...] = ()
    """What the page judges: see `fastgrpo/report/claims.py`."""


def read_lab(file: Path) -> Lab:
    """Reads and checks a lab's YAML file; docs/lab.md lists its fields.

    Raises:
        ValueError: not YAML, a field that is missing, unknown or of the wrong kind, or a setting that its program does
            not have; the message names it.
    """
    content = read_settings(file)
    shared = ("settings", "train_settings", "sft_settings", "axes")
    _known(content, [*(f.name for f in fields(Lab)), *shared], str(file))
    for name in ("output_dir", "seeds", "arms"):
        if not content.get(name):
            raise ValueError(f"{file}: {name} is missing")
    evaluations = {
        str(name): _mapping(flags, f"{file}: evaluations: {name}")
        for name, flags in _mapping(content.get("evaluations"), f"{file}: evaluations").items()
    }
    arms: list[Arm] = []
    for name, given in _mapping(content["arms"], f"{file}: arms").items():
        where = f"{file}: arms: {name}"
        arm = _mapping(given, where)
        _known(arm, [*(f.name for f in fields(Arm) if f.name != "name"), "axes"], where)
        arms += _expanded(str(name), arm, content, evaluations, where)
    names = [arm.name for arm in arms]
    claims = [_mapping(one, f"{file}: claims") for one in _list(content.get("claims"), f"{file}: claims")]
    for claim in claims:
        try:
            read_claim(claim, names)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"{file}: arms: two are called {twice!r} as folders: name one otherwise")
    return Lab(
        output_dir=Path(_text(content["output_dir"], f"{file}: output_dir")),
        seeds=_seeds(content["seeds"], f"{file}: seeds"),
        arms=tuple(arms),
        title=_text(content.get("title", ""), f"{file}: title"),
        prepare=_texts(content.get("prepare", ()), f"{file}: prepare"),
        evaluations=evaluations,
        claims=tuple(claims),
    )


def _expanded(
    name: str, given: Mapping[str, Any], lab: Mapping[str, Any], evaluations: Mapping[str, Any], where: str
) -> list[Arm]:
    """The arm, or one for each combination along its axes."""
    command = given.get("command", "train")
    if command not in COMMANDS:
        raise ValueError(f"{where}: command is {command!r}{did_you_mean(str(command), COMMANDS, ': use train or sft')}")
    known = known_settings(command)
    from_files: dict[str, Any] = {}
    settings: dict[str, Any] = {}
    for source, name_of in ((lab, "settings"), (lab, f"{command}_settings"), (given, "settings")):
        at = f"{where}: settings" if source is given else name_of
        from_file, written = _settings(source.get(name_of), known, at)
        from_files |= from_file
        settings |= written
    settings = {**from_files, **settings}
    axes = {**_mapping(lab.get("axes"), "axes"), **_mapping(given.get("axes"), f"{where}: axes")}
    _settings(axes, known, f"{where}: axes")
    for axis, values in axes.items():
        if not isinstance(values, list) or not values:
            raise ValueError(f"{where}: axes: {axis} is {values!r}: give a list of values")
    made = _texts(given.get("evaluations", ()), f"{where}: evaluations")
    for evaluation in made:
        if evaluation not in evaluations:
            raise ValueError(
                f"{where}: evaluations: {evaluation!r} is none of the lab's{did_you_mean(evaluation, evaluations, '')}"
            )
    about = _text(given.get("about", ""), f"{where}: about")
    arms = []
    for values in product(*axes.values()):
        point = dict(zip(axes, values, strict=True))
        full = {key: value for key, value in {**settings, **point}.items() if value is not None}
        label = "-".join([name, *(f"{axis}={_short(value)}" for axis, value in point.items())])
        if full.get("save_only_model"):
            raise ValueError(
                f"{where}: save_only_model is set: a run that was killed could not go on. Set it to false."
            )
        arms.append(Arm(_folder_name(label), about, command, full, made))
    return arms


def _settings(given: Any, known: Sequence[str], where: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Flags by name: those of the file that `config` names, and those that are written here."""
    settings = _mapping(given, where)
    file = settings.pop("config", None)
    from_file = {} if file is None else read_settings(Path(_text(file, f"{where}: config")))
    if own := next((name for name in settings if name in OF_A_RUN), None):
        raise ValueError(f"{where}: {own} is given to each run by the lab: leave it out")
    _known(settings, known, where)
    _known(from_file, known, f"{where}: {file}")
    return {name: value for name, value in from_file.items() if name not in OF_A_RUN}, settings


def _known(given: Mapping[str, Any], names: Iterable[str], where: str) -> None:
    names = list(names)
    if unknown := next((name for name in given if name not in names), None):
        raise ValueError(f"{where}: unknown field {unknown}{did_you_mean(str(unknown), names, '')}")


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{where} is {value!r}: give names with values")
    return dict(value or {})


def _list(value: Any, where: str) -> list[Any]:
    if value is not None and not isinstance(value, list):
        raise ValueError(f"{where} is {value!r}: give a list")
    return list(value or [])


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where} is {value!r}: give a text")
    return value


def _texts(value: Any, where: str) -> tuple[str, ...]:
    values = _list(list(value) if isinstance(value, tuple) else value, where)
    return tuple(_text(one, where) for one in values)


def _seeds(value: Any, where: str) -> tuple[int, ...]:
    seeds = _list(value, where)
    if not all(type(seed) is int and seed >= 0 for seed in seeds) or len(set(seeds)) < len(seeds):
        raise ValueError(f"{where} is {value!r}: give a list of different whole numbers, like [0, 1, 2]")
    return tuple(seeds)


def _short(value: Any) -> str:
    """An axis value in a folder's name; of a path its last part."""
    return "+".join(map(_short, value)) if isinstance(value, list) else str(value).rstrip("/").rsplit("/", 1)[-1]


def _folder_name(name: str) -> str:
    return re.sub(r"[^\w.=+-]", "_", name).strip(".") or "_"
