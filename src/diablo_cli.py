"""The command line: each verb is one call of a public function.

This module lies beside the package, not in it: ``import diablo`` registers the method with PEFT and so takes seconds,
which ``diablo --help`` should not. Everything heavy is imported by the verb that needs it.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from diablo.evaluation import Score
    from diablo.methods import TargetKind
    from diablo.planning import Plan
    from diablo.tasks import Task
    from diablo.training import RunResult

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

        _print_plan(make_plan(settings))
        return
    from diablo.training import train as run

    _print_result(run(settings, console=progress, resume=resume, overwrite=overwrite))


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
    out.print(_kinds_table(sizes.targets, f"DiaBlo with N = {sizes.num_blocks} on {model}"))
    out.print(f"trained parameters  {sizes.trained:,} of {sizes.total:,} ({sizes.trained / sizes.total:.2%})\n")
    title = f"memory of training at {batch_size} x {length} tokens in {dtype}"
    table = Table("", *(row.method for row in sizes.memory), title=title)
    table.add_row("trained parameters", *(f"{row.trained:,}" for row in sizes.memory))
    for name in ("weights", "adapter", "gradients", "optimizer", "activations", "total"):
        table.add_row(name, *(_size(getattr(row, name)) for row in sizes.memory))
    out.print(table)
    out.print(
        "Activations are what autograd keeps with fused attention and the loss on every token, without gradient "
        "checkpointing; buffers of kernels and of the allocator come on top."
    )


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="A run's folder, an adapter's folder, or any model.")],
    task: Annotated[str | None, typer.Option(help="Name of the task; a run's own where left out.")] = None,
    base: Base = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts generated together.")] = 48,
    limit: Annotated[int | None, typer.Option(min=1, help="Score only the first so many problems.")] = None,
    examples: Annotated[int, typer.Option(min=0, help="Answers to print.")] = 3,
    chat: Annotated[bool | None, typer.Option("--chat/--no-chat", help="Use the tokenizer's chat template.")] = None,
    likelihood: Annotated[
        bool, typer.Option("--likelihood", help="Score a multiple-choice task by the likelihood of its choices.")
    ] = False,
    harness: Annotated[
        str | None, typer.Option(help="Tasks of lm-evaluation-harness in place of --task, such as arc_easy,hellaswag.")
    ] = None,
    harness_include: Annotated[Path | None, typer.Option(help="A folder with further task files for it.")] = None,
    num_fewshot: Annotated[int | None, typer.Option(min=0, help="Worked examples in each of its prompts.")] = None,
    out_file: Annotated[Path | None, typer.Option("--out", help="A JSON file for the figures.")] = None,
) -> None:
    """Score a model or an adapter on a task: by generation, by likelihood or through lm-evaluation-harness."""
    from diablo.errors import UserError
    from diablo.evaluation import evaluate_task
    from diablo.progress import ProgressReport
    from diablo.tasks import TASKS, get_task

    if out_file is not None and (out_file.is_dir() or not out_file.parent.is_dir()):
        raise UserError(f"--out: {str(out_file)!r} cannot be written; give a file in a folder that exists.")
    if harness is not None:
        if task is not None or likelihood:
            raise UserError("--harness: it has tasks and measures of its own; leave out --task and --likelihood.")
        _evaluate_by_harness(model, base, chat, harness, harness_include, batch_size, limit, num_fewshot, out_file)
        return
    if harness_include is not None or num_fewshot is not None:
        raise UserError("--harness: missing; --harness-include and --num-fewshot are settings of its tasks.")
    task = task or _trained_as(model).get("task")
    if task is None:
        raise UserError(f"--task: missing; allowed: {', '.join(TASKS)}.")
    chosen = get_task(task)
    _quiet()
    if likelihood:
        _evaluate_by_likelihood(model, base, chat, chosen, batch_size, limit, out_file)
        return
    loaded, encoder = _load(model, base, chat)
    total = len(chosen.problems("test")[:limit])
    with ProgressReport(progress, "scoring", total) as report:
        score = evaluate_task(
            loaded,
            encoder,
            chosen,
            batch_size=batch_size,
            limit=limit,
            progress=lambda done, _: report.update(done),
        )
    _print_examples({"answer": score}, examples)
    out.print(f"{task}: {score.accuracy:.1%} ({score.right} of {len(score.answers)}) in {score.seconds:.0f} s")
    _write_figures(out_file, {"model": model, **score.summary()})


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

    from diablo.data.rows import Row
    from diablo.evaluation import generate as complete

    _quiet()
    loaded, encoder = _load(model, base, chat)
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
    from diablo.data import RowEncoder

    _quiet()
    loaded, encoder = _load(model, base, use_template)
    if use_template is None and not _trained_as(model):
        encoder = RowEncoder(encoder.tokenizer, chat=bool(encoder.tokenizer.chat_template))
    conversation = Chat(loaded, encoder, out, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    conversation.run(lambda: read_line(out))


def _evaluate_by_likelihood(
    model: str, base: str | None, chat: bool | None, task: Task, batch_size: int, limit: int | None, path: Path | None
) -> None:
    from diablo.likelihood import as_multiple_choice, evaluate_choices
    from diablo.progress import ProgressReport

    chosen = as_multiple_choice(task)
    total = sum(len(chosen.choices(problem)) for problem in chosen.problems("test")[:limit])
    loaded, encoder = _load(model, base, chat)
    with ProgressReport(progress, "scoring", total) as report:
        score = evaluate_choices(
            loaded,
            encoder,
            chosen,
            batch_size=batch_size,
            limit=limit,
            progress=lambda done, _: report.update(done),
        )
    out.print(
        f"{task.name} by likelihood: acc {score.acc:.1%}, acc_norm {score.acc_norm:.1%} "
        f"({len(score.choices)} problems) in {score.seconds:.0f} s"
    )
    _write_figures(path, {"model": model, **score.summary()})


def _evaluate_by_harness(
    model: str,
    base: str | None,
    chat: bool | None,
    names: str,
    include: Path | None,
    batch_size: int,
    limit: int | None,
    num_fewshot: int | None,
    path: Path | None,
) -> None:
    from diablo.harness import harness_record, load_harness_tasks, run_harness

    _quiet()
    tasks = load_harness_tasks(names.split(","), include)
    loaded, encoder = _load(model, base, chat)
    figures = run_harness(loaded, encoder, tasks, limit=limit, num_fewshot=num_fewshot, batch_size=batch_size)
    table = Table("task", "shots", "problems", "metric", "value", "standard error", title=f"lm-eval on {model}")
    for figure in figures:
        counts = ("" if count is None else str(count) for count in (figure.shots, figure.problems))
        error = "" if figure.error is None else f"{figure.error:.4f}"
        table.add_row(figure.task, *counts, figure.metric, f"{figure.value:.4f}", error)
    out.print(table)
    _write_figures(path, harness_record(figures, model=model, limit=limit, num_fewshot=num_fewshot, chat=encoder.chat))


def _write_figures(path: Path | None, figures: dict[str, Any]) -> None:
    from diablo.results import write_json

    if path is not None:
        write_json(path, figures)


def _trained_as(model: str) -> dict[str, Any]:
    """The recipe of a run, given the run's folder or one inside it; empty where it is no run's."""
    for folder in (Path(model), Path(model).parent):
        if (folder / "recipe.yaml").is_file() and (folder / "run.json").is_file():
            return json.loads((folder / "run.json").read_text(encoding="utf-8"))["recipe"]
    return {}


def _load(model: str, base: str | None, chat: bool | None) -> tuple[Any, Any]:
    """A model or an adapter on its base, ready to generate, and an encoder; a run's own settings where it is one's."""
    from diablo.checkpoints import adapter_folder, is_adapter, load_adapter
    from diablo.data import RowEncoder
    from diablo.models import choose_device, choose_dtype, load_model, load_tokenizer, resolve_model

    trained_as = _trained_as(model)
    device = choose_device()
    dtype = choose_dtype(trained_as.get("precision", "auto"), device)
    attention = trained_as.get("attention", "auto")
    if is_adapter(model):
        loaded, tokenizer = load_adapter(adapter_folder(model), base=base, dtype=dtype, attention=attention)
    else:
        name = resolve_model(str(Path(model) / "model") if (Path(model) / "model").is_dir() else model)
        loaded, tokenizer = load_model(name, dtype, attention), load_tokenizer(name)
    return loaded.to(device), RowEncoder(tokenizer, chat=trained_as.get("chat", False) if chat is None else chat)


def _quiet() -> None:
    """Keep the libraries' own bars and advice off the terminal; what matters is reported by diablo."""
    import warnings

    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)
    import datasets

    datasets.disable_progress_bars()


