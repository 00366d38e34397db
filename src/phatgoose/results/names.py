"""Names of methods and suites in results."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass

EXPERT = "expert:"
ORACLE = "Oracle"
BEST_INDIVIDUAL = "Best Individual"
# The dataset's own expert: as good as routing by a label of the dataset would be.
OWN = "own"
# The base model alone.
BASE = "base"
# A choice drawn blindly: its mean score, which needs no model.
CHANCE = "chance"


def is_expert(method: str) -> bool:
    """Whether a method is one expert for everything."""
    return method.startswith(EXPERT)


def is_told(method: str) -> bool:
    """Whether a method knows what a user's prompt would not say: labels, or the dataset."""
    return method in (ORACLE, BEST_INDIVIDUAL, OWN) or is_expert(method)


HELD_IN, LEAVE_ONE_OUT = "held-in", "leave-one-out"
PAPER = ("t0ho", "bbh", "bbl")
SUITES = (*PAPER, HELD_IN, LEAVE_ONE_OUT)
