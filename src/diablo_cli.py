"""The command line: each verb is one call of a public function.

This module lies beside the package, not in it: ``import diablo`` registers the method with PEFT and so takes seconds,
which ``diablo --help`` should not. Everything heavy is imported by the verb that needs it.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

if TYPE_CHECKING:
    from diablo.evaluation import Decoding
    from diablo.tasks import Task

app = typer.Typer(
    help="Fine-tune language models by their diagonal blocks: from a data file to a merged model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
out = Console(highlight=False, soft_wrap=True)
progress = Console(stderr=True, highlight=False)

Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings that override the recipe's.")
]
Base = Annotated[str | None, typer.Option(help="Base model to use in place of the one that the adapter names.")]


def main() -> None:
    """Run the command line; an error that the user can mend is a message and exit status 2."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Where quantization libraries are installed, PEFT imports them, and they report kernels for other machines.
    for library in ("torchao", "bitsandbytes", "torch.utils._pytree"):
        logging.getLogger(library).setLevel(logging.ERROR)
    try:
        app(standalone_mode=True)
    except Exception as error:
        from diablo.errors import UserError

        if not isinstance(error, UserError):
            raise
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        sys.exit(2)


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or the name of a shipped recipe such as quickstart.")],
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be done and stop.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Discard an unfinished run.")] = False,
) -> None:
    """Train by a recipe: check, train, save, score."""
    from diablo.recipe import load_recipe

    settings = load_recipe(recipe, overrides or [])
    _quiet()
    if dry_run:
        from diablo.planning import make_plan
        from diablo.reporting import print_plan

        print_plan(out, make_plan(settings))
        return
    from diablo.reporting import print_result
    from diablo.training import train as run

    print_result(out, run(settings, console=progress, resume=resume, overwrite=overwrite))


@app.command()
def compare(
    recipe: Annotated[str, typer.Argument(help="A YAML file or the name of a shipped recipe, with DiaBlo as method.")],
    overrides: Overrides = None,
    methods: Annotated[
        str | None, typer.Option(help="Names of methods, separated by commas; all of them if not given.")
    ] = None,
    seeds: Annotated[int, typer.Option(help="How many seeds, from the recipe's on.")] = 3,
    lrs: Annotated[
        str | None, typer.Option(help="Learning rates of the sweep; 2e-4,5e-4,1e-3,2e-3 if not given.")
    ] = None,
    general: Annotated[
        str | None, typer.Option(help="A .txt or .jsonl file to measure forgetting on, in place of the builtin text.")
    ] = None,
    folder: Annotated[Path | None, typer.Option("--out", help="A folder to write to, or to go on in.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be run and stop.")] = False,
) -> None:
    """Compare methods at equal trained parameters, each at its best learning rate, over several seeds."""
    from diablo.comparison import DEFAULT_METHODS, DEFAULT_RATES, parse_rates, plan_comparison
    from diablo.comparison import compare as run
    from diablo.recipe import load_recipe
    from diablo.reporting import print_comparison, print_comparison_plan

    rates = DEFAULT_RATES if lrs is None else parse_rates(lrs)
    names = DEFAULT_METHODS if methods is None else methods.split(",")
    settings = load_recipe(recipe, [*(overrides or []), *([f"evaluation.general={general}"] if general else [])])
    _quiet()
    comparison = plan_comparison(settings, methods=names, seeds=seeds, rates=rates, folder=folder)
    print_comparison_plan(out, comparison)
    if dry_run:
        return
    record = run(comparison, console=progress)
    print_comparison(out, record, comparison.folder)
    if any(each["failure"] for each in record["runs"]):
        sys.exit(1)


