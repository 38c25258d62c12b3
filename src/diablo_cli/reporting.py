"""What the command line prints about a plan, a run and answers."""

from __future__ import annotations

import math
import shlex
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from diablo.publishing.card import into_quantized
from diablo.recipes.objectives import OBJECTIVES
from diablo.recipes.training import Training
from diablo.records.results import kept_loss
from diablo_cli.task_reporting import print_examples

if TYPE_CHECKING:
    from diablo.comparison import Comparison
    from diablo.models.inspection import Inspection
    from diablo.planning.plan import Plan
    from diablo.planning.sizes import Memory, Sizes
    from diablo.recipes.applying import TargetKind
    from diablo.training.run import RunResult


def print_plan(out: Console, plan: Plan, memory: Memory | None) -> None:
    """What a plan will do, and two of its rows with every token marked.

    Args:
        out: where to write.
        plan: the plan.
        memory: an estimate of what its longest batch takes; None where there is none.
    """
    from diablo.models.loading import stored_quantization

    recipe, (trainable, total) = plan.recipe, plan.parameters
    if plan.targets:
        out.print(kinds_table(plan.targets, f"{recipe.method.title} on {recipe.model}"))
    out.print(f"trained parameters  {trainable:,} of {total:,} ({trainable / total:.2%})")
    if recipe.adapter is not None:
        out.print(f"goes on from        {recipe.adapter}", markup=False)
    for line in (*plan.objective_lines(), *plan.data_lines()):
        out.print(line, markup=False)
    for task, decoding in plan.scored:
        how = f"{task.protocol} protocol, {decoding.describe()}" if decoding else "by the likelihood of its choices"
        out.print(f"scored              {task.name} ({task.measure}), {how}")
    out.print(f"padding             {plan.padding_share:.1%} of a batch{'' if plan.rewards is None else ' of prompts'}")
    out.print(f"effective batch     {plan.effective_batch_in_words}")
    out.print(f"steps               {plan.steps}")
    for line in _optimization(plan):
        out.print(line, markup=False)
    if library := plan.recipe.quantization or stored_quantization(plan.config).get("quant_method"):
        out.print(f"quantization        {library}")
    out.print(f"precision           {str(plan.dtype).removeprefix('torch.')} on {plan.device}")
    if memory is not None:
        batch = f"{recipe.training.batch_size} x {plan.longest:,} tokens"
        out.print(f"memory              about {format_bytes(memory.total)} at the longest batch, {batch}")
    _print_rows(out, plan)


def _print_rows(out: Console, plan: Plan) -> None:
    recipe = plan.recipe
    worse = ", [bold red]of worse completions red[/]" if recipe.objective.rows in ("pairs", "judged") else ""
    marks = f": prompt plain, [bold green]supervised tokens green in ‹marks›[/]{worse}"
    if recipe.objective.rows == "texts":
        marks = ": a text, and what it is compared with"
    if recipe.objective.rows in ("labelled", "numbered", "tagged"):
        marks = ": what is to be said of them in [bold green]green[/]"
    what = f"rows as the model sees them{marks}" if plan.rewards is None else "prompts as the model sees them"
    out.print(f"\nTwo {what}\n")
    for row in plan.train[:2]:
        for sequence in row.sequences:
            colour = "red" if sequence is row.rejected or row.desired is False else "green"
            parts = []
            for text, is_supervised in plan.marked(sequence):
                visible = escape(text.replace("\n", "⏎\n" if not is_supervised else "⏎"))
                parts.append(f"[bold {colour}]‹{visible}›[/]" if is_supervised else visible)
            out.print("".join(parts) + "\n")
        if said := plan.said_of(row):
            out.print(f"[bold green]{escape(said)}[/]\n")


def _optimization(plan: Plan) -> list[str]:
    """What of the optimisation is not as it is by default, in lines of a plan."""
    training, scores, default = plan.recipe.training, plan.recipe.objective.scores, Training()
    lines = [f"warm-up             {plan.long_warmup}"] if plan.long_warmup else []
    if training.learning_rate == "auto":
        lines.append("learning rate       auto: found in the weights, when they are loaded")
    if training.optimizer != default.optimizer:
        chosen = training.optimizer
        told = {"betas": chosen.betas, "epsilon": chosen.epsilon, **chosen.options}
        parts = [chosen.name, *(f"{name} {value}" for name, value in told.items() if value is not None)]
        for group in chosen.groups:
            own = {"learning rate": group.learning_rate, "weight decay": group.weight_decay}
            listed = " and ".join(f"{name} {value:g}" for name, value in own.items() if value is not None)
            parts.append(f"{', '.join(group.modules)} with {listed}")
        lines.append(f"optimizer           {'; '.join(parts)}")
    floor = training.min_learning_rate
    if training.schedule != default.schedule or floor is not None or training.schedule_options:
        told = {**training.schedule_options, **({} if floor is None else {"down to": f"{floor:g}"})}
        lines.append(f"schedule            {'; '.join([training.schedule, *(f'{k} {v}' for k, v in told.items())])}")
    if training.ema is not None:
        lines.append(f"kept                the average of the steps' parameters, with a decay of {training.ema:g}")
    judge = _judge(scores) if training.best_by == "score" else "held-out loss"
    if training.keep == "best":
        lines.append(f"kept                the step of the best {judge}")
    if training.early_stopping_patience is not None:
        lines.append(
            f"early stopping      after {training.early_stopping_patience} measurements without a better {judge}"
        )
    return lines


