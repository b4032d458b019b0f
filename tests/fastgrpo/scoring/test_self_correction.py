"""Self-correction on hand-made texts: what counts as proposed, and how the answer differs from it."""

import pytest

from fastgrpo.scoring.self_correction import first_proposal, self_correction

COLOURS = ["red", "blue", "light blue"]
POLAR = ["yes", "no"]
COUNTS = ["1", "2", "3", "13"]


@pytest.mark.parametrize(
    ("reasoning", "options", "place"),
    [
        ("The answer is (B).", COLOURS, 1),
        ("the answer is B. wait", COLOURS, 1),
        ("So it is red", COLOURS, 0),
        ("so light blue.", COLOURS, 2),
        ("Thus, the answer is the blue", COLOURS, 1),
        ("I guess it is red.", COLOURS, 0),
        ("I’d say red", COLOURS, 0),
        ("It seems to be\n  blue", COLOURS, 1),
        ("probably 2.", COUNTS, 1),
        ("it is 13", COUNTS, 3),
        ("it looks like yes", POLAR, 0),
        ("So red. Wait, let me check again. So blue.", COLOURS, 0),
        ("The red ball is left of the blue one.", COLOURS, None),
        ("Is it red or blue? The answer is one of red, blue.", COLOURS, None),
        ("so red or blue", COLOURS, None),
        ("so red or blue; it is blue", COLOURS, 1),
        ("so red?", COLOURS, None),
        ("the answer is not red", COLOURS, None),
        ("it is reddish", COLOURS, None),
        ("so 1.5 metres", ["1.5", "1"], 0),
        ("i think a ball", COLOURS, None),
        ("", COLOURS, None),
    ],
)
def test_first_proposal(reasoning, options, place):
    assert first_proposal(reasoning, options) == place


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("so red. wait, let me check: so blue. </think> <answer>blue</answer>", "wrong to right"),
        ("so blue. wait, so red. </think> <answer>(A)</answer>", "right to wrong"),
        ("so red. </think> <answer>light blue</answer>", "wrong to wrong"),
        ("so blue. wait, so red. no, so blue </think> <answer>blue</answer>", None),
        ("so blue. </think> <answer>Blue.</answer>", None),
        ("the red ball is nearer </think> <answer>blue</answer>", None),
        ("so red. so blue.", None),
        ("so red </think> <answer>green</answer>", None),
    ],
)
def test_self_correction(text, expected):
    assert self_correction(text, COLOURS, "(B)") == expected
