"""`rollout_func`: completions of the user's, behind which everything else is as ever."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from run_files import changed, parameters

from fastgrpo.training.custom_rollout import draw_completions


def scripted(prompts: list[Any], trainer: Any, **fields: Any) -> dict[str, Any]:
    """Completions 3 4 5 END, 4 5 6 END, … whatever is asked."""
    end = trainer.processing_class.eos_token_id
    return {
        "prompt_ids": [trainer.processing_class(prompt)["input_ids"] for prompt in prompts],
        "completion_ids": [[40 + i, 41 + i, 42 + i, end] for i in range(len(prompts))],
        "logprobs": [[-1.0] * 4 for _ in prompts],
        **fields,
    }


def test_it_is_asked_for_each_completion(build: Any) -> None:
    calls: list[tuple[list[Any], Any]] = []

    def rollout(prompts: list[Any], trainer: Any) -> dict[str, Any]:
        calls.append((prompts, trainer))
        return scripted(prompts, trainer)

    trainer = build(rollout_func=rollout, shuffle_dataset=False)
    trainer.train()
    ((prompts, handed),) = calls
    assert prompts == ["Beautiful is"] * 2 + ["Explicit is better than"] * 2
    assert handed is trainer


def test_its_completions_are_scored_trained_on_and_logged(build: Any) -> None:
    seen: dict[str, Any] = {}

    def reward(completion_ids: Any, completions: Any, **_: Any) -> list[float]:
        seen.update(ids=completion_ids, texts=completions)
        return [float(ids[0]) for ids in completion_ids]

    trainer = build(reward_funcs=reward, rollout_func=scripted)
    before = parameters(trainer)
    trainer.train()
    end = trainer.processing.tokenizer.eos_token_id
    assert [ids[0] for ids in seen["ids"]] == [40, 41, 42, 43]
    assert seen["texts"][0] == trainer.processing.tokenizer.decode([40, 41, 42])
    line = trainer.state.log_history[0]
    assert line["completions/mean_length"] == 4
    assert line["completions/clipped_ratio"] == 0
    assert line["reward"] == 41.5
    assert seen["ids"][0][-1] == end
    assert len(changed(before, trainer)) == len(before)


def test_their_log_probs_are_compared_with_the_policys(build: Any) -> None:
    trainer = build(rollout_func=scripted)
    trainer.train()
    line = trainer.state.log_history[0]
    assert line["sampling/sampling_logp_difference/mean"] > 1, "-1 is far from what random weights say"


def test_conversations_stay_conversations(build: Any, chats: list[Any]) -> None:
    def rollout(prompts: list[Any], trainer: Any) -> dict[str, Any]:
        assert prompts[0] == chats[0]["prompt"]
        texts = [
            trainer.processing_class.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
            for prompt in prompts
        ]
        return scripted(texts, trainer)

    trainer = build(train_dataset=chats, rollout_func=rollout, shuffle_dataset=False)
    trainer.train()
    assert trainer.state.global_step == 1


def test_other_fields_reach_the_rewards(build: Any) -> None:
    seen: dict[str, Any] = {}

    def reward(completions: Any, turns: Any, note: Any, **_: Any) -> list[float]:
        seen.update(turns=turns, note=note)
        return [float(turn) for turn in turns]

    def rollout(prompts: list[Any], trainer: Any) -> dict[str, Any]:
        return scripted(prompts, trainer, turns=list(range(len(prompts))), note="all")

    build(reward_funcs=reward, rollout_func=rollout).train()
    assert seen == {"turns": [0, 1, 2, 3], "note": ["all"] * 4}


def test_tokens_of_an_environment_are_not_trained_on(build: Any) -> None:
    def masked(mask: list[int]) -> Any:
        def rollout(prompts: list[Any], trainer: Any) -> dict[str, Any]:
            return scripted(prompts, trainer, env_mask=[mask for _ in prompts])

        return rollout

    def reward(completion_ids: Any, **_: Any) -> list[float]:
        return [float(ids[0]) for ids in completion_ids]

    none = build(reward_funcs=reward, rollout_func=masked([0, 0, 0, 0]))
    before = parameters(none)
    none.train()
    assert not changed(before, none)
    some = build(reward_funcs=reward, rollout_func=masked([1, 0, 0, 1]))
    some.train()
    assert some.state.log_history[0]["completions/mean_length"] == 2, "the policy's own"
    assert changed(before, some)


def test_the_gradient_of_masked_tokens_is_that_without_them(build: Any) -> None:
    """The last two tokens are the environment's: as if the completion had ended before."""

    def reward(completion_ids: Any, **_: Any) -> list[float]:
        return [float(ids[0]) for ids in completion_ids]

    def whole(prompts: list[Any], trainer: Any) -> dict[str, Any]:
        return scripted(prompts, trainer, env_mask=[[1, 1, 0, 0] for _ in prompts])

    def cut(prompts: list[Any], trainer: Any) -> dict[str, Any]:
        output = scripted(prompts, trainer)
        return {name: [row[:2] for row in rows] if "prompt" not in name else rows for name, rows in output.items()}

    ends = []
    for rollout in (whole, cut):
        trainer = build(reward_funcs=reward, rollout_func=rollout, shuffle_dataset=False, optim="sgd")
        trainer.train()
        ends.append(parameters(trainer))
    for name, value in ends[0].items():
        torch.testing.assert_close(value, ends[1][name], atol=1e-6, rtol=1e-5)


