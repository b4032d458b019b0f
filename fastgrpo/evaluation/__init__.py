"""Greedy accuracy on held-out questions."""

from fastgrpo.evaluation.benchmark import Evaluation, TaskScore, evaluate, write_evaluation

__all__ = ["Evaluation", "TaskScore", "evaluate", "write_evaluation"]
