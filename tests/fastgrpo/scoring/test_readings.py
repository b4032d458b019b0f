"""Which option an answer in free text settles on."""

import json
import string
from pathlib import Path

import pytest

from fastgrpo.scoring.answers import answers_match
from fastgrpo.scoring.readings import RULES, read_option

YES_NO = ["yes", "no"]
CLOSER = ["A is closer", "B is closer"]
SIDES = ["left", "right"]
COUNTS = ["0", "1", "2", "3"]
THINGS = ["the red car", "the blue truck", "a dog", "a cat"]
TRUTH = ["True", "False"]

YES_NO_READ = [
    ("**Answer: B**", "B"),
    ("Option B", "B"),
    ("The correct option is (B) no.", "B"),
    ("\\boxed{B}", "B"),
    ("B: yes", None),
    ("（B）no", "B"),
    ("答案是B。", "B"),
    ("答案：（B）", "B"),
    ("选B", "B"),
    ("Yes, the cat is on the mat.", "A"),
    ("both", None),
    ("neither", None),
    ("The answer is neither.", None),
    ("<answer>B</answer>", "B"),
    ("<think>it is yes</think><answer>(B) no</answer>", "B"),
    ("<answer>A</answer> <answer>B</answer>", None),
    ("<answer>maybe</answer> (B) no", None),
    ("B", "B"),
    ("b", "B"),
    ("b)", "B"),
    ("(b)", "B"),
    ("b.", "B"),
    ("a", "A"),
    ("B.", "B"),
    ("[B]", "B"),
    ("B)", "B"),
    ("(A) yes\n(B) no", None),
    ("(A) yes (B) no", None),
    ("yes or no", None),
    ("A or B", None),
    ("Options: A. yes B. no\nAnswer: B", "B"),
    ("(A) yes\n(B) no\n\n(B) no", "B"),
    ("Choose between the following options: yes or no. no", "B"),
    ("<s> No</s>", "B"),
    ("<|im_start|>(A) yes<|im_end|>", "A"),
    ("(A) no", None),
    ("A cat sits there", None),
    ("The answer is A. The answer is B.", None),
    ("The answer is A. Wait, that is wrong. The answer is B.", "B"),
    ("(A) yes. Actually, let me look again. The correct answer is (B) no.", "B"),
    ("Answer: A. Final answer: B", "B"),
    ("I would select choice (B) no, it is not far.", "B"),
    ("Therefore, option (B) is the correct answer.", "B"),
    ("(B) is correct.", "B"),
    ("Option A is incorrect.", None),
    ("The answer is not (A).", None),
    ("If the answer is (A), then the cat is up.", None),
    ("The answer is (C) None of the above.", None),
    ("C", None),
    ("(C)", None),
    ("", None),
    ("I apologize, but I cannot tell.", None),
    ("No.", "B"),
    ("No dining table is visible.", None),
    ("There is no dog in the image.", None),
    ("Yes\n\nNo", None),
    ("Yes. Therefore, the answer is no.", None),
    ("no</s>", "B"),
    ("Question: is it? Answer: (B) no\nQuestion: is that? Answer: (A) yes", "B"),
    ("The image shows a cat.\n\nB", "B"),
    ("Let's see.\nSo the answer is B", "B"),
    ("The final answer is $\\boxed{\\text{(B)}}$.", "B"),
    ("The correct answer is option B.", "B"),
    ("Answer:\nB", "B"),
    ("### Answer\n\n(B) no", "B"),
    ("Sure! The answer is **(B) no**.", "B"),
    ("A. yes", "A"),
    ("A) yes", "A"),
    ("A - yes", "A"),
    ("A yes", "A"),
    ("yes (A)", "A"),
    ("No (B)", "B"),
    ("yes (B)", None),
    ("The best choice is A", "A"),
    ("I think it's B.", "B"),
    ("It is (A).", "A"),
    ("I choose B because it is far.", "B"),
    ("B because it is far", "B"),
    ("The answer is b", "B"),
    ("The answer is a", None),
    ("The answer is “B”.", "B"),
    ("My answer: B", "B"),
    ("Answer - B", "B"),
    ("The answer would be (A) yes.", "A"),
    ("The answer to the question is no.", "B"),
    ("The correct answer is B, not A.", "B"),
    ("No, it isn't. (B)", "B"),
    ("Yes it is.", "A"),
    ("ASSISTANT: (B) no", "B"),
    ("The answer is (A) or (B).", None),
    ("It could be A or B.", None),
    ("选项B是正确的", "B"),
    ("答案为：B. no", "B"),
    ("正确答案是（A）", "A"),
    ("故选：B", "B"),
    ('{"answer": "B"}', "B"),
    ("Based on the picture the answer is no, there is no cat.", "B"),
    ("I'm sure that it is (B).", "B"),
    ("(A)(B)", None),
    ("A, B", None),
    ("A and B", None),
    ("(A) and (B)", None),
    ("The wrong answer is A.", None),
    ("So, yes.", "A"),
    ("So no dogs are there.", None),
    ("Yes and no.", None),
    ("The correct choice is A: yes", "A"),
    ("B. No, the laptop is on the desk.", "B"),
    ("A. No, the laptop is on the desk.", None),
]