def _judge(scores: Sequence[str]) -> str:
    """The score that says which step is best: that of an objective on held-out rows, or a task's."""
    return f"{' or '.join(scores)} on the held-out rows" if scores else "score on the validation rows"


def print_sizes(out: Console, sizes: Sizes, model: str, batch: str) -> None:
    """What training a model would take.

    Args:
        out: where to write.
        sizes: what was worked out.
        model: what the user called the model.
        batch: the batch that the memory is for, in words.
    """
    if sizes.targets:
        out.print(kinds_table(sizes.targets, f"{sizes.method} on {model}"))
    out.print(f"trained parameters  {sizes.trained:,} of {sizes.total:,} ({sizes.trained / sizes.total:.2%})")
    if sizes.tokens is not None:
        texts = ", ".join(sizes.tokens.texts.values())
        out.print(f"trained tokens      {texts}; {sizes.tokens.describe()}", markup=False)
    if sizes.learning_rate is not None:
        out.print(
            f"learning rate       {sizes.learning_rate:g} suits the blocks and weights in a long run, and less "
            "in a short one: training.learning_rate: auto"
        )
    out.print()
    table = Table("", *(row.method for row in sizes.memory), title=f"memory of training at {batch}")
    table.add_row("trained parameters", *(f"{row.trained:,}" for row in sizes.memory))
    for name in ("weights", "adapter", "gradients", "optimizer", "activations", "total"):
        table.add_row(name, *(format_bytes(getattr(row, name)) for row in sizes.memory))
    out.print(table)
    out.print(
        "Activations are the most that is kept for the backward at a time, with fused attention and the loss on every "
        "token; buffers of kernels and of the allocator come on top."
    )
    if sizes.method not in [row.method for row in sizes.memory]:
        out.print(
            f"What {sizes.method} takes is not estimated: its adapters are made from the values of the weights, which "
            "are not read for this."
        )


def format_bytes(count: int) -> str:
    """A number of bytes in MB or GB."""
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


def print_inspections(out: Console, inspections: Sequence[Inspection]) -> None:
    """Where updates go, by kind of module and by layer; the figures of several adapters stand side by side."""
    from diablo.models.inspection import mean_relative_norm

    if len(inspections) > 1:
        for each in inspections:
            out.print(f"{each.label}  {escape(str(each.adapter))}")
    kinds = list(dict.fromkeys(kind for each in inspections for kind in each.kinds))
    beside = " · ".join(each.label for each in inspections) if len(inspections) > 1 else ""
    table = Table(
        "module", "norm", "of the base", "largest block", "effective rank", title=f"update by module {beside}"
    )
    for kind in kinds:
        found = [each.kinds.get(kind, []) for each in inspections]
        shares = [[share for weight in weights for share in weight.relative_norms or []] for weights in found]
        table.add_row(
            kind,
            _beside(math.hypot(*(weight.norm for weight in weights)) if weights else None for weights in found),
            _beside((mean_relative_norm(weights) for weights in found), ".1%"),
            _beside((max(each, default=None) for each in shares), ".1%"),
            _beside(
                (statistics.fmean(w.effective_rank for w in weights) if weights else None for weights in found), ".1f"
            ),
        )
    out.print(table)
    layers = sorted({weight.layer for each in inspections for weight in each.weights if weight.layer is not None})
    cells = {
        (layer, kind): [
            mean_relative_norm([weight for weight in each.kinds.get(kind, []) if weight.layer == layer])
            for each in inspections
        ]
        for layer in layers
        for kind in kinds
    }
    known = [share for shares in cells.values() for share in shares if share is not None and math.isfinite(share)]
    if not known:
        return
    table = Table("layer", *kinds, title=f"update / base weight there, in percent {beside}")
    for layer in layers:
        table.add_row(str(layer), *(_shaded(cells[layer, kind], max(known)) for kind in kinds))
    out.print(table)


