"""What a run says before its first step."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from fastgrpo.cli.arguments import parse
from fastgrpo.cli.assembly import build_trainer, load_training_rows
from fastgrpo.cli.banner import banner
from fastgrpo.cli.chat_models import says_chat
from fastgrpo.model.load import load_processing

Facts = Callable[..., dict[str, str]]


@pytest.fixture
def facts(tiny_model_dir: Path, sat_file: Path, tmp_path: Path) -> Facts:
    """The banner of a run, first word → the rest of its line."""

    def told(*flags: str, model: Path = tiny_model_dir, data: Path = sat_file) -> dict[str, str]:
        given = ["--model_name_or_path", str(model), "--dataset_name", str(data), "--output_dir", str(tmp_path)]
        config, script = parse([*given, "--report_to", "none", "--use_cpu", "--num_generations", "4", *flags])
        lines = banner(build_trainer(config, script, load_training_rows(script, config.seed)), script)
        return {first: rest.strip() for first, _, rest in (line.partition(" ") for line in lines)}

    return told


def test_a_run_as_it_is_by_default(facts: Facts, tiny_model_dir: Path) -> None:
    told = facts("--max_completion_length", "9", "--per_device_train_batch_size", "8")
    assert list(told) == ["model", "device", "rollout", "update", "prompts"]
    assert told["model"].startswith(f"{tiny_model_dir}: ")
    assert told["model"].endswith("K parameters, all trained")
    assert "CPU" in told["device"]
    assert re.search(r", float32, \d+\.\d GiB free$", told["device"])
    assert told["rollout"] == "2 prompts × 4 completions of at most 9 tokens, paged sampler, torch kernels"
    assert told["update"] == "packed, cpu attention, torch kernels"
    assert told["prompts"] == "base mode: plain text without roles, template paper"


def test_adapters_plain_path_and_modes(facts: Facts) -> None:
    told = facts("--use_peft", "--engine", "plain", "--prompt_mode", "instruct")
    assert "of them trained" in told["model"]
    assert told["rollout"].endswith("transformers' generate (slow)")
    assert told["update"] == "padded batches in plain transformers (slow)"
    assert told["prompts"] == "instruct mode: the model's chat template"
    assert facts("--prompt_template", "answer")["prompts"].endswith("template answer")


def test_the_paths_of_another_family(facts: Facts, tiny_model_dir: Path, tmp_path: Path) -> None:
    processing = load_processing(str(tiny_model_dir))
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(processing.tokenizer), eos_token_id=0, **sizes))
    model.save_pretrained(tmp_path / "llama")
    processing.tokenizer.save_pretrained(tmp_path / "llama")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "How many?", "solution": "2"}\n' * 4)
    told = facts(model=tmp_path / "llama", data=rows)
    assert "paged sampler" in told["rollout"]
    assert told["update"].startswith("packed")
    assert told["prompts"] == "as the rows' `prompt` column has them"


def test_bf16_on_a_cpu_is_warned_of(facts: Facts) -> None:
    assert "--bf16 false" in facts("--bf16")["warning:"]


def renamed(model: Path, folder: Path, card: str | None = None) -> Path:
    folder.symlink_to(model) if card is None else folder.mkdir()
    if card is not None:
        for file in model.iterdir():
            (folder / file.name).symlink_to(file)
        (folder / "README.md").write_text(card)
    return folder


def test_a_chat_model_asked_in_base_mode_gets_one_warning(facts: Facts, tiny_model_dir: Path, tmp_path: Path) -> None:
    model = renamed(tiny_model_dir, tmp_path / "Tiny-VL-Instruct")
    assert "pass --prompt_mode instruct" in facts(model=model)["warning:"]
    assert "warning:" not in facts("--prompt_mode", "instruct", model=model)


@pytest.mark.parametrize(
    ("name", "card", "is_chat"),
    [
        ("Qwen2-VL-2B-Instruct", None, True),
        ("gemma-3-4b-it", None, True),
        ("llava-chat", None, True),
        ("Qwen2-VL-2B", None, False),
        ("items", None, False),
        ("model", "---\ntags:\n- chat\n---\n# Tiny\n", True),
        ("model", "---\nlicense: mit\n---\n\n# Tiny-VL-Instruct\n\nText.\n", True),
        ("model", "# Tiny-VL\n\nThis is the base of Tiny-VL-Instruct, see there for chat.\n", False),
        ("model", "---\n: [\n---\n", False),
    ],
)
def test_what_says_chat(tiny_model_dir: Path, tmp_path: Path, name: str, card: str | None, is_chat: bool) -> None:
    assert says_chat(str(renamed(tiny_model_dir, tmp_path / name, card))) is is_chat