CLOSER_READ = [
    ("Both A and B.", None),
    ("(B) A is closer", None),
    ("(B) is closer", "B"),
    ("A", "A"),
    ("A is closer", "A"),
    ("a is closer.", "A"),
    ("Point B is closer to the camera.", "B"),
    ("A cat is near.", None),
    ("neither A nor B is closer", None),
    ("Point A is closer than point B. Therefore point A is closer.", "A"),
    ("A: The point is on the car.\nB: The point is on the tree.", None),
    ("(A) A is closer: it is in front.\n(B) B is closer: it is not.\nTherefore, the answer is (A).", "A"),
    ("is B closer? I say B.", "B"),
    ("The person labeled B is closer.", "B"),
    ("The point labeled 'B' is closer to the camera.", "B"),
    ('Point "A" appears to be slightly closer.', "A"),
    ("A is hardly closer.", None),
    ("The one closer to the camera is A.", "A"),
    ("So the point closer to the camera is point B, since it is large.", "B"),
    ("Point B", "B"),
    ("The answer is point A.", "A"),
    ("A is the closer point.", "A"),
    ("A and B are equally close.", None),
    ("Point A: 3 m away. Point B: 5 m away.", None),
    ("B is not closer.", None),
    ("Which is closer, A or B?", None),
    ("It cannot be determined whether A is closer.", None),
    ("Point A is closer than point B. Point B is closer than point C.", None),
    ("Therefore, A is closer. Therefore, B is closer. So, the answer is (B).", "B"),
]

SIDES_READ = [
    ("The chair is to the left of the table.", "A"),
    ("The chair is on the right, not on the left.", "B"),
    ("left or right?", None),
    ("It is on the left side.", "A"),
    ("The left chair and the right chair.", None),
    ("Left", "A"),
    ("The answer is: left.", "A"),
    ("<think>the left one … the right</think> right", "B"),
    ("(A) left. The chair is right of the table", "A"),
]

COUNTS_READ = [
    ("There are 3 apples.", "D"),
    ("There are three apples.", "D"),
    ("(D) 3", "D"),
    ("3", "D"),
    ("Three", "D"),
    ("1. Look at the picture\n2. Count the apples: there are 3", "D"),
    ("The answer is 2.", "C"),
    ("The number is 2, since there are 2.", "C"),
    ("two", "C"),
    ("D", "D"),
    ("The answer is 3.5", None),
    ("10", None),
]

THINGS_READ = [
    ("The red car", "A"),
    ("red car.", "A"),
    ("It is the blue truck.", "B"),
    ("a dog", "C"),
    ("The dog is closer than the cat.", "C"),
    ("D. a cat", "D"),
    ("C: dog", "C"),
    ("(C) a dog. The cat is further away.", "C"),
]

TRUTH_READ = [
    ("True", "A"),
    ("False.", "B"),
    ("The statement is false.", "B"),
    ("The statement is not true", None),
]


@pytest.mark.parametrize(("text", "letter"), YES_NO_READ)
def test_yes_or_no(text: str, letter: str | None) -> None:
    assert read_option(text, YES_NO) == letter


@pytest.mark.parametrize(("text", "letter"), CLOSER_READ)
def test_options_that_start_with_a_letter(text: str, letter: str | None) -> None:
    assert read_option(text, CLOSER) == letter


@pytest.mark.parametrize(("text", "letter"), SIDES_READ)
def test_words_that_prose_uses(text: str, letter: str | None) -> None:
    assert read_option(text, SIDES) == letter


@pytest.mark.parametrize(("text", "letter"), COUNTS_READ)
def test_numbers(text: str, letter: str | None) -> None:
    assert read_option(text, COUNTS) == letter


@pytest.mark.parametrize(("text", "letter"), THINGS_READ)
def test_things(text: str, letter: str | None) -> None:
    assert read_option(text, THINGS) == letter


@pytest.mark.parametrize(("text", "letter"), TRUTH_READ)
def test_true_or_false(text: str, letter: str | None) -> None:
    assert read_option(text, TRUTH) == letter


def test_the_letter_belongs_to_the_place_not_to_the_text() -> None:
    assert (read_option("Yes", ["No", "Yes"]), read_option("B: yes", ["no", "yes"])) == ("B", "B")
    assert read_option("I", list("abcdefghijk")) == "I"


def test_without_options_nothing_is_read() -> None:
    assert read_option("(A)", []) is None


def test_options_may_hold_any_characters() -> None:
    options = ["f(x) = x^2", "a.b*c", "$5", "(none)"]
    for letter, option in zip(string.ascii_uppercase, options, strict=False):
        assert read_option(f"The answer is {option}", options) == letter
        assert read_option(f"({letter}) {option}", options) == letter


@pytest.mark.parametrize("answer", ["(B)", "b", "50%", "0.5", "1/2", "The answer is one half."])
def test_what_the_strict_grader_takes_is_read_so(answer: str) -> None:
    options = ["25%", "50%", "75%"]
    strict = answers_match(answer, "(B)", options)
    assert read_option(answer, options) == ("B" if strict else None)
    assert read_option(f"<think>75%?</think> <answer>{answer}</answer>", options) == ("B" if strict else None)


def test_very_long_answers() -> None:
    assert read_option("A " * 20_000 + "the answer is " * 2_000 + "(B)", YES_NO) == "B"
    assert read_option("(A) or (B), " * 5_000, YES_NO) is None


def test_the_documented_rules_are_those_of_the_code() -> None:
    documented = (Path(__file__).parents[3] / "docs" / "evaluation.md").read_text()
    assert [line for rule in RULES if (line := f"| {rule.name} | {rule.says} |") not in documented] == []


def test_agrees_with_the_published_reading_of_real_answers() -> None:
    folder = Path(__file__).parents[4] / "shared" / "data" / "blink"
    if not folder.is_dir():
        pytest.skip(f"{folder} is missing")
    files = {file: CLOSER if "Depth" in file.name else YES_NO for file in sorted(folder.glob("*.json"))}
    pairs = [
        (read_option(row["full_prediction"], options) or "Z", row["prediction"])
        for file, options in files.items()
        for row in json.loads(file.read_text())
    ]
    agreeing = sum(f"({read})" == published for read, published in pairs)
    assert len(pairs) == 1869
    assert agreeing >= 0.985 * len(pairs)
