"""Which engine and updater a run gets."""

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from fastgrpo.config import GRPOConfig
from fastgrpo.model.load import Processing, load_policy, load_processing
from fastgrpo.plain.engine import PlainEngine
from fastgrpo.plain.updater import PlainUpdater
from fastgrpo.sampler.engine import SamplerEngine
from fastgrpo.training.setup import build_engine, build_updater, sampling_params
from fastgrpo.types import Prompt
from fastgrpo.update.updater import PackedUpdater

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def processing(tiny_model_dir: Path) -> Processing:
    return load_processing(str(tiny_model_dir))


def config(tmp_path: Path, **settings: object) -> GRPOConfig:
    settings = {
        "output_dir": str(tmp_path),
        "use_cpu": True,
        "report_to": "none",
        "max_completion_length": 4,
    } | settings
    return GRPOConfig(**settings)


def llama(processing: Processing, **settings: object) -> PreTrainedModel:
    sizes = {"vocab_size": len(processing.tokenizer), "eos_token_id": 0, **SIZES}
    return LlamaForCausalLM(LlamaConfig(**sizes, **settings))


def test_the_fast_ones_are_the_default(tmp_path, tiny_model_dir, processing, caplog):
    model, settings = load_policy(str(tiny_model_dir)), config(tmp_path, sampler_max_rows=3, token_budget=77)
    engine = build_engine(model, processing.tokenizer, settings, Accelerator())
    updater = build_updater(model, None, settings, Accelerator())
    assert isinstance(engine, SamplerEngine)
    assert engine.options.max_rows == 3
    assert isinstance(updater, PackedUpdater)
    assert updater.token_budget == 77
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_the_reference_ones_on_request(tmp_path, tiny_model_dir, processing):
    model, settings = load_policy(str(tiny_model_dir)), config(tmp_path, engine="plain")
    assert isinstance(build_engine(model, processing.tokenizer, settings, Accelerator()), PlainEngine)
    assert isinstance(build_updater(model, None, settings, Accelerator()), PlainUpdater)


@pytest.mark.parametrize(("value", "guesses"), [("auto", 0), ("off", 0), (False, 0), ("4", 4), (4, 4)])
def test_guesses_are_off_unless_asked_for(tmp_path, tiny_model_dir, processing, caplog, value, guesses):
    model = load_policy(str(tiny_model_dir))
    engine = build_engine(model, processing.tokenizer, config(tmp_path, speculate=value), Accelerator())
    assert engine.options.speculate == guesses
    build_engine(model, processing.tokenizer, config(tmp_path, speculate=value, engine="plain"), Accelerator())
    assert ("speculate" in caplog.text) == (guesses > 0)


def test_a_model_the_sampler_does_not_know_falls_back_with_one_warning(tmp_path, processing, caplog):
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    model, settings = llama(processing, rope_parameters=rope), config(tmp_path)
    engine = build_engine(model, processing.tokenizer, settings, Accelerator())
    assert isinstance(engine, PlainEngine)
    (record,) = caplog.records
    assert "its rotary embedding is of type dynamic" in record.message
    assert "Lost are" in record.message
    ids = torch.tensor([5, 6, 7])
    engine.sync()
    prompt = Prompt(0, ids, torch.arange(3).expand(3, -1), None, None, "")
    assert len(list(engine.generate([prompt], 2, sampling_params(settings), 0))) == 1


def test_a_model_that_cannot_be_packed_falls_back_with_one_warning(tmp_path, processing, caplog):
    settings = config(tmp_path)
    updater = build_updater(llama(processing, attention_dropout=0.1), None, settings, Accelerator())
    assert isinstance(updater, PlainUpdater)
    (record,) = caplog.records
    assert "attention_dropout=0.1" in record.message


def test_half_precision_runs_sample_in_half_precision(tmp_path, processing):
    sizes = {"vocab_size": len(processing.tokenizer), "num_key_value_heads": 1, **SIZES}
    model, settings = Qwen2ForCausalLM(Qwen2Config(**sizes)), config(tmp_path, bf16=True)
    engine = build_engine(model, processing.tokenizer, settings, Accelerator())
    assert isinstance(engine, SamplerEngine)
    assert engine.decoder.dtype == torch.bfloat16
