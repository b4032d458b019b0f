"""Which answers stand in a completion, and which of them are the gold one."""

import logging
import threading

import pytest

from fastgrpo.scoring.answers import answers_match, letter_index, parse_answer

PARSED = [
    ("<answer>left</answer>", "left"),
    ("<think>x</think> <answer> (A) </answer>\n", "(A)"),
    ("<answer>\nleft\n</answer>", "left"),
    ("<answer>two\nlines</answer>", "two\nlines"),
    ("so the answer is left", None),
    ("<answer></answer>", None),
    ("<answer> \n </answer>", None),
    ("<answer>left", None),
    ("left</answer>", None),
    ("</answer>left<answer>", None),
    ("<answer>left</answer><answer>right</answer>", None),
    ("<answer>left</answer><answer>left</answer>", None),
    ("<answer><answer>left</answer></answer>", None),
    ("<answer>left</answer> or <answer>", None),
    ("", None),
]


@pytest.mark.parametrize(("text", "answer"), PARSED)
def test_parse_answer(text: str, answer: str | None) -> None:
    assert parse_answer(text) == answer


SAME_TEXT = [
    ("yes", "yes"),
    ("yes.", "yes"),
    ("Yes!", "yes"),
    ("YES", "yes"),
    ("  yes \n", "yes"),
    ("yes", "Yes."),
    ('"yes"', "yes"),
    ("“yes”", "yes"),
    ("**left**", "left"),
    ("`left`.", "left"),
    ("the left", "left"),
    ("left", "the left"),
    ("a dog", "the dog"),
    ("an apple", "Apple"),
    ("moved  to\nthe left", "moved to the left"),
    ("man’s hat", "man's hat"),
    ("ｌｅｆｔ", "left"),
    ("Größe", "GRÖSSE"),
    ("\\text{left}", "left"),
    ("\\boxed{left}", "left"),
    ("$\\boxed{\\text{left}}$", "left"),
    ("\\(\\text{left}\\)", "left"),
    ("\\[left\\]", "left"),
    ("left。", "left"),
    ("The answer is left.", "left"),
    ("So, the final answer is: **left**.", "left"),
    ("Answer = left", "left"),
    ("My answer is the left", "left"),
]
DIFFERENT_TEXT = [
    ("yes and no", "yes"),
    ("yesterday", "yes"),
    ("not left", "left"),
    ("left or right", "left"),
    ("the answer is not left", "left"),
    ("the answer is on the left", "left"),
    ("I think the answer is left", "left"),
    ("a", "left"),
    ("the", "left"),
    ("left", "right"),
    ("", "left"),
    ("", ""),
    (".", ""),
    ("   ", "."),
    ("no", "yes"),
]


@pytest.mark.parametrize(("answer", "solution"), SAME_TEXT)
def test_texts_that_match(answer: str, solution: str) -> None:
    assert answers_match(answer, solution)
    assert answers_match(answer, solution, ["something else", solution])


@pytest.mark.parametrize(("answer", "solution"), DIFFERENT_TEXT)
def test_texts_that_do_not_match(answer: str, solution: str) -> None:
    assert not answers_match(answer, solution)
    assert not answers_match(answer, solution, [solution or "left", "something else"]) or answer == "a"


LETTERS_OF_A = ["(A)", "(a)", "A", "a", "A.", "a.", "A)", "a)", "(A).", "A:", "[A]", " A ", "option A", "Option (A)"]
LETTERS_OF_A += [
    "A。",
    "{A}",
    "{A}.",
    "<A>",
    "The answer is (A).",
    "The answer is A",
    "the answer is (a)",
    "Final answer: A",
]
LETTERS_OF_A += ["The correct option is A.", "the answer is **A**", "The answer is $\\boxed{A}$.", "The answer is Ａ。"]
LETTERS_OF_A += ["Choice A.", "answer: A", "**A**", "Ａ", "\\boxed{A}", "\\text{(A)}", '"A"']


