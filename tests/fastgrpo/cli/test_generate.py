"""`fastgrpo generate`."""

import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from PIL import Image

from fastgrpo.cli.generate import answers
from fastgrpo.cli.inference import Inference
from fastgrpo.cli.main import main
from fastgrpo.data.prompts import PromptBuilder
from fastgrpo.model.load import load_processing
from fastgrpo.types import Prompt, Rollout, SamplingParams

Generate = Callable[..., tuple[int, list[str], str]]
QUESTION = "Where is the circle?"


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "a picture.png"
    Image.linear_gradient("L").convert("RGB").resize((112, 112)).save(path)
    return path


@pytest.fixture
def generate(tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]) -> Generate:
    """Exit code, lines on stdout, and stderr, of 6 tokens on the CPU."""

    def run(*flags: object) -> tuple[int, list[str], str]:
        given = [tiny_model_dir, "--max_new_tokens", 6, "--device", "cpu", *flags]
        code = main(["generate", *map(str, given)])
        printed = capsys.readouterr()
        return code, printed.out.splitlines(), printed.err

    return run


class Asked:
    """An engine that keeps what it is asked, and answers nothing."""

    def generate(
        self, prompts: Sequence[Prompt], num_generations: int, params: SamplingParams, step: int
    ) -> Iterator[Rollout]:
        self.prompts, self.count, self.params, self.step = prompts, num_generations, params, step
        return iter([Rollout(prompts[0], ())])

    def sync(self) -> None:
        """Nothing to do."""


def test_pictures_and_wording_reach_the_model(tiny_model_dir: Path, picture: Path) -> None:
    processing, engine = load_processing(str(tiny_model_dir)), Asked()
    builder = PromptBuilder(processing.tokenizer, processing.image_processor, mode="instruct")
    params = SamplingParams(4, seed=3)
    answers(Inference(engine, builder, {}), QUESTION, 2 * [picture.read_bytes()], 5, params, step=7)
    [prompt] = engine.prompts
    assert prompt.image_grid_thw.shape == (2, 3)
    assert f"{QUESTION} Output the thinking process" in prompt.text
    assert (engine.count, engine.params, engine.step) == (5, params, 7)


def test_the_seed_sets_the_draw(generate: Generate) -> None:
    def drawn(*flags: object) -> list[str]:
        code, lines, errors = generate(QUESTION, "--temperature", 1, *flags)
        assert code == 0, errors
        assert "cut after 6 tokens" in errors
        return lines

    alone = drawn()
    assert drawn() == alone
    assert drawn("--seed", 1) != alone


def test_several_answers_are_set_apart(generate: Generate, picture: Path) -> None:
    _, lines, _ = generate(QUESTION, "--image", picture, "--num_generations", 3, "--temperature", 1)
    assert lines.count("---") == 2


def test_questions_from_standard_input(
    generate: Generate, picture: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _, alone, _ = generate(QUESTION)
    small = picture.rename(tmp_path / "small.png")
    asked = f"{QUESTION}\n/image {small}\n{QUESTION}\n/image gone.png\n/image\n{QUESTION}\n\nnever asked\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(asked))
    code, lines, errors = generate()
    assert code == 0
    assert errors.count("cut after 6 tokens") == 3
    assert "error: " in errors
    assert "gone.png" in errors
    assert lines[: len(alone)] == alone == lines[-len(alone) :], "without the picture again, and greedy"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--image", "gone.png"], "gone.png: No such file or directory"),
        (["--num_generations", "2"], "raise it to 1"),
        (["--temperature", "warm"], "'warm' is not a number"),
        (["--temperature", "-1"], "-1 is not 0 or more"),
        (["--top_p", "2"], "2 is not from 0 to 1"),
        (["--imge", "a.png"], "unknown argument --imge (did you mean --image?)"),
        (["--device", "toaster"], "--device 'toaster' cannot be used here"),
    ],
)
def test_mistakes_are_one_line(generate: Generate, flags: list[str], message: str) -> None:
    code, _, errors = generate(QUESTION, *flags)
    assert code == 2
    [line] = errors.splitlines()
    assert message in line


def test_a_file_that_is_no_picture(generate: Generate, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture")
    code, _, errors = generate(QUESTION, "--image", tmp_path / "text.png")
    assert code == 2
    assert "image" in errors.splitlines()[-1]