@app.command()
def plan(
    model: Annotated[str, typer.Argument(help="A folder, a hub id or builtin:NAME; only its config is read.")],
    num_blocks: Annotated[int | None, typer.Option(min=1, help="N; 64 where neither size is given.")] = None,
    budget: Annotated[str | None, typer.Option(help="The largest share to train, such as 1%, in place of N.")] = None,
    target_modules: Annotated[str | None, typer.Option(help="Names, separated by commas, or all-linear.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows of a forward.")] = 1,
    length: Annotated[int, typer.Option(min=1, help="Tokens of a row.")] = 1024,
    dtype: Annotated[str, typer.Option(help="Of the frozen weights: bf16, fp16 or fp32.")] = "bf16",
) -> None:
    """Show what would be trained and what memory it would take, before anything is downloaded."""
    from diablo.errors import UserError
    from diablo.models import parse_dtype
    from diablo.reporting import print_sizes
    from diablo.sizing import plan_sizes

    _quiet()
    share = None
    if budget is not None:
        try:
            share = float(budget.removesuffix("%")) / (100 if budget.endswith("%") else 1)
        except ValueError:
            raise UserError(f"--budget: found {budget!r}; give a share such as 1% or 0.01.") from None
    names = target_modules.split(",") if target_modules and target_modules != "all-linear" else target_modules
    sizes = plan_sizes(
        model,
        num_blocks=num_blocks,
        budget=share,
        target_modules=names,
        batch_size=batch_size,
        length=length,
        dtype=parse_dtype(dtype),
    )
    print_sizes(out, sizes, model, f"{batch_size} x {length} tokens in {dtype}")


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="A run's folder, an adapter's folder, or any model.")],
    task: Annotated[
        str | None, typer.Option(help="Names of tasks, separated by commas; a run's own if not given.")
    ] = None,
    data_folder: Annotated[
        Path | None, typer.Option(help="A folder of the tasks' datasets, in place of the hub.")
    ] = None,
    protocol: Annotated[str | None, typer.Option(help="How answers are read: strict (the default) or paper.")] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Completions of each problem.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0, help="Of the sampling; 0 is greedy.")] = None,
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
            "--likelihood/--no-likelihood", help="Score choices by their likelihood; as the run was if not given."
        ),
    ] = None,
    harness: Annotated[
        str | None, typer.Option(help="Tasks of lm-evaluation-harness in place of --task, such as arc_easy,hellaswag.")
    ] = None,
    harness_include: Annotated[Path | None, typer.Option(help="A folder with further task files for it.")] = None,
    num_fewshot: Annotated[int | None, typer.Option(min=0, help="Worked examples in each of its prompts.")] = None,
) -> None:
    """Score a model or an adapter on tasks: by generation, by likelihood or through lm-evaluation-harness."""
    from diablo.checkpoints import load_for_generation
    from diablo.evaluation import decoding_for
    from diablo.likelihood import as_multiple_choice
    from diablo.reporting import print_examples
    from diablo.results import recipe_of_run
    from diablo.scoring import score_tasks, write_answers
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
    _check_file(out_file)
    if harness is not None:
        _refuse("--harness has tasks and settings of its own", of_tasks | of_generation)
        settings = {"limit": limit, "num_fewshot": num_fewshot, "batch_size": batch_size}
        _evaluate_by_harness(model, base, chat, harness, harness_include, settings, out_file)
        return
    _refuse("these are settings of --harness, which is missing", of_harness)
    _quiet()
    trained_as = recipe_of_run(model)
    tasks = chosen_tasks(trained_as, task, data_folder, protocol, allow=allow_code_execution)
    if likelihood is None:
        likelihood = task is None and trained_as.get("evaluation", {}).get("likelihood", False)
    scored: list[tuple[Task, Decoding | None]]
    # A fault in the data shows before the model is loaded.
    if likelihood:
        _refuse("--likelihood generates nothing", of_generation)
        scored = [(as_multiple_choice(each, limit=limit), None) for each in tasks]
    else:
        sampling: dict[str, Any] = {"samples": samples, "temperature": temperature, "seed": seed or 0}
        scored = [(each, decoding_for(each, **sampling)) for each in tasks]
        for each in tasks:
            each.problems("test")
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


@app.command()
def tasks() -> None:
    """List the tasks: what they are, where their data is, and what is scored."""
    from diablo.reporting import tasks_table
    from diablo.tasks import TASKS

    out.print(tasks_table(TASKS.values()))
    out.print("Where a task's files are published, and how answers are read: docs/tasks.md")


@app.command()
def merge(
    adapter: Annotated[str, typer.Argument(help="The adapter's folder, or the run's.")],
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder for the merged model.")],
    base: Base = None,
    dtype: Annotated[str | None, typer.Option(help="bf16, fp16 or fp32; the base model's where left out.")] = None,
) -> None:
    """Merge an adapter into its base model: a plain model that any engine serves."""
    from diablo.checkpoints import adapter_folder, merge_adapter
    from diablo.models import parse_dtype

    chosen = parse_dtype(dtype) if dtype else None
    source = adapter_folder(adapter)
    _quiet()
    report = merge_adapter(source, folder, base=base, dtype=chosen)
    out.print(
        f"Wrote {escape(str(report.folder))} in {str(report.dtype).removeprefix('torch.')}. Its logits differ from the "
        f"adapted model's by at most {report.largest_difference:.1e} (largest logit {report.largest_logit:.1f})."
    )


@app.command("to-lora")
def to_lora(
    adapter: Annotated[str, typer.Argument(help="The adapter's folder, or the run's.")],
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder for the LoRA adapter.")],
    rank: Annotated[str, typer.Option(help="LoRA's rank, or a share of the update to keep, such as 0.99.")],
    base: Base = None,
) -> None:
    """Turn an adapter into a LoRA adapter, for engines that serve LoRA alone, and say what that loses."""
    from diablo.checkpoints import adapter_folder, write_as_lora
    from diablo.errors import UserError

    try:
        chosen = float(rank) if "." in rank else int(rank)
    except ValueError:
        raise UserError(f"--rank: found {rank!r}; give an integer, or a share above 0 and up to 1.0.") from None
    source = adapter_folder(adapter)
    _quiet()
    report = write_as_lora(source, folder, chosen, base=base)
    ranks = sorted(set(report.ranks.values()))
    rank_range = " to ".join(map(str, ranks[:1] + ranks[1:][-1:]))
    worst = max(report.relative_errors, key=report.relative_errors.__getitem__)
    out.print(
        f"Wrote {escape(str(folder))}: LoRA of rank {rank_range} on {len(report.ranks)} modules, "
        f"{sum(tensor.numel() for tensor in report.state_dict.values()):,} parameters. The update differs by "
        f"{report.relative_error:.1%} (Frobenius norm), most by {report.relative_errors[worst]:.1%} in {worst}."
    )