@pytest.mark.parametrize("answer", LETTERS_OF_A)
@pytest.mark.parametrize("solution", ["(A)", "A", "chair"])
def test_option_letters_in_any_usual_form(answer: str, solution: str) -> None:
    choices = ["chair", "table", "lamp"]
    assert answers_match(answer, solution, choices)
    assert not answers_match(answer, "(B)", choices)
    assert not answers_match(answer, "table", choices)
    if solution != "chair":
        assert answers_match(answer, solution)
        assert not answers_match(answer, "(B)")


CHOICES = ["chair", "table", "a big lamp"]
WITH_CHOICES = [
    ("chair", "(A)", True),
    ("The chair.", "(A)", True),
    ("(A) chair", "(A)", True),
    ("A. chair", "(A)", True),
    ("A: the chair", "chair", True),
    ("Option A: chair", "chair", True),
    ("chair", "(A) chair", True),
    ("big lamp", "(C)", True),
    ("(C) a big lamp", "C", True),
    ("c) big lamp", "C", True),
    ("A - chair", "(A)", True),
    ("A – the chair", "(A)", True),
    ("(A) - chair", "chair", True),
    ("A, chair", "(A)", True),
    ("{A} chair", "(A)", True),
    ("chair (A)", "(A)", True),
    ("The answer is (A) chair.", "(A)", True),
    ("The answer is A - chair.", "(A)", True),
    ("table (A)", "(A)", False),
    ("A - table", "(A)", False),
    ("the answer is a", "(A)", False),
    ("The answer is a.", "(A)", False),
    ("The answer is a table", "(A)", False),
    ("The answer is: a", "(A)", False),
    ("a chair and a table", "(A)", False),
    ("A picture of a chair", "(A)", False),
    ("(A) table", "(A)", False),
    ("(A) table", "(B)", False),
    ("A chair", "(B)", False),
    ("a table", "(A)", False),
    ("a b", "(B)", False),
    ("a or b", "(A)", False),
    ("A, B", "(A)", False),
    ("AB", "(A)", False),
    ("(A)(B)", "(A)", False),
    ("It is a chair", "(A)", False),
    ("I think a", "(A)", False),
    ("(F)", "(A)", False),
    ("D", "(A)", False),
    ("1", "(A)", False),
]


@pytest.mark.parametrize(("answer", "solution", "same"), WITH_CHOICES)
def test_letters_and_option_texts_stand_for_each_other(answer: str, solution: str, same: bool) -> None:
    assert answers_match(answer, solution, CHOICES) is same


def test_options_that_are_numbers() -> None:
    choices = ["3", "2", "0.5", "1,000"]
    assert answers_match("3", "(A)", choices)
    assert answers_match("three", "(A)", choices)
    assert answers_match("3.0", "A", choices)
    assert answers_match("B", "2", choices)
    assert answers_match("1/2", "(C)", choices)
    assert answers_match("1000", "(D)", choices)
    assert not answers_match("2", "(A)", choices)
    assert not answers_match("(B)", "(C)", choices)


@pytest.mark.parametrize(
    "answer", ["C", "three", "C. three", "C. 3", "C - 3", "(C) three", "3 (C)", "The answer is 3.0"]
)
def test_letters_and_numbers_stand_for_each_other(answer: str) -> None:
    assert answers_match(answer, "3", ["1", "2", "3", "4"])
    assert answers_match(answer, "C", ["1", "2", "3", "4"])
    assert not answers_match(answer, "2", ["1", "2", "3", "4"])
    assert not answers_match("C. two", "3", ["1", "2", "3", "4"])


def test_options_that_are_letters_are_read_as_texts_first() -> None:
    assert answers_match("B", "(A)", ["B", "C"])
    assert answers_match("(A)", "B", ["B", "C"])


