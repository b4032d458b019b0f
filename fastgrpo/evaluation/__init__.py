"""Greedy accuracy on held-out questions."""

from fastgrpo.evaluation.benchmark import evaluate, write_evaluation
from fastgrpo.evaluation.figures import Evaluation, TaskScore
from fastgrpo.evaluation.ranks import Ranks

__all__ = ["Evaluation", "Ranks", "TaskScore", "evaluate", "write_evaluation"]
