"""How sure a difference between the scores of two methods is.

All methods answer the same test problems. The deviation over seeds says how much the training varies. It says nothing
of which problems the test split happens to have. That is what the standard error of the paired difference says.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

Solved = Mapping[str, str]
"""By task, which of its problems a run has solved: a text of ``1`` and ``0``, in the order of the problems."""


def read_solved(answers: Path, scores: Mapping[str, float]) -> dict[str, str]:
    """Which problems a run has solved.

    Args:
        answers: the file of its answers.
        scores: the headline figure of each task.

    Returns:
        Nothing where there is no file, a problem has several answers, or a headline figure is another one than the
        share of solved problems.
    """
    if not answers.is_file():
        return {}
    solved: dict[str, str] = {}
    with answers.open(encoding="utf-8") as lines:
        for answer in map(json.loads, lines):
            if answer.get("sample"):
                return {}
            solved[answer["task"]] = solved.get(answer["task"], "") + str(int(answer["right"]))
    shares = {task: verdicts.count("1") / len(verdicts) for task, verdicts in solved.items()}
    same = shares.keys() == scores.keys() and all(math.isclose(shares[task], scores[task]) for task in shares)
    return solved if same else {}


def paired_difference(one: Sequence[Solved], other: Sequence[Solved]) -> tuple[float, float] | None:
    """By how much the score of one method is above that of another, and the standard error of that over the problems.

    A problem's difference is that between the shares of each method's seeds that have solved it. The mean over the
    problems is the difference in score. Its squared standard error is the sample variance of the problems' differences,
    divided by their number. With several tasks, the mean over the tasks is taken, as it is of the scores.

    Args:
        one: what each seed of the one method has solved.
        other: what each seed of the other method has solved.

    Returns:
        None where this is not known: a method has no seed, what a seed has solved is not known, or a task has one
        problem.
    """
    sizes = [{task: len(verdicts) for task, verdicts in run.items()} for run in (*one, *other)]
    known = bool(one and other) and all(each == sizes[0] for each in sizes)
    if not known or min(sizes[0].values(), default=0) < 2:
        return None
    means, squared_errors = [], []
    for task, number in sizes[0].items():
        shares = [
            [statistics.fmean(map(int, each)) for each in zip(*(run[task] for run in runs), strict=True)]
            for runs in (one, other)
        ]
        differences = [first - second for first, second in zip(*shares, strict=True)]
        means.append(statistics.fmean(differences))
        squared_errors.append(statistics.variance(differences) / number)
    return statistics.fmean(means), math.sqrt(sum(squared_errors)) / len(means)