def test_without_choices_a_bracketed_letter_before_a_text_counts() -> None:
    assert answers_match("(A) left", "(A)")
    assert not answers_match("(B) left", "(A)")
    assert not answers_match("x: 5", "x: 3")
    assert not answers_match("a left", "(A)")


SAME_NUMBER = [
    ("3", "3.0"),
    ("3.", "3"),
    ("three", "3"),
    ("Twenty", "20"),
    ("zero", "0"),
    ("-3", "−3"),
    ("+3", "3"),
    (".5", "0.5"),
    ("1,000", "1000"),
    ("12,345,678.50", "12345678.5"),
    ("1/2", "0.5"),
    ("2 / 4", "1/2"),
    ("-1/2", "-0.5"),
    ("50%", "0.5"),
    ("50\\%", "0.5"),
    ("$3$", "3"),
    ("\\boxed{3}", "3"),
    ("\\frac{1}{2}", "0.5"),
    ("$\\frac12$", "1/2"),
    ("\\sqrt{4}", "2"),
    ("2^3", "8"),
    ("2\\pi", "\\pi\\cdot 2"),
    ("1\\frac{1}{2}", "1.5"),
    ("the 3", "3"),
    ("３", "3"),
    ("(3)", "3"),
]
DIFFERENT_NUMBER = [
    ("3", "4"),
    ("3", "-3"),
    ("3", "30"),
    ("3 4", "3"),
    ("3 4", "34"),
    ("3 4", "12"),
    ("3 or 4", "3"),
    ("1,5", "15"),
    ("1,00", "100"),
    ("3²", "32"),
    ("1½", "5.5"),
    ("1/0", "0"),
    ("1/0", "1"),
    ("0.333", "1/3"),
    ("2+", "2"),
    ("three dogs", "3"),
    ("twenty one", "21"),
    ("-", "0"),
    ("%", "0"),
    ("\\frac{1}{0}", "1"),
    ("nan", "3"),
    ("inf", "3"),
    ("1e3", "1000"),
]


@pytest.mark.parametrize(("answer", "solution"), SAME_NUMBER)
def test_numbers_match_by_value(answer: str, solution: str) -> None:
    assert answers_match(answer, solution)
    assert answers_match(solution, answer)


@pytest.mark.parametrize(("answer", "solution"), DIFFERENT_NUMBER)
def test_numbers_that_differ(answer: str, solution: str) -> None:
    assert not answers_match(answer, solution)


HOSTILE = [
    "9^9^9^9^9",
    "9^{9^{9^{9}}}",
    "9**9**9**9",
    "(9^9)^9^9",
    "9^{999999999}",
    "9^999999999",
    "9^9 999999999",
    "9^{9}{999999999}",
    "9^9\\left999999999",
    "9^{-9}99999999",
    "99999999!",
    "9" * 100_000,
    "1/" + "9" * 100_000,
    "1e999999999",
    "(" * 5_000 + "3" + ")" * 5_000,
    "\\text{" * 1_000 + "3" + "}" * 1_000,
    "\\sqrt{" * 6 + "2",
    "\x00\ud800",
    "<answer>" * 1_000,
]


@pytest.mark.parametrize("answer", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_answers_end_quickly_without_credit(answer: str) -> None:
    for solution in ("7", "\\frac{1}{2}", "(A)", "left"):
        assert not answers_match(answer, solution, ["chair", "table"])
    assert parse_answer(answer) is None


def test_matching_works_off_the_main_thread_and_without_warnings(caplog: pytest.LogCaptureFixture) -> None:
    results = []
    with caplog.at_level(logging.WARNING):
        thread = threading.Thread(target=lambda: results.append(answers_match("\\frac{1}{2}", "0.5")))
        thread.start()
        thread.join()
    assert results == [True]
    assert not caplog.records


@pytest.mark.parametrize(("text", "index"), [("A", 0), ("(c)", 2), ("Option D.", 3), ("chair", None), ("", None)])
def test_letter_index(text: str, index: int | None) -> None:
    assert letter_index(text) == index
