"""A tiny text model that says a script, turn by turn, and how it calls tools."""

import json
from typing import Any

import torch
from transformers import Qwen2ForCausalLM

from fastgrpo.demo.base_model import load_tokenizer

END = "<|endoftext|>"
TEMPLATE = (
    "{% for tool in tools or [] %}({{ tool['function']['name'] }}) {% endfor %}"
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}"
    "{% for call in message['tool_calls'] or [] %}<tool_call>{{ call['function'] | tojson }}</tool_call>{% endfor %}"
    + END
    + "\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


def call(name: str, **arguments: Any) -> str:
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


class Scripted(Qwen2ForCausalLM):
    """Says what its script has for each turn, one text per row."""

    script: list[list[str]]
    asked: list[list[str]]

    def generate(self, input_ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        tokenizer = load_tokenizer()
        self.asked.append([text.removeprefix(END) for text in tokenizer.batch_decode(input_ids)])
        drawn = [tokenizer(text + END)["input_ids"] for text in self.script[len(self.asked) - 1]]
        longest = max(map(len, drawn))
        rows = [ids + [tokenizer.pad_token_id] * (longest - len(ids)) for ids in drawn]
        return torch.cat([input_ids, torch.tensor(rows)], dim=1)


CHAT = [{"prompt": [{"role": "user", "content": "3 by 4?"}]}]
