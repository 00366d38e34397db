"""Metrics: how right an answer is, from 0 to 1.

    multiple_choice, multiple_choice_multi   the choice with the lowest mean loss per token is a right one
    exact_match                              the answer is the target
    exact_match_multi                        the answer is one of the targets
    rouge_l                                  ROUGE-L's F1 of the answer, with the target where it is highest

Surrounding white space does not count. The paper's tasks each have the metric
that its code gives them (colm/datasets/bigbench.gin).
"""

from __future__ import annotations

from collections.abc import Sequence

# metric -> what its mean over rows is called
MEASURES = {
    "multiple_choice": "accuracy",
    "multiple_choice_multi": "accuracy",
    "exact_match": "exact_match",
    "exact_match_multi": "exact_match",
    "rouge_l": "rouge_l",
}


def rank_classification(choices: Sequence[str], losses: Sequence[float], targets: Sequence[str]) -> float:
    """1 if the choice with the lowest loss is a target; the first of equal ones (paper section 4.1).

    Args:
        choices: what there is to choose from.
        losses: mean loss per token of each choice, EOS included.
        targets: the right choices.
    """
    return float(choices[losses.index(min(losses))] in targets)


def answer_score(metric: str, answer: str, targets: Sequence[str]) -> float:
    """Score of a written answer by one of the metrics that are not multiple choice."""
    if metric == "rouge_l":
        return rouge_l(answer, targets)
    accepted = targets if metric == "exact_match_multi" else targets[:1]
    return float(answer.strip() in [target.strip() for target in accepted])


def rouge_l(answer: str, targets: Sequence[str]) -> float:
    """ROUGE-L's F1 (package rouge-score, no stemming), with the target where it is highest."""
    from rouge_score.rouge_scorer import RougeScorer

    scores = RougeScorer(["rougeL"]).score_multi(list(targets), answer)
    return float(scores["rougeL"].fmeasure)
