"""`fastgrpo doctor`: what this machine has, and what each missing part costs."""

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch
from rich.table import Table

from fastgrpo.cli.options import Parser
from fastgrpo.safe_text.terminal import Terminal
from fastgrpo.settings.trl_settings import trl_settings


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's table."""

    part: str
    found: str
    consequence: str


OPTIONAL = {
    "triton": ("liger-kernel's fused layers on a CUDA device", "no fused layers"),
    "flash-attn": ("flash_attention_2 on a CUDA device", "sdpa attention instead: slower on long sequences"),
    "liger-kernel": ("use_liger_kernel on a CUDA device", "use_liger_kernel is ignored"),
    "deepspeed": ("ZeRO 1 to 3 on several GPUs", "single device or plain data parallelism only"),
    "torchvision": ("the joint processors of transformers load", "none here: pictures are resized by PIL either way"),
    "nvtx": ("named ranges in Nsight Systems", "no ranges in Nsight Systems; times are recorded all the same"),
    "tensorboard": ("TensorBoard curves", "curves in metrics.jsonl and report.html only"),
    "wandb": ("report_to wandb", "report_to wandb falls back to TensorBoard"),
    "trl": ("comparisons against TRL", "no comparisons against TRL"),
}
"""Package → what it gives, what its absence costs."""


def run(argv: Sequence[str]) -> None:
    """Prints the table."""
    parser = Parser(prog="fastgrpo doctor", description="What is installed, and what each missing part costs.")
    parser.add_argument("model", nargs="?", help="hub id or folder: what becomes of this model instead")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the model")
    parser.add_argument("--trl", action="store_true", help="what becomes of every setting of TRL's GRPOConfig instead")
    options = parser.parse_args(argv)
    if options.trl:
        table = Table("setting of TRL", "here", "what is to know")
        for setting in trl_settings():
            table.add_row(setting.name, setting.status, setting.note)
        Terminal().print(table)
        return
    table = Table("part", "found", "what follows")
    findings = examine() if options.model is None else _examine_model(options.model, options.trust_remote_code)
    for finding in findings:
        table.add_row(finding.part, finding.found, finding.consequence)
    Terminal().print(table)


def _examine_model(name: str, trust_remote_code: bool) -> list[Finding]:
    from fastgrpo.cli.doctor_model import examine_model

    return [Finding(*row) for row in examine_model(name, trust_remote_code)]


def examine() -> list[Finding]:
    """Looks at the machine; loads nothing heavy."""
    return [
        Finding("python", platform.python_version(), ""),
        Finding("torch", torch.__version__, ""),
        _device(),
        *(Finding(name, version(name), "") for name in ("transformers", "accelerate", "datasets", "peft")),
        *(_package(name) for name in OPTIONAL),
    ]


def _device() -> Finding:
    if not torch.cuda.is_available():
        cores = os.cpu_count()
        return Finding(
            "device", f"cpu, {cores} cores, {torch.get_num_threads()} threads", "tiny models only: no CUDA device"
        )
    properties = torch.cuda.get_device_properties(0)
    bf16 = "bf16 by default" if torch.cuda.is_bf16_supported() else "no bf16: float32, slower"
    count = torch.cuda.device_count()
    return Finding("device", f"{count} × {properties.name}, {properties.total_memory / 2**30:.0f} GiB", bf16)


def _package(name: str) -> Finding:
    gives, costs = OPTIONAL[name]
    try:
        return Finding(name, version(name), gives)
    except PackageNotFoundError:
        return Finding(name, "missing", costs)
