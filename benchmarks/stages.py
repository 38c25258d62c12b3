"""What do DPO and GRPO add to a supervised adapter, with DiaBlo and with LoRA at equal parameters?

    python -m benchmarks.stages --folder runs/stages

On MAWPS: a supervised run on 384 problems; DPO on pairs of that run's own right and wrong answers to these problems;
GRPO with the right answer as the reward, from the same start. The rates of DPO and GRPO are chosen with the first seed
by the share of 128 validation problems that the model solves, for each method by itself; those of the supervised runs
are the best ones of docs/quality.md. Every run is judged by the 238 test problems. What is done is not done again.
"""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console

from benchmarks.harness import print_table
from diablo.models.ready import load_for_generation
from diablo.planning.materials import gather
from diablo.recipes.reading import load_recipe
from diablo.records.results import write_record
from diablo.scoring.several_tasks import score_tasks

QUESTION = (
    "share of the test problems of MAWPS that are solved after supervised training, and after DPO or GRPO from there"
)
RECIPE = Path(__file__).parent / "quality" / "mawps.yaml"
RAISED = {"dpo": "rewards/accuracies", "grpo": "reward"}
"""What is logged of each step of an objective that training is to raise."""
METHODS = {
    "diablo": ("{name: diablo, num_blocks: 16}", 3e-3),
    "lora": ("{name: lora, r: 21}", 1e-3),
}
RATES = {"dpo": (3e-5, 1e-4, 3e-4), "grpo": (1e-5, 3e-5, 1e-4, 3e-4)}
OBJECTIVES: dict[str, dict[str, str | int]] = {
    "dpo": {"objective": "{name: dpo, beta: 0.1}", "training.max_steps": 24},
    # Four prompts a step, with eight completions of each.
    "grpo": {
        "objective": "{name: grpo, generations: 8, rewards: [right_answer], max_new_tokens: 32}",
        "training.max_steps": 10,
        "training.batch_size": 32,
        "training.warmup_steps": 2,
    },
}


def diablo(*arguments: object, log: Path) -> None:
    """Run the command line, as a user would; what it prints goes to a file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "diablo_cli", *map(str, arguments)]
    with log.open("w", encoding="utf-8") as file:
        subprocess.run(command, check=True, stdout=file, stderr=subprocess.STDOUT)


def train(run: Path, *overrides: str, seed: int, recipe: Path = RECIPE) -> dict[str, Any]:
    """A run's record; the run is made where it is not there."""
    if not (run / "run.json").is_file():
        common = [f"output={run}", f"seed={seed}", "evaluation.before=false", "evaluation.batch_size=64"]
        diablo("train", recipe, *common, *overrides, "--overwrite", log=run.parent / f"{run.name}.log")
    return json.loads((run / "run.json").read_text(encoding="utf-8"))


def supervised(folder: Path, method: str, seed: int) -> Path:
    """The run that the others start from."""
    section, rate = METHODS[method]
    run = folder / method / f"seed{seed}" / "sft"
    train(run, f"method={section}", f"training.learning_rate={rate}", seed=seed)
    return run


def pairs(start: Path, seed: int, samples: int) -> Path:
    """Pairs of the supervised run's own answers to the problems that it was trained on."""
    file = start.parent / "pairs.jsonl"
    if not file.is_file():
        options = ("--samples", samples, "--temperature", 1.0, "--seed", seed, "--limit", 384)
        more = ("--pairs-per-problem", 2, "--batch-size", 64, "--json")
        # Rows are written as they come: the file has its name only when it is whole.
        half = file.with_name("pairs-so-far.jsonl")
        diablo("pairs", start, half, *options, *more, "--overwrite", log=file.with_suffix(".log"))
        half.rename(file)
    return file


def stage(start: Path, objective: str, rate: float, seed: int, samples: int) -> Path:
    """A run of DPO or GRPO from a supervised run."""
    run = start.parent / f"{objective}-{rate:g}"
    # The adapter's method is gone on with.
    recipe = start.parent / "stage.yaml"
    settings = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
    recipe.write_text(yaml.safe_dump({name: settings[name] for name in settings if name != "method"}), encoding="utf-8")
    given = [f"adapter={start}", f"training.learning_rate={rate}", "training.logging_steps=1"]
    given += [f"{key}={value}" for key, value in OBJECTIVES[objective].items()]
    if objective == "dpo":
        rows = pairs(start, seed, samples)
        given += ["task=[]", f"data={{train: {rows}}}", "evaluation.tasks=[mawps]"]
    train(run, *given, seed=seed, recipe=recipe)
    return run


