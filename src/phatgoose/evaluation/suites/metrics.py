"""Metrics: scores of an answer, from 0 to 1.

    multiple_choice, multiple_choice_multi   the choice with the lowest mean loss per token is right
    exact_match                              the answer equals the target
    exact_match_multi                        the answer equals one of the targets
    rouge_l                                  ROUGE-L F1 of the answer, the highest over the targets

Surrounding white space is ignored. The paper's tasks have the metrics of its
code (colm/datasets/bigbench.gin).
"""

from __future__ import annotations

from collections.abc import Sequence

# metric -> name of its mean over rows
MEASURES = {
    "multiple_choice": "accuracy",
    "multiple_choice_multi": "accuracy",
    "exact_match": "exact_match",
    "exact_match_multi": "exact_match",
    "rouge_l": "rouge_l",
}


def rank_classification(choices: Sequence[str], losses: Sequence[float], targets: Sequence[str]) -> float:
    """1 if the choice with the lowest loss is a target, else 0; ties go to the first (paper section 4.1).

    Args:
        choices: the possible answers.
        losses: mean loss per token of each choice (nats), EOS included.
        targets: the right answers among them.
    """
    return float(choices[losses.index(min(losses))] in targets)


def answer_score(metric: str, answer: str, targets: Sequence[str]) -> float:
    """Score of a written answer with one of the metrics that are not multiple choice."""
    if metric == "rouge_l":
        return rouge_l(answer, targets)
    accepted = targets if metric == "exact_match_multi" else targets[:1]
    return float(answer.strip() in [target.strip() for target in accepted])


def rouge_l(answer: str, targets: Sequence[str]) -> float:
    """ROUGE-L F1 (package rouge-score, no stemming), the highest over the targets."""
    from rouge_score.rouge_scorer import RougeScorer

    scores = RougeScorer(["rougeL"]).score_multi(list(targets), answer)
    return float(scores["rougeL"].fmeasure)