def _beside(values: Iterable[float | None], form: str = ".3g") -> str:
    return " · ".join("-" if value is None else format(value, form) for value in values)


def _shaded(shares: Sequence[float | None], top: float) -> str:
    """Shares in percent, the redder the larger they are, as far as the terminal has colours."""
    cells = []
    for share in shares:
        text = _beside([None if share is None else 100 * share], ".1f")
        strength = round(160 * share / top) if share and math.isfinite(share) else 0
        cells.append(f"[on rgb({20 + strength},20,40)]{text}[/]" if strength > 20 else text)
    return " · ".join(cells)


def kinds_table(kinds: list[TargetKind], title: str) -> Table:
    """What a method adapts, by kind."""
    table = Table("module", "count", "shape", "adapter", "parameters", title=title)
    for kind in kinds:
        shape = f"{kind.shape[0]} -> {kind.shape[1]}" if kind.shape else "-"
        table.add_row(kind.kind, str(kind.count), shape, kind.adapter, f"{kind.parameters:,}")
    return table


def print_result(out: Console, result: RunResult) -> None:
    """What a run did and left behind, and what to try next."""
    record = result.record
    runs = {when: scores for when, scores in (("before", result.before), ("after", result.after)) if scores}
    for task in result.after or result.before:
        scores = {when: by_task[task] for when, by_task in runs.items()}
        print_examples(out, scores, record["recipe"]["evaluation"]["examples"])
        for when, score in scores.items():
            for metric, value in score.metrics.items():
                what = f"{task} {metric} {when}"
                out.print(f"{what:<32} {value:6.1%}  ({score.right} of {len(score.answers)})")
    training, data, parameters = record["training"], record["data"], record["parameters"]
    _print_losses(out, record)
    out.print(
        f"trained          {parameters['trainable']:,} parameters ({parameters['share']:.2%}) for {training['steps']} "
        f"steps in {record['timings']['train_seconds']:.0f} s, {training['tokens_per_second']:.0f} tokens/s, "
        f"padding {data['padding_share']:.1%}"
    )
    if data["long_rows_dropped"]:
        out.print(f"left out         {len(data['long_rows_dropped'])} rows longer than training.max_length")
    if data["malformed_rows_skipped"]:
        out.print(f"left out         {len(data['malformed_rows_skipped'])} malformed rows")
    if data["tested_rows_left_out"]:
        out.print(f"left out         {data['tested_rows_left_out']} rows that are tested on")
    folder, adapter = escape(str(result.folder)), escape(str(result.adapter))
    what = "adapter" if result.adapter.name == "adapter" else "model"
    out.print(f"{what:<16} {adapter} ({record['adapter_bytes'] / 1e6:.1f} MB)")
    if result.merged:
        out.print(f"merged model     {escape(str(result.merged))}")
    if result.upload:
        out.print(f"uploaded to      {escape(result.upload.url)}")
    out.print(f"record           {folder}/run.json, {folder}/loss.png")
    if runs:
        out.print(f"answers          {', '.join(f'{folder}/answers-{when}.jsonl' for when in runs)}")
    out.print("\nWhat to try next:")
    head = record["training"]["head"]
    verb = "generate" if not head else "embed" if head["kind"] == "embedding" else "classify"
    picture = " --image FILE" if record["data"]["images"] else ""
    out.print(f'  diablo {verb} {folder} "..."{picture}', markup=False)
    if runs:
        out.print(f"  diablo evaluate {folder}", markup=False)
    if what == "adapter" and result.merged is None:
        out.print(f"  diablo merge {folder} {folder}-merged{into_quantized(record)}", markup=False)
    if result.upload is None:
        out.print(f"  diablo push {folder} OWNER/NAME", markup=False)


def _print_losses(out: Console, record: dict[str, Any]) -> None:
    training = record["training"]
    if training["reward"]:
        (first, before), (last, after) = training["reward"][0], training["reward"][-1]
        out.print(f"reward           {before:.3f} -> {after:.3f} of completions, logged at steps {first} and {last}")
    if training["held_out_loss"]:
        before, after = training["held_out_loss"][0][1], kept_loss(training)
        unit = training["loss_unit"].removeprefix("nats ")
        out.print(f"held-out loss    {before:.3f} -> {after:.3f} {unit}")
    for name, values in training["held_out_figures"].items():
        by_step = dict(values)
        before, after = values[0][1], by_step[training["kept_step"]]
        figures = (f"{value:.1%}" if name == "accuracy" else f"{value:.3f}" for value in (before, after))
        out.print(f"{'held-out ' + name.replace('_', ' '):<16} {' -> '.join(figures)}")
    of_rows = OBJECTIVES[record["recipe"]["objective"]["name"]].scores
    judge = _judge(of_rows) if training["validation_score"] else "held-out loss"
    if training["stopped_early"]:
        out.print(f"stopped early    after step {training['steps']}: the {judge} did not become better")
    if training["kept_step"] != training["steps"]:
        out.print(f"kept             step {training['kept_step']}, of the best {judge}")
    if training["validation_score"] and not of_rows:
        score = dict(training["validation_score"])[training["kept_step"]]
        out.print(f"validation       {score:.1%} at step {training['kept_step']}")
    if record["general_loss"]:
        before, after = record["general_loss"]["before"], record["general_loss"]["after"]
        out.print(f"general text     {before:.3f} -> {after:.3f} per token, forgetting {after - before:+.3f}")


