"""Names of methods and suites, as results have them."""

from __future__ import annotations

# prefix of one expert used for everything
EXPERT = "expert:"
ORACLE = "Oracle"
BEST_INDIVIDUAL = "Best Individual"
# the dataset's own expert: as good as routing by the dataset's label
OWN = "own"
# the base model alone
BASE = "base"
# expected score of a random choice; needs no model
CHANCE = "chance"

HELD_IN, LEAVE_ONE_OUT = "held-in", "leave-one-out"
PAPER = ("t0ho", "bbh", "bbl")
SUITES = (*PAPER, HELD_IN, LEAVE_ONE_OUT)


def is_expert(method: str) -> bool:
    """Whether a method is one expert used for everything."""
    return method.startswith(EXPERT)


def uses_labels(method: str) -> bool:
    """Whether a method uses what a prompt does not say: the evaluation's labels, or which dataset it is from."""
    return method in (ORACLE, BEST_INDIVIDUAL, OWN) or is_expert(method)
