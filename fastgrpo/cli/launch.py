"""`fastgrpo train --num_processes N` starts its own processes, through accelerate's launcher."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

LAUNCH_FLAGS = (
    *("num_processes", "accelerate_config", "num_machines", "machine_rank", "main_process_ip", "main_process_port"),
    *("mixed_precision", "gpu_ids"),
)
"""Flags, and keys of a YAML file, that are the launcher's."""
SAVING_S = 120.0
"""Longest to wait for processes that save a checkpoint on SIGTERM."""


def launch(command: str, argv: Sequence[str]) -> bool:
    """Runs the command in processes of its own if its flags ask for that; whether they did.

    Raises:
        ValueError: a flag without a value, no such file, or the command runs under a launcher already.
        SystemExit: what the processes ended with, unless all is well.
    """
    wanted, rest = _take(argv)
    if not wanted:
        return False
    if "LOCAL_RANK" in os.environ:
        raise ValueError(f"--{next(iter(wanted))}: a launcher has started this process already; leave it out.")
    if not wanted.get("num_processes", "1").isdecimal() or not int(wanted.get("num_processes", "1")):
        raise ValueError(f"--num_processes {wanted['num_processes']} is not a whole number of 1 or more")
    file = wanted.pop("accelerate_config", None)
    if file is not None and not Path(file).is_file():
        raise ValueError(f"--accelerate_config {file}: there is no such file.")
    flags = [token for name, value in wanted.items() for token in (f"--{name}", value)]
    if file is not None:
        flags = ["--config_file", file, *flags]
    else:  # what accelerate would ask for in a warning
        if wanted.get("num_processes", "1") != "1":
            flags.append("--multi_gpu")  # several processes, on CPUs too
        for name, value in {"num_machines": "1", "mixed_precision": "no", "dynamo_backend": "no"}.items():
            flags += [] if name in wanted else [f"--{name}", value]
    launcher = [sys.executable, "-m", "fastgrpo.cli.launcher", *flags, "--module", "fastgrpo"]
    if code := _until_all_have_ended([*launcher, command, *rest]):
        raise SystemExit(code)
    return True


def _until_all_have_ended(command: Sequence[str]) -> int:
    """Runs a launcher; SIGTERM and SIGINT go on to it and to all its processes. The exit code."""
    launcher = subprocess.Popen(command, start_new_session=True)
    received: list[int] = []

    def pass_on(signum: int, _: Any) -> None:
        received.append(signum)
        with suppress(ProcessLookupError):
            os.killpg(launcher.pid, signum)

    before = {one: signal.signal(one, pass_on) for one in (signal.SIGTERM, signal.SIGINT)}
    try:
        code = launcher.wait()
        deadline = time.monotonic() + SAVING_S
        while received and time.monotonic() < deadline and _is_alive(launcher.pid):
            time.sleep(0.1)  # accelerate's launcher of one process does not wait for that
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
    return 128 + received[-1] if received else code


def _is_alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def _take(argv: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """The launcher's flags, by name, from YAML files and the command line; and what else is on the latter."""
    tokens = [part for token in argv for part in (token.split("=", 1) if token.startswith("--") else [token])]
    wanted: dict[str, str] = {}
    rest: list[str] = []
    files: list[str] = []
    iterator = iter(tokens)
    for token in iterator:
        if token.removeprefix("--") in LAUNCH_FLAGS and token.startswith("--"):
            value = next(iterator, None)
            if value is None or value.startswith("--"):
                raise ValueError(f"{token} needs a value")
            wanted[token[2:]] = value
            continue
        rest.append(token)
        if token == "--config" and (file := next(iterator, None)) is not None:
            rest.append(file)
            files.append(file)
    of_files = {name: value for file in files for name, value in _keys(Path(file)).items()}
    return of_files | wanted if "LOCAL_RANK" not in os.environ else wanted, rest


def _keys(file: Path) -> dict[str, str]:
    """The launcher's settings in a YAML file; the others, and its faults, are for `arguments.parse`."""
    try:
        settings = yaml.safe_load(file.read_text())
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return {name: str(settings[name]) for name in LAUNCH_FLAGS if isinstance(settings, dict) and name in settings}
