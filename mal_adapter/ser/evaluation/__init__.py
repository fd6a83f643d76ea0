"""Evaluate a recognizer: answers, audit, scores and the report."""

from typing import TYPE_CHECKING

from mal_adapter.lazy import lazy_names

if TYPE_CHECKING:
    from mal_adapter.ser.evaluation.arms import AUDIT
    from mal_adapter.ser.evaluation.evaluation import Evaluation, evaluate, read_evaluation

__all__ = ["AUDIT", "Evaluation", "evaluate", "read_evaluation"]

if not TYPE_CHECKING:  # a checker that saw this function would take every misspelt name for an Any
    __getattr__ = lazy_names(
        __name__,
        {
            "AUDIT": "ser.evaluation.arms",
            "Evaluation": "ser.evaluation.evaluation",
            "evaluate": "ser.evaluation.evaluation",
            "read_evaluation": "ser.evaluation.evaluation",
        },
        extra="train",
    )
