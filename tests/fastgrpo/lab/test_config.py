"""What a lab's file may say, and how arms come of it."""

import re

import pytest

from fastgrpo.lab.config import read_lab


def test_an_arm_has_the_settings_of_the_lab_of_its_program_and_its_own(lab_file):
    file = lab_file(
        settings={"learning_rate": 1e-5, "max_steps": 5},
        train_settings={"beta": 0.04, "num_generations": 8},
        arms={"rl": {"settings": {"beta": None, "max_steps": 7}}},
    )
    (arm,) = read_lab(file).arms
    assert arm.settings == {"learning_rate": 1e-5, "max_steps": 7, "num_generations": 8}


def test_an_axis_makes_an_arm_of_each_combination(lab_file):
    arms = {"rl": {"axes": {"beta": [0, 0.04], "reward_funcs": [["accuracy", "format"], ["format"]]}}}
    arms_of = {arm.name: arm.settings for arm in read_lab(lab_file(settings={"top_k": 50}, arms=arms)).arms}
    assert arms_of == {
        "rl-beta=0-reward_funcs=accuracy+format": {"top_k": 50, "beta": 0, "reward_funcs": ["accuracy", "format"]},
        "rl-beta=0-reward_funcs=format": {"top_k": 50, "beta": 0, "reward_funcs": ["format"]},
        "rl-beta=0.04-reward_funcs=accuracy+format": {
            "top_k": 50, "beta": 0.04, "reward_funcs": ["accuracy", "format"],
        },
        "rl-beta=0.04-reward_funcs=format": {"top_k": 50, "beta": 0.04, "reward_funcs": ["format"]},
    }  # fmt: skip


def test_a_config_file_stands_under_the_settings_beside_it(lab_file, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text("beta: 0.04\ntop_k: 50\noutput_dir: elsewhere\nseed: 3\n")
    (arm,) = read_lab(lab_file(settings={"beta": 0.1}, train_settings={"config": str(config)})).arms
    assert arm.settings == {"beta": 0.1, "top_k": 50}


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"seeds": []}, "seeds is missing"),
        ({"seeds": [0, 0]}, "seeds is [0, 0]"),
        ({"seeds": [0, "1"]}, "seeds is"),
        ({"seed": [0]}, "unknown field seed (did you mean seeds?)"),
        ({"arms": {}}, "arms is missing"),
        ({"arms": {"rl": {"setings": {}}}}, "arms: rl: unknown field setings (did you mean settings?)"),
        ({"arms": {"rl": {"settings": {"bета": 1}}}}, "arms: rl: settings: unknown field bета"),
        ({"arms": {"rl": {"settings": {"seed": 1}}}}, "arms: rl: settings: seed is given to each run by the lab"),
        ({"arms": {"rl": {"settings": "beta"}}}, "arms: rl: settings is 'beta'"),
        ({"arms": {"rl": {"command": "trian"}}}, "command is 'trian' (did you mean train?)"),
        ({"arms": {"rl": {"axes": {"beta": 0.1}}}}, "axes: beta is 0.1: give a list"),
        ({"arms": {"rl": {"axes": {"betta": [0.1]}}}}, "axes: unknown field betta (did you mean beta?)"),
        ({"arms": {"rl": {"evaluations": ["moss"]}}}, "evaluations: 'moss' is none of the lab's"),
        ({"arms": {"a/b": {}, "a_b": {}}}, "two are called 'a_b'"),
        ({"settings": {"save_only_model": True}}, "save_only_model is set"),
        ({"settings": {"config": "no-such.yaml"}}, "no-such.yaml: No such file"),
        ({"output_dir": 3}, "output_dir is 3"),
    ],
)
def test_a_mistake_is_named(lab_file, changed, named):
    with pytest.raises(ValueError, match=re.escape(named)):
        read_lab(lab_file(**changed))


def test_what_is_no_yaml_is_told(tmp_path):
    file = tmp_path / "lab.yaml"
    file.write_text("arms: [")
    with pytest.raises(ValueError, match=r"lab\.yaml is not YAML"):
        read_lab(file)