def _print_plan(plan: Plan) -> None:
    recipe, (tokens, supervised), (trainable, total) = plan.recipe, plan.tokens, plan.parameters
    if plan.targets:
        out.print(_kinds_table(plan.targets, f"{recipe.method.name} on {recipe.model}"))
    out.print(f"trained parameters  {trainable:,} of {total:,} ({trainable / total:.2%})")
    out.print(f"training rows       {len(plan.train):,}: {tokens:,} tokens, {supervised:,} of them supervised")
    out.print(f"held-out rows       {len(plan.held_out):,}")
    if plan.faults:
        out.print(
            f"malformed rows      {len(plan.faults)} left out: {', '.join(str(f.number) for f in plan.faults[:8])}"
        )
    if plan.too_long:
        out.print(f"rows too long       {len(plan.too_long)} left out: {', '.join(map(str, plan.too_long[:8]))}")
    out.print(f"padding             {plan.padding_share:.1%} of a batch")
    out.print(f"effective batch     {plan.effective_batch} rows")
    out.print(f"steps               {plan.steps}")
    out.print(f"precision           {str(plan.dtype).removeprefix('torch.')} on {plan.device}")
    out.print("\nTwo rows as the model sees them: prompt plain, [bold green]supervised tokens green in ‹marks›[/]\n")
    for row in plan.train[:2]:
        parts = []
        for text, is_supervised in plan.marked(row):
            visible = escape(text.replace("\n", "⏎\n" if not is_supervised else "⏎"))
            parts.append(f"[bold green]‹{visible}›[/]" if is_supervised else visible)
        out.print("".join(parts) + "\n")