def validation_accuracy(run: Path) -> float:
    """The share of the validation problems of the supervised recipe that a run's model solves."""
    kept = run / "validation.json"
    if not kept.is_file():
        materials = gather(load_recipe(RECIPE, [f"output={run}"]))
        model, encoder = load_for_generation(str(run))
        problems = materials.rows.validation_problems or {"mawps": []}
        scores = score_tasks(
            model, encoder, materials.scored, console=Console(quiet=True), batch_size=64, problems=problems
        )
        kept.write_text(json.dumps({name: score.summary() for name, score in scores.items()}), encoding="utf-8")
    found = json.loads(kept.read_text(encoding="utf-8"))["mawps"]
    return found["right"] / found["total"]


def solved(run: Path) -> float:
    """The share of the test problems that a run's model solves."""
    after = json.loads((run / "run.json").read_text(encoding="utf-8"))["scores"]["after"]["mawps"]
    return after["right"] / after["total"]


def curve(run: Path) -> dict[str, list[tuple[int, float]]]:
    """What was logged of a run: its loss, and margins or rewards."""
    lines = [json.loads(line) for line in (run / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    names = ("loss", "rewards/margins", "rewards/accuracies", "reward")
    return {name: [(line["step"], line[name]) for line in lines if name in line] for name in names}


def draw(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw what each objective raises, by step: one line a method, the mean over the seeds, and a thin one for each."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    objectives = list(dict.fromkeys(each["objective"] for each in results))
    figure, panels = pyplot.subplots(1, len(objectives), figsize=(5 * len(objectives), 3.5), squeeze=False)
    for panel, objective in zip(panels[0], objectives, strict=True):
        for color, each in enumerate(each for each in results if each["objective"] == objective):
            curves = [[value for _, value in run["curve"][RAISED[objective]]] for run in each["runs"]]
            steps = [step for step, _ in each["runs"][0]["curve"][RAISED[objective]]]
            for values in curves:
                panel.plot(steps, values, color=f"C{color}", linewidth=0.5)
            means = [statistics.fmean(values) for values in zip(*curves, strict=True)]
            panel.plot(steps, means, color=f"C{color}", linewidth=2, label=each["method"])
        panel.set(title=objective, xlabel="step", ylabel=RAISED[objective])
        panel.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main(
    folder: Path = Path("runs/stages"),
    seeds: int = 3,
    samples: int = 4,
    objectives: Annotated[str, typer.Option(help="Separated by commas.")] = "dpo,grpo",
    methods: Annotated[str, typer.Option(help="Separated by commas.")] = "diablo,lora",
    out: Path = Path("docs/results/stages-mawps.json"),
) -> None:
    """Run every stage of every method and seed, and write the record."""
    results: list[dict[str, Any]] = []
    for objective in objectives.split(","):
        for method in methods.split(","):
            first = supervised(folder, method, 0)
            swept = {rate: validation_accuracy(stage(first, objective, rate, 0, samples)) for rate in RATES[objective]}
            best = max(swept, key=lambda rate: swept[rate])
            runs = []
            for seed in range(seeds):
                start = supervised(folder, method, seed)
                run = stage(start, objective, best, seed, samples)
                runs.append({"seed": seed, "before": solved(start), "after": solved(run), "curve": curve(run)})
                print(f"{objective}, {method}, seed {seed}: {runs[-1]['before']:.1%} -> {runs[-1]['after']:.1%}")
            results.append(
                {
                    "objective": objective,
                    "method": method,
                    "trained": json.loads((first / "run.json").read_text())["parameters"]["trainable"],
                    "rates": {f"{rate:g}": accuracy for rate, accuracy in swept.items()},
                    "rate": best,
                    "runs": runs,
                }
            )
            settings = {"recipe": RECIPE.name, "objectives": OBJECTIVES, "samples": samples, "seeds": seeds}
            write_record(out, QUESTION, settings, results)
            draw(results, out.with_suffix(".png"))
    print_table(
        ["objective", "method", "rate", "before", "after", "gain"],
        [[each["objective"], each["method"], f"{each['rate']:g}", *_figures(each["runs"])] for each in results],
    )


def _figures(runs: Sequence[dict[str, Any]]) -> list[str]:
    before, after = [run["before"] for run in runs], [run["after"] for run in runs]
    gains = [b - a for a, b in zip(before, after, strict=True)]
    return [_mean(values) for values in (before, after, gains)]


def _mean(values: Sequence[float]) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else math.nan
    return f"{statistics.fmean(values):.1%} ± {deviation:.1%}"


if __name__ == "__main__":
    typer.run(main)
