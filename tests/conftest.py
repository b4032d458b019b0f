"""What all tests share: no network, one thread, and a tiny random model with synthetic data."""

import os
from pathlib import Path

# Before anything imports the hub's client, which reads these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch

# Read when a kernel is defined: without a GPU, Triton's kernels run under its interpreter, on CPU tensors.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from collections.abc import Iterator

import pyarrow.parquet as pq
import pytest
from transformers import Qwen2VLForConditionalGeneration
from transformers.utils import logging

from fastgrpo.demo.base_model import build_config, build_tokenizer, save_model
from fastgrpo.demo.scenes import write_cvbench_parquet, write_sat_parquet

try:
    import datasets
except ImportError:  # as on a machine that only measures: what needs it is skipped
    datasets = None

torch.set_num_threads(1)
logging.disable_progress_bar()
if datasets is not None:
    datasets.disable_progress_bars()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips the tests marked `gpu` without a GPU: from one place, so that the summary says it in one line."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


SAT_ROWS = 64
CVBENCH_ROWS = 24


@pytest.fixture(scope="session", autouse=True)
def _datasets_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keeps what `datasets` caches out of the user's home."""
    if datasets is None:
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


@pytest.fixture(scope="session")
def sat_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 training rows in SAT's schema, one picture each."""
    path = tmp_path_factory.mktemp("data") / "sat.parquet"
    write_sat_parquet(path, SAT_ROWS, seed=0)
    return path


@pytest.fixture(scope="session")
def cvbench_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 held-out rows in CV-Bench's schema."""
    path = tmp_path_factory.mktemp("data") / "cvbench.parquet"
    write_cvbench_parquet(path, CVBENCH_ROWS, seed=0)
    return path


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory, sat_file: Path) -> Path:
    """A Qwen2-VL of random weights in hub format: two text layers of 64, one vision layer of 32, float32."""
    columns = pq.read_table(sat_file, columns=["question", "answers"]).to_pylist()
    tokenizer = build_tokenizer([f"{row['question']} {', '.join(row['answers'])}" for row in columns] * 20, 400)
    config = build_config(
        tokenizer,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    config.vision_config.depth, config.vision_config.embed_dim, config.vision_config.num_heads = 1, 32, 2
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Qwen2VLForConditionalGeneration(config)
    path = tmp_path_factory.mktemp("models") / "tiny"
    save_model(path, model, tokenizer)
    return path