def print_rows_made(out: Console, what: str, seconds: float, settings: dict[str, Any], *, trained_as: str) -> None:
    """That rows were written, and what a recipe that trains on them has to say.

    Args:
        out: where to print.
        what: the number of rows, and what they are.
        seconds: how long it took.
        settings: values by the keys of the recipe.
        trained_as: the run whose chat template is used, if one is.
    """
    told = {key: value for key, value in settings.items() if key != "chat_template"}
    values = (str(value).lower() if isinstance(value, bool) else shlex.quote(str(value)) for value in told.values())
    line = " ".join(f"{key}={value}" for key, value in zip(told, values, strict=True))
    out.print(f"Wrote {settings['data.train']}: {what}, in {seconds:.0f} s. To train on them:", markup=False)
    out.print(f"  diablo train RECIPE {line}", markup=False)
    if "chat_template" in settings:
        out.print(f"  and in the recipe the chat_template of {trained_as}/recipe.yaml", markup=False)


def print_comparison_plan(out: Console, comparison: Comparison) -> None:
    """What a comparison will do."""
    from diablo.comparison.sweep import MOST_EXTENSIONS

    columns = (Column("method", overflow="fold"), "size", "trained parameters", "of all", "deviation")
    table = Table(*columns, title="methods")
    for contender in comparison.contenders:
        deviation = "-" if contender.deviation is None else f"{contender.deviation:+.2%}"
        added = 0 if contender.name == "full" else contender.trained
        share = f"{contender.trained / (comparison.total + added):.2%}"
        table.add_row(contender.title, contender.size, f"{contender.trained:,}", share, deviation)
    out.print(table)
    runs, data = comparison.planned_runs, comparison.recipe.data
    rates = comparison.grids.in_words([contender.name for contender in comparison.contenders])
    tried = f"seed{'s' * (len(comparison.rate_seeds) > 1)} {', '.join(map(str, comparison.rate_seeds))}"
    out.print(f"learning rates      {escape(rates)}, with {tried}; extended at an edge")
    out.print(f"validation rows     {data.validation_rows} of the training rows, chosen by seed {data.validation_seed}")
    out.print(f"seeds               {', '.join(map(str, comparison.seeds))}")
    scored = comparison.recipe.scored if comparison.recipe.evaluation.after else []
    out.print(f"scored              {', '.join(scored) or 'held-out loss only'}")
    out.print(f"forgetting          loss on general text ({escape(str(comparison.recipe.evaluation.general))})")
    out.print(
        f"runs                {runs} of {comparison.steps} steps, {runs * comparison.steps:,} steps in all; up to "
        f"{MOST_EXTENSIONS} more rates on each side of a grid, as long as the best rate is at its edge"
    )
    out.print(f"folder              {escape(str(comparison.folder))}")


_SECONDARY = ("size", "trained parameters", "training, s", "peak memory, MB", "file, MB")
_WIDTH_OF_COMPARISON = 130
"""In fewer columns the table of a comparison would break its words."""


def print_comparison(out: Console, record: dict[str, Any], folder: Path) -> None:
    """The outcome of a comparison, the best method first, and what has to be said about it."""
    from diablo.comparison.summary import HEADERS, notes, table_rows

    left_out = _SECONDARY if out.width < _WIDTH_OF_COMPARISON else ()
    shown = [number for number, header in enumerate(HEADERS) if header not in left_out]
    table = Table(*(Column(HEADERS[number], overflow="fold") for number in shown))
    for cells in table_rows(record):
        table.add_row(*(cells[number] for number in shown))
    out.print(table)
    if left_out:
        out.print(f"- In this width {', '.join(left_out)} are left out; comparison.md has them.", markup=False)
    for note in notes(record):
        out.print(f"- {note}", markup=False)
    out.print(f"record  {escape(str(folder))}/comparison.json, .md and .png")