def _size(count: int) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


def _kinds_table(kinds: list[TargetKind], title: str) -> Table:
    table = Table("module", "count", "shape", "adapter", "parameters", title=title)
    for kind in kinds:
        shape = f"{kind.shape[0]} -> {kind.shape[1]}"
        table.add_row(kind.kind, str(kind.count), shape, kind.adapter, f"{kind.parameters:,}")
    return table


def _print_result(result: RunResult) -> None:
    record = result.record
    scores = {name: s for name, s in (("before", result.before), ("after", result.after)) if s is not None}
    _print_examples(scores, record["recipe"]["evaluation"]["examples"])
    for name, score in scores.items():
        out.print(f"accuracy {name:<7} {score.accuracy:6.1%}  ({score.right} of {len(score.answers)})")
    training, data, parameters = record["training"], record["data"], record["parameters"]
    if training["held_out_loss"]:
        losses = [loss for _, loss in training["held_out_loss"]]
        out.print(f"held-out loss    {losses[0]:.3f} -> {losses[-1]:.3f} per token")
    out.print(
        f"trained          {parameters['trainable']:,} parameters ({parameters['share']:.2%}) for {training['steps']} "
        f"steps in {record['timings']['train_seconds']:.0f} s, {training['tokens_per_second']:.0f} tokens/s, "
        f"padding {data['padding_share']:.1%}"
    )
    if data["long_rows_dropped"]:
        out.print(f"left out         {len(data['long_rows_dropped'])} rows longer than training.max_length")
    if data["malformed_rows_skipped"]:
        out.print(f"left out         {len(data['malformed_rows_skipped'])} malformed rows")
    folder, adapter = escape(str(result.folder)), escape(str(result.adapter))
    what = "adapter" if result.adapter.name == "adapter" else "model"
    out.print(f"{what:<16} {adapter} ({record['adapter_bytes'] / 1e6:.1f} MB)")
    if result.merged:
        out.print(f"merged model     {escape(str(result.merged))}")
    out.print(f"record           {folder}/run.json, {folder}/loss.png")
    out.print("\nWhat to try next:")
    out.print(f'  diablo generate {folder} "..."', markup=False)
    if result.after is not None or result.before is not None:
        out.print(f"  diablo evaluate {folder}", markup=False)
    if what == "adapter" and result.merged is None:
        out.print(f"  diablo merge {folder} {folder}/merged", markup=False)


def _print_examples(scores: dict[str, Score], count: int) -> None:
    if not scores:
        return
    answers = [score.answers for score in scores.values()]
    for several in list(zip(*answers, strict=True))[:count]:
        out.print(several[0].problem.row.prompt, markup=False)
        for name, answer in zip(scores, several, strict=True):
            verdict = "right" if answer.right else "wrong"
            out.print(f"  {name:<7} {answer.text.strip()!r}  {verdict}", markup=False)
        out.print()


if __name__ == "__main__":
    main()
