"""Verbs that score answers: evaluate, the rows that scored answers make, and the list of tasks."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from diablo_cli.completion import complete_scored_tasks, complete_task, complete_trained_tasks
from diablo_cli.output import answer, out, progress
from diablo_cli.shell import Base, app, check_file, check_model, check_new_rows, check_writes, quiet, refuse

if TYPE_CHECKING:
    from diablo.scoring.asking import Decoding
    from diablo.tasks import Task


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="A run's folder, an adapter's folder, or any model.")],
    task: Annotated[
        str | None,
        typer.Option(
            help="Names of tasks, separated by commas; a run's own if not given.", autocompletion=complete_scored_tasks
        ),
    ] = None,
    data_folder: Annotated[
        Path | None, typer.Option(help="A folder of the tasks' datasets, in place of the hub.")
    ] = None,
    protocol: Annotated[str | None, typer.Option(help="How answers are read: strict (the default) or paper.")] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Completions of each problem.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0, help="Temperature of the sampling; 0 is greedy.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of the sampling; 0 if not given.")] = None,
    base: Base = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts generated together.")] = 48,
    limit: Annotated[int | None, typer.Option(min=1, help="Score only the first so many problems.")] = None,
    examples: Annotated[int | None, typer.Option(min=0, help="Answers to print; 3 if not given.")] = None,
    out_file: Annotated[
        Path | None, typer.Option("--out", help="A file for every answer (JSONL), or for --harness's figures (JSON).")
    ] = None,
    allow_code_execution: Annotated[
        bool, typer.Option("--allow-code-execution", help="Let tasks run code that the model wrote.")
    ] = False,
    chat: Annotated[bool | None, typer.Option("--chat/--no-chat", help="Use the tokenizer's chat template.")] = None,
    likelihood: Annotated[
        bool | None,
        typer.Option(
            "--likelihood/--no-likelihood",
            help="Score choices by their likelihood; if not given, as the run was scored.",
        ),
    ] = None,
    harness: Annotated[
        str | None, typer.Option(help="Tasks of lm-evaluation-harness in place of --task, such as arc_easy,hellaswag.")
    ] = None,
    harness_include: Annotated[
        Path | None, typer.Option(help="A folder with further task files for --harness.")
    ] = None,
    num_fewshot: Annotated[int | None, typer.Option(min=0, help="Worked examples in each prompt of --harness.")] = None,
) -> None:
    """Score a model or an adapter on tasks: by generation, by likelihood or through lm-evaluation-harness."""
    from diablo.records.results import recipe_of_run
    from diablo.scoring.asking import as_multiple_choice, decoding_for
    from diablo.tasks import chosen_tasks

    of_generation = {
        "--samples": samples,
        "--temperature": temperature,
        "--seed": seed,
        "--allow-code-execution": allow_code_execution or None,
    }
    of_tasks = {
        "--task": task,
        "--data-folder": data_folder,
        "--protocol": protocol,
        "--likelihood": likelihood,
        "--examples": examples,
    }
    of_harness = {"--harness-include": harness_include, "--num-fewshot": num_fewshot}
    check_file(out_file)
    check_writes(model, "evaluate")
    check_model(model)
    check_model(base, "--base")
    if harness is not None:
        refuse("--harness has tasks and settings of its own", of_tasks | of_generation)
        settings = {"limit": limit, "num_fewshot": num_fewshot, "batch_size": batch_size}
        _evaluate_by_harness(model, base, chat, harness, harness_include, settings, out_file)
        return
    refuse("these are settings of --harness, which is missing", of_harness)
    quiet()
    trained_as = recipe_of_run(model)
    tasks = chosen_tasks(trained_as, task, data_folder, protocol, allow=allow_code_execution)
    if likelihood is None:
        likelihood = task is None and trained_as.get("evaluation", {}).get("likelihood", False)
    scored: list[tuple[Task, Decoding | None]]
    # A fault in the data shows before the model is loaded.
    if likelihood:
        refuse("--likelihood generates nothing", of_generation)
        scored = [(as_multiple_choice(each, limit=limit), None) for each in tasks]
    else:
        sampling: dict[str, Any] = {"samples": samples, "temperature": temperature, "seed": seed or 0}
        scored = [(each, decoding_for(each, **sampling)) for each in tasks]
        for each in tasks:
            each.problems("test")
    from diablo.models.ready import load_for_generation
    from diablo.scoring.several_tasks import score_tasks, write_answers
    from diablo_cli.task_reporting import print_examples

    loaded, encoder = load_for_generation(model, base=base, chat=chat)
    scores = score_tasks(loaded, encoder, scored, console=progress, batch_size=batch_size, limit=limit)
    if out_file is not None:
        write_answers(out_file, scores.values())
    for name, score in scores.items():
        print_examples(out, {"answer": score}, 3 if examples is None else examples)
        figures = ", ".join(f"{metric} {value:.1%}" for metric, value in score.metrics.items())
        out.print(f"{name}: {figures} ({score.right} of {len(score.answers)}) in {score.seconds:.0f} s")
    if out_file is not None:
        out.print(f"answers  {escape(str(out_file))}")
    answer(
        {
            "model": model,
            "scores": {name: score.summary() for name, score in scores.items()},
            "answers": out_file,
        }
    )


@app.command()
def pairs(
    model: Annotated[str, typer.Argument(help="A run's folder, an adapter's folder, or any model.")],
    rows_file: Annotated[Path, typer.Argument(metavar="OUT", help="A new file for the rows, in .jsonl.")],
    task: Annotated[
        str | None,
        typer.Option(
            help="Names of tasks, separated by commas; those that a run was trained on if not given.",
            autocompletion=complete_trained_tasks,
        ),
    ] = None,
    form: Annotated[
        str,
        typer.Option(
            "--format",
            help="pairs of a right and a wrong answer (dpo, orpo, reward), labels of each answer (kto), or the right "
            "completions alone.",
        ),
    ] = "pairs",
    samples: Annotated[int, typer.Option(min=1, help="Answers to each problem.")] = 8,
    temperature: Annotated[float, typer.Option(min=0, help="Temperature of the sampling; 0 is greedy.")] = 1.0,
    pairs_per_problem: Annotated[
        int | None, typer.Option(min=1, help="The most pairs of a problem; 1 if not given.")
    ] = None,
    gold: Annotated[
        bool, typer.Option("--gold", help="Where no answer is right, take the task's own as the right one.")
    ] = False,
    data_folder: Annotated[
        Path | None, typer.Option(help="A folder of the tasks' datasets, in place of the hub.")
    ] = None,
    protocol: Annotated[str | None, typer.Option(help="How answers are read: strict (the default) or paper.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the sampling, and of the choice of pairs.")] = 0,
    base: Base = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts generated together.")] = 48,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many problems of each task.")] = None,
    allow_code_execution: Annotated[
        bool, typer.Option("--allow-code-execution", help="Let tasks run code that the model wrote.")
    ] = False,
    chat: Annotated[bool | None, typer.Option("--chat/--no-chat", help="Use the tokenizer's chat template.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file if it is there.")] = False,
) -> None:
    """Make rows for preference training (DPO, KTO) of a model's right and wrong answers to training problems."""
    from diablo.errors import UserError
    from diablo.planning.rows import training_problems
    from diablo.records.results import recipe_of_run, recipes_behind
    from diablo.scoring.asking import decoding_for
    from diablo.scoring.pairs import Choice, row_format, training_settings
    from diablo.tasks import chosen_tasks

    check_model(model)
    check_model(base, "--base")
    check_new_rows(rows_file, overwrite)
    choice = Choice(row_format(form), pairs_per_problem or 1, gold, seed)
    choice.check(samples)
    if choice.form != "pairs":
        refuse("it is of --format pairs", {"--pairs-per-problem": pairs_per_problem})
    quiet()
    trained_as = recipe_of_run(model)
    if task is None and trained_as.get("evaluation", {}).get("likelihood"):
        raise UserError(
            f"--task: missing, and {model!r} was scored by likelihood, which generates no answers; name the task to "
            "generate some all the same."
        )
    chosen = chosen_tasks(trained_as, task, data_folder, protocol, allow=allow_code_execution, split="train")
    asked = [(each, decoding_for(each, samples=samples, temperature=temperature, seed=seed)) for each in chosen]
    problems = training_problems(chosen, recipes_behind(model))
    problems = {name: of_task[:limit] for name, of_task in problems.items()}
    # A fault in the data shows before the model is loaded.
    from diablo.models.ready import load_for_generation
    from diablo.scoring.own_answers import write_own_answers
    from diablo_cli.reporting import print_rows_made

    loaded, encoder = load_for_generation(model, base=base, chat=chat)
    start = time.perf_counter()
    tallies = write_own_answers(
        loaded, encoder, asked, problems, rows_file, choice, console=progress, batch_size=batch_size
    )
    seconds = time.perf_counter() - start
    settings = training_settings(model, rows_file, choice, chat=encoder.chat, trained_as=trained_as, base=base)
    for name, tally in tallies.items():
        out.print(f"{name}: {tally.describe()}.")
    rows = sum(tally.rows for tally in tallies.values())
    print_rows_made(out, f"{rows} {choice.form}", seconds, settings, trained_as=model)
    answer(
        {
            "model": model,
            "file": rows_file,
            "format": choice.form,
            "tasks": {name: asdict(tally) for name, tally in tallies.items()},
            "rows": rows,
            "seconds": round(seconds, 1),
            "recipe": settings,
        }
    )


