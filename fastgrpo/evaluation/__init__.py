"""Greedy accuracy on held-out questions."""

from fastgrpo.evaluation.benchmark import evaluate, write_evaluation
from fastgrpo.evaluation.figures import Evaluation, TaskScore

__all__ = ["Evaluation", "TaskScore", "evaluate", "write_evaluation"]
