"""Do methods differ on new problems, or on those that they have nearly seen?

    python -m experiments.near_copies
    python -m experiments.near_copies --record runs/long/mawps/comparison.json --adapters runs/long/mawps

The test problems of a comparison are parted in halves: those that are most like a problem of the training rows, and
the others. Where the runs' folders are given, their models are asked problems that they were trained on, too.
"""

from __future__ import annotations

import itertools
import json
import random
import re
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from diablo.comparison.differences import Solved, paired_difference
from diablo.data.encoding import IGNORED, EncodedRow
from diablo.models.ready import load_for_generation
from diablo.planning.making import make_plan
from diablo.planning.plan import Plan
from diablo.recipes.reading import load_recipe
from diablo.scoring.generation import evaluate_task
from diablo.tasks import Problem, Task
from experiments.harness import Experiment, Seed

QUESTION = "problems solved by each method, among near copies of training problems and among the others"

PARTS = ("near copies", "others")


def words_of(problems: Sequence[Problem]) -> list[set[str]]:
    """The words of each prompt, without numbers and without what stands in every prompt."""
    words = [set(re.findall(r"[a-z]+", problem.row.prompt.lower())) for problem in problems]
    common = set.intersection(*words)
    return [each - common for each in words]


def likenesses(problems: Sequence[Problem], trained: Sequence[Problem]) -> list[float]:
    """How like the closest training problem each problem is: the shared words, as a share of the words of either."""
    words = words_of([*problems, *trained])
    asked, known = words[: len(problems)], words[len(problems) :]
    return [max(len(one & other) / max(1, len(one | other)) for other in known) for one in asked]


def halves(likeness: Sequence[float]) -> dict[str, list[int]]:
    """The numbers of the problems of each part."""
    order = sorted(range(len(likeness)), key=lambda number: (-likeness[number], number))
    middle = (len(order) + 1) // 2
    return dict(zip(PARTS, (sorted(order[:middle]), sorted(order[middle:])), strict=True))


def trained_problems(plan: Plan, task: Task) -> list[Problem]:
    """The problems of the training rows."""
    prompts = {prompt_of(row) for row in plan.train}
    return [problem for problem in task.problems("train") if tuple(plan.encoder.prompt(problem.row)) in prompts]


def prompt_of(row: EncodedRow) -> tuple[int, ...]:
    """The tokens in front of the completion."""
    return tuple(token for token, label in zip(row.input_ids, row.labels, strict=True) if label == IGNORED)


def run(
    recipe: str = "benchmarks/quality/long-mawps.yaml",
    record: str = "docs/results/quality-long-mawps-fp32.json",
    adapters: str = "",
    asked: int = 238,
    seed: Seed = 0,
) -> dict[str, Any]:
    """Part the test problems.

    Args:
        recipe: the recipe of a comparison on one task.
        record: the comparison.
        adapters: the folder of the comparison, where the training problems are to be asked as well.
        asked: how many of the training problems are asked.
        seed: draws these.
    """
    plan = make_plan(load_recipe(Path(recipe), []))
    ((task, _),) = plan.scored
    problems, trained = task.problems("test"), trained_problems(plan, task)
    likeness = likenesses(problems, trained)
    parts = halves(likeness)
    drawn = random.Random(seed).sample(trained, min(asked, len(trained)))
    contenders: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for each in json.loads(Path(record).read_text(encoding="utf-8"))["runs"]:
        if each["stage"] == "test" and each.get("solved"):
            contenders.setdefault((each["method"], each["learning_rate"]), []).append(each)
    found = []
    for (method, rate), runs in contenders.items():
        of_parts = {
            name: [{task.name: "".join(run["solved"][task.name][number] for number in numbers)} for run in runs]
            for name, numbers in parts.items()
        }
        found.append(
            {
                "method": method,
                "learning_rate": rate,
                "seeds": len(runs),
                "solved": of_parts,
                "trained_on": [ask(Path(adapters, run["folder"]), task, drawn) for run in runs] if adapters else [],
            }
        )
        print(describe(found[-1]), flush=True)
    return {
        "likeness": likeness,
        "least_of_near_copies": min(likeness[number] for number in parts[PARTS[0]]),
        "contenders": found,
    }


def ask(folder: Path, task: Task, problems: Sequence[Problem]) -> float:
    """The share of problems that the model of a run solves."""
    model, encoder = load_for_generation(str(folder))
    return evaluate_task(model, encoder, task, problems=problems).headline


def share(solved: Sequence[Solved]) -> float:
    """The share of solved problems, as a mean over the seeds."""
    return statistics.fmean(verdicts.count("1") / len(verdicts) for run in solved for verdicts in run.values())


def describe(contender: dict[str, Any]) -> str:
    """What a method solves, in words."""
    shares = [f"{share(solved):.1%} of {name}" for name, solved in contender["solved"].items()]
    if contender["trained_on"]:
        shares.append(f"{statistics.fmean(contender['trained_on']):.1%} of problems it was trained on")
    return f"{contender['method']} at {contender['learning_rate']:g}, {contender['seeds']} seeds: {', '.join(shares)}"


def report(results: dict[str, Any]) -> Iterator[str]:
    """The differences between any two."""
    for first, other in itertools.combinations(results["contenders"], 2):
        for name in PARTS:
            found = paired_difference(other["solved"][name], first["solved"][name])
            if found is not None:
                difference, error = (100 * figure for figure in found)
                yield (
                    f"{other['method']} at {other['learning_rate']:g}, {name}: {difference:+.1f} ± {error:.1f} points "
                    f"against {first['method']} at {first['learning_rate']:g}"
                )


def draw(figure: Any, results: dict[str, Any]) -> None:
    """What each method solves of each part."""
    axes = figure.subplots()
    contenders = results["contenders"]
    for name in PARTS:
        axes.plot(
            [100 * share(each["solved"][name]) for each in contenders],
            [f"{each['method']} at {each['learning_rate']:g}" for each in contenders],
            "o",
            label=name,
        )
    axes.set(xlabel="problems solved, %")
    axes.invert_yaxis()
    axes.legend()


EXPERIMENT = Experiment("near-copies", QUESTION, run, report, draw, size=(8, 4))

if __name__ == "__main__":
    EXPERIMENT.main()