@app.command()
def tasks(
    name: Annotated[
        str | None,
        typer.Argument(
            help="A task to say everything about; all are listed if not given.", autocompletion=complete_task
        ),
    ] = None,
) -> None:
    """List the tasks; or say of one where its data comes from, and how its answers are read."""
    from diablo.tasks import TASKS, task_class
    from diablo_cli.task_reporting import print_task, tasks_table

    if name is not None:
        print_task(out, task_class(name))
        answer(task_class(name).record())
        return
    out.print(tasks_table(TASKS.values()))
    out.print("Where a task's data comes from, and how its answers are read: diablo tasks NAME")
    answer({"tasks": [task.record() for task in TASKS.values()]})


def _evaluate_by_harness(
    model: str,
    base: str | None,
    chat: bool | None,
    names: str,
    include: Path | None,
    settings: dict[str, Any],
    path: Path | None,
) -> None:
    from diablo.models.ready import load_for_generation
    from diablo.records.results import write_json
    from diablo.scoring.harness import harness_record, load_harness_tasks, run_harness
    from diablo_cli.task_reporting import harness_table

    quiet()
    tasks = load_harness_tasks(names.split(","), include)
    loaded, encoder = load_for_generation(model, base=base, chat=chat)
    figures = run_harness(loaded, encoder, tasks, **settings)
    out.print(harness_table(figures, f"lm-eval on {model}"))
    record = harness_record(figures, {"model": model, "chat": encoder.chat, **settings})
    if path is not None:
        write_json(path, record)
    answer(record)