@app.command("import")
def import_(
    checkpoint: Annotated[Path, typer.Argument(help="The authors' adapter.chkpt.")],
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder for the adapter.")],
    base: Annotated[str, typer.Option(help="The model it was trained on: a folder, a hub id or builtin:NAME.")],
) -> None:
    """Turn a checkpoint of the paper's authors into a PEFT adapter."""
    from diablo.authors import import_checkpoint

    _quiet()
    report = import_checkpoint(checkpoint, folder, base=base)
    out.print(
        f"Wrote {escape(str(report.folder))}: {report.modules} modules, {report.parameters:,} parameters, "
        f"num_blocks={report.num_blocks}. Try: diablo generate {escape(str(report.folder))} 'How are you?'"
    )


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help="A run's folder, an adapter's folder, or any model.")],
    prompt: Annotated[str, typer.Argument(help="The prompt.")],
    base: Base = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length limit.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.0,
    chat: Annotated[bool | None, typer.Option("--chat/--no-chat", help="Use the tokenizer's chat template.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the sampling.")] = 0,
) -> None:
    """Complete a prompt with a model or an adapter."""
    import transformers

    from diablo.checkpoints import load_for_generation
    from diablo.data.rows import Row
    from diablo.evaluation import generate as complete

    _quiet()
    loaded, encoder = load_for_generation(model, base=base, chat=chat)
    transformers.set_seed(seed)
    sampling: dict[str, Any] = {"do_sample": True, "temperature": temperature} if temperature else {}
    tokens = encoder.prompt(Row(1, prompt, completion="?"))
    (text,) = complete(loaded, encoder, [tokens], max_new_tokens=max_new_tokens, **sampling)
    out.print(text.strip(), markup=False)


@app.command()
def chat(
    model: Annotated[str, typer.Argument(help="A run's folder, an adapter's folder, or any model.")],
    base: Base = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length limit of an answer.")] = 512,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.0,
    use_template: Annotated[
        bool | None,
        typer.Option("--chat/--no-chat", help="Use the tokenizer's chat template; as a run did, or if there is one."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the sampling.")] = 0,
) -> None:
    """Talk to a model or an adapter; /base shows the base model's answer beside it."""
    from diablo.chat import Chat, read_line
    from diablo.checkpoints import load_for_generation
    from diablo.data import RowEncoder
    from diablo.results import recipe_of_run

    _quiet()
    loaded, encoder = load_for_generation(model, base=base, chat=use_template)
    if use_template is None and not recipe_of_run(model):
        encoder = RowEncoder(encoder.tokenizer, chat=bool(encoder.tokenizer.chat_template))
    conversation = Chat(loaded, encoder, out, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    conversation.run(lambda: read_line(out))


def _evaluate_by_harness(
    model: str,
    base: str | None,
    chat: bool | None,
    names: str,
    include: Path | None,
    settings: dict[str, Any],
    path: Path | None,
) -> None:
    from diablo.checkpoints import load_for_generation
    from diablo.harness import harness_record, load_harness_tasks, run_harness
    from diablo.reporting import harness_table
    from diablo.results import write_json

    _quiet()
    tasks = load_harness_tasks(names.split(","), include)
    loaded, encoder = load_for_generation(model, base=base, chat=chat)
    figures = run_harness(loaded, encoder, tasks, **settings)
    out.print(harness_table(figures, f"lm-eval on {model}"))
    if path is not None:
        write_json(path, harness_record(figures, {"model": model, "chat": encoder.chat, **settings}))


def _refuse(reason: str, options: dict[str, Any]) -> None:
    """Refuse options that would have no effect."""
    from diablo.errors import UserError

    if given := [name for name, value in options.items() if value is not None]:
        raise UserError(f"{', '.join(given)}: {reason}; leave out the one or the other.")


def _check_file(path: Path | None) -> None:
    """Check that a file can be written, before what it is to hold is worked out."""
    from diablo.errors import UserError

    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        raise UserError(f"--out: {str(path)!r} cannot be written; give a file in a folder that exists.")


def _quiet() -> None:
    """Keep the libraries' own bars and advice off the terminal; what matters is reported by diablo."""
    import warnings

    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)
    import datasets

    datasets.disable_progress_bars()


if __name__ == "__main__":
    main()
