import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import yaml

from fastgrpo.config import GRPOConfig
from fastgrpo.safe_text.redaction import redacted

TOKEN = "hf_" + "abcDEF123456" * 3


@pytest.mark.parametrize(
    "name",
    ["hub_token", "token", "HF_TOKEN", "api_key", "wandb-api-key", "client_secret", "password", "auth_token"],
)
def test_secrets_are_hidden_by_name(name: str) -> None:
    assert redacted({name: "quite plain", "nested": {name: "x"}}) == {name: "(hidden)", "nested": {name: "(hidden)"}}
    assert redacted({name: None}) == {name: None}
    assert redacted({name: True}) == {name: True}


def test_what_is_no_secret_stays() -> None:
    settings = {
        "token_budget": 5, "eos_token": "<|end|>", "image_token": "<image>", "num_tokens": [1.5],
        "hub_model_id": "me/x",
        "sort_key": "length", "chat_template": "{{ x }}", "max_completion_length": 3, "path": "/data/hf_home/x",
        "url": "https://example.com:443/a@b",
    }  # fmt: skip
    assert redacted(settings) == settings


def test_secrets_are_hidden_by_value_wherever_they_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    found = redacted({
        "hub_token": "my-own-token",
        "run_name": "with my-own-token in it",
        "model_init_kwargs": {"proxies": {"https": "https://me:pass@proxy:80"}, "list": [f"by {TOKEN}"]},
        "note": "0123456789abcdef",
    })  # fmt: skip
    assert found["run_name"] == "with (hidden) in it"
    assert found["model_init_kwargs"] == {
        "proxies": {"https": "https://(hidden)@proxy:80"},
        "list": ["by (hidden)"],
    }
    assert found["note"] == "(hidden)"


def config(folder: Path, **settings: Any) -> GRPOConfig:
    return GRPOConfig(output_dir=str(folder), use_cpu=True, report_to=[], **settings)


def test_a_config_is_written_and_pickled_without_them_and_copied_with_them(tmp_path: Path) -> None:
    made = config(tmp_path, hub_token="my-own-token", model_init_kwargs={"token": TOKEN, "revision": "main"})
    for text in (json.dumps(made.to_dict(), default=str), made.to_json_string(), str(made.to_sanitized_dict())):
        assert "my-own-token" not in text
        assert TOKEN not in text
    assert made.to_dict()["model_init_kwargs"] == {"token": "(hidden)", "revision": "main"}
    pickled = pickle.dumps(made)
    assert b"my-own-token" not in pickled
    assert TOKEN.encode() not in pickled
    for one in (copy.copy(made), copy.deepcopy(made)):
        assert (one.hub_token, one.model_kwargs["token"]) == ("my-own-token", TOKEN)


def test_a_lab_keeps_none(tmp_path: Path) -> None:
    from fastgrpo.lab.config import read_lab
    from fastgrpo.lab.runs import runs_of

    settings = {"model_name_or_path": "m", "dataset_name": "d", "hub_token": TOKEN}
    lab = {"output_dir": str(tmp_path / "lab"), "seeds": [0], "settings": settings, "arms": {"one": {}}}
    (tmp_path / "lab.yaml").write_text(yaml.safe_dump(lab))
    (run,) = runs_of(read_lab(tmp_path / "lab.yaml"))
    run.keep_settings()
    run.check_settings()
    assert TOKEN not in (run.folder / "lab_settings.json").read_text()
