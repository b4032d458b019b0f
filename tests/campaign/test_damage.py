"""Damage of every kind to every file that a run reads again: what happens, a row each, and never a traceback."""

import os
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from campaign import LAST, RESULTS, Runs, content, last_lines, report, weights

STEPS, SAVED = 4, 3


def flip_a_bit(path: Path) -> None:
    found = bytearray(path.read_bytes())
    found[len(found) // 2] ^= 4
    path.write_bytes(found)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a bit": flip_a_bit,
    "cut": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: os.truncate(path, 0),
    "garbage": lambda path: path.write_bytes(b"\0\xffgarbage\n" * (1 + path.stat().st_size // 10)),
    "missing": lambda path: path.unlink(),
}
CHECKPOINT = f"checkpoint-{SAVED}"
OF_FULL = (
    *("config.json", "model.safetensors", "optimizer.pt", "rng_state.pth", "scheduler.pt", "trainer_state.json"),
    *("fastgrpo_state.json", "rollout/0_of_1.safetensors", "reference/model.safetensors"),
)
OF_ADAPTERS = ("adapter_config.json", "adapter_model.safetensors")
FALLS_BACK, GOES_ON, REFUSED = "falls back to the checkpoint before", "goes on", "one line"


@dataclass(frozen=True)
class Row:
    """A damage, and what it comes to."""

    file: str
    damage: str
    outcome: str
    run: str = "full"
    manifest: bool = True
    """The checkpoint has one."""
    everywhere: bool = False
    """All checkpoints are damaged so."""
    flags: tuple[str, ...] = LAST

    def __str__(self) -> str:
        more = ", no manifest" if not self.manifest else ", in all checkpoints" if self.everywhere else ""
        return f"{self.file}: {self.damage}{more}{', named' if self.flags != LAST else ''}"


ROWS = [
    *(Row(f"{CHECKPOINT}/{file}", damage, FALLS_BACK) for file in OF_FULL for damage in DAMAGES),
    *(Row(f"{CHECKPOINT}/{file}", damage, FALLS_BACK, "adapters") for file in OF_ADAPTERS for damage in DAMAGES),
    *(Row(f"{CHECKPOINT}/manifest.json", one, FALLS_BACK) for one in ("a bit", "cut", "empty", "garbage")),
    Row(f"{CHECKPOINT}/manifest.json", "missing", GOES_ON),
    *(
        Row(f"{CHECKPOINT}/{file}", damage, REFUSED, manifest=False)
        for file in OF_FULL
        for damage in ("cut", "empty", "garbage")
    ),
    *(
        Row(f"{CHECKPOINT}/{file}", "missing", REFUSED, manifest=False)
        for file in ("model.safetensors", "optimizer.pt")
    ),
    *(Row(f"{CHECKPOINT}/model.safetensors", damage, REFUSED, everywhere=True) for damage in DAMAGES),
    *(
        Row(f"{CHECKPOINT}/optimizer.pt", damage, REFUSED, flags=("--resume_from_checkpoint", "RUN/" + CHECKPOINT))
        for damage in DAMAGES
    ),
    *(Row("metrics.jsonl", damage, GOES_ON) for damage in DAMAGES),
    *(Row("completions/completions_00001.parquet", damage, GOES_ON) for damage in DAMAGES),
    *(Row("settings.json", damage, GOES_ON) for damage in ("cut", "garbage", "missing")),
    *(Row("run_id", damage, GOES_ON) for damage in ("empty", "garbage", "missing")),
    *(Row(".moving.json", damage, REFUSED) for damage in ("empty", "garbage")),
    *(Row("evals/before.json", damage, GOES_ON) for damage in ("empty", "garbage")),
    *(Row("DATA", damage, REFUSED) for damage in ("cut", "empty", "garbage", "missing")),
]


def what_happens(row: Row, runs: Runs, whole: Path, data: Path) -> str:
    """Damages a copy of a run that has saved three steps, and resumes it."""
    out = runs.stopped("damaged", whole, SAVED)
    flags = [flag.replace("RUN", str(out)) for flag in row.flags]
    path = out / row.file
    if row.file == "DATA":
        path = Path(shutil.copy(data, runs.folder / "data.parquet"))
        flags += ["--dataset_name", str(path)]
    elif not path.exists():
        path.parent.mkdir(exist_ok=True)
        path.write_text("{}")
    DAMAGES[row.damage](path)
    for other in out.glob("checkpoint-*"):
        if row.everywhere and other.name != CHECKPOINT:
            DAMAGES[row.damage](other / path.name)
    if not row.manifest:
        (out / CHECKPOINT / "manifest.json").unlink()
    code, said = runs.finish("damaged", *flags)
    if "Traceback" in said or code not in (0, 2):
        return f"exit code {code}, {said[-600:]}"
    if code == 2:
        named = row.file.split("/")[0] if not row.manifest else path.name
        return REFUSED if len(last_lines(said)) == 1 and named in last_lines(said)[0] else f"unclear: {said}"
    if any(out.glob("previous-*/metrics.jsonl")):
        return "starts anew"
    is_log = path.parent in (out, out / "completions")  # which lost what it lost
    if (weights if is_log else content)(out) != (weights if is_log else content)(whole):
        return "ends as another run"
    return FALLS_BACK if f"{out / CHECKPOINT}/" in said and "the newest whole checkpoint" in said else GOES_ON


def test_damaged_files(
    tiny_model_dir: Path, sat_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = {
        "full": ["--beta", "0.04", "--sync_ref_model", "true", "--ref_model_sync_steps", "2", "--num_iterations", "2"],
        "adapters": ["--use_peft", "true", "--lora_target_modules", "q_proj", "--lora_dropout", "0.1"],
    }
    made = {
        name: Runs(tmp_path / name, tiny_model_dir, sat_file, "--max_steps", str(STEPS), *more)
        for name, more in flags.items()
    }
    rows = ROWS if RESULTS else ROWS[3::28]
    whole = {name: runs.succeed("whole") for name, runs in made.items() if name in {row.run for row in rows}}
    table = {}
    for row in rows:
        table[str(row)] = what_happens(row, made[row.run], whole[row.run], sat_file)
        shutil.rmtree(made[row.run].folder / "damaged")
    report(capsys, "damage", table, damages=len(table), **Counter(table.values()))
    assert table == {str(row): row.outcome for row in rows}