def test_candidates_of_which_one_was_drawn(build: Any) -> None:
    def rollout(prompts: list[Any], trainer: Any) -> dict[str, Any]:
        output = scripted(prompts, trainer)
        tokens = [[[1, token] for token in ids] for ids in output["completion_ids"]]
        return output | {"logprob_token_ids": tokens, "logprobs": [[[-9.0, -2.0] for _ in ids] for ids in tokens]}

    trainer = build(rollout_func=rollout)
    drawn = list(trainer.engine.generate([trainer.builder.build(trainer.rows.convert(*trainer.rows[0]))], 2, None, 0))
    assert drawn[0].completions[1].sampling_logprobs.tolist() == [-2.0] * 4


@pytest.mark.parametrize("name", ["prompt_ids", "completion_ids", "logprobs"])
def test_what_is_missing_is_named(build: Any, name: str) -> None:
    def rollout(prompts: list[Any], trainer: Any) -> dict[str, Any]:
        output = scripted(prompts, trainer)
        del output[name]
        return output

    with pytest.raises(ValueError, match=f"rollout_func must return {name}"):
        build(rollout_func=rollout).train()


def test_a_wrong_number_of_completions_is_named(build: Any) -> None:
    def rollout(prompts: list[Any], trainer: Any) -> dict[str, Any]:
        return scripted(prompts[::2], trainer)

    with pytest.raises(ValueError, match="2 prompt_ids for 4 prompts"):
        build(rollout_func=rollout).train()


def test_a_groups_prompt_is_one(build: Any) -> None:
    def rollout(prompts: list[Any], trainer: Any) -> dict[str, Any]:
        output = scripted(prompts, trainer)
        output["prompt_ids"][1] = [*output["prompt_ids"][1], 9]
        return output

    with pytest.raises(ValueError, match="different prompt_ids for answers to row"):
        build(rollout_func=rollout).train()


def test_a_prompt_of_its_own_tokens(build: Any) -> None:
    def rollout(prompts: list[Any], trainer: Any) -> dict[str, Any]:
        return scripted(prompts, trainer, prompt_ids=[[7, 8, 9] for _ in prompts])

    trainer = build(rollout_func=rollout)
    trainer.train()
    assert trainer.state.num_input_tokens_seen == 4 * (3 + 4)


def test_pictures_stay_with_their_prompts(build: Any, tiny_model_dir: Path) -> None:
    rows = [
        {"prompt": [{"role": "user", "content": "?"}], "image": Image.new("RGB", (56, 56), c)} for c in ("red", "blue")
    ]

    def rollout(prompts: list[Any], trainer: Any) -> dict[str, Any]:
        assert prompts[0][0]["content"][0]["image"].size == (56, 56)
        drawn = draw_completions(trainer, prompts)
        return {name: [one[name] for one in drawn] for name in ("prompt_ids", "completion_ids", "logprobs")}

    trainer = build(model=str(tiny_model_dir), train_dataset=rows, rollout_func=rollout)
    trainer.train()
    # Placeholders of pictures are never drawn, which leaves their probability to the others.
    assert trainer.state.log_history[0]["sampling/sampling_logp_difference/max"] < 0.01


def test_the_policy_may_be_drawn_from_within(build: Any) -> None:
    """Two turns: what the model says, a tool's words, what it says then."""

    def rollout(prompts: list[Any], trainer: Any) -> dict[str, Any]:
        first = draw_completions(trainer, prompts)
        tool = trainer.processing_class(" 42 ")["input_ids"]
        then = draw_completions(trainer, [p + one["text"] + " 42 " for p, one in zip(prompts, first, strict=True)])
        return {
            "prompt_ids": [one["prompt_ids"] for one in first],
            "completion_ids": [
                a["completion_ids"] + tool + b["completion_ids"] for a, b in zip(first, then, strict=True)
            ],
            "logprobs": [a["logprobs"] + [0.0] * len(tool) + b["logprobs"] for a, b in zip(first, then, strict=True)],
            "env_mask": [
                [1] * len(a["logprobs"]) + [0] * len(tool) + [1] * len(b["logprobs"])
                for a, b in zip(first, then, strict=True)
            ],
        }

    trainer = build(rollout_func=rollout, max_steps=2)
    trainer.train()
    assert trainer.state.log_history[1]["completions/max_length"] <= 8


def test_evaluation_asks_it_too(build: Any) -> None:
    asked = []

    def rollout(prompts: list[Any], trainer: Any) -> dict[str, Any]:
        asked.append(len(prompts))
        return scripted(prompts, trainer)

    metrics = build(rollout_func=rollout, eval_dataset=[{"prompt": "a"}], num_generations_eval=3).evaluate()
    assert asked == [3]
    assert metrics["eval_completions/mean_length"] == 4
